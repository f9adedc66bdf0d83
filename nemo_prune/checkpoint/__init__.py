"""Checkpoints on disk: every form read, rows changed, differences listed."""
