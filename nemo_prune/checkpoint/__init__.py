"""Checkpoints as they lie on disk: every form read, rows changed, differences listed."""
