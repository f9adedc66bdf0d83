"""Captions: where they come from, in memory or as a stream."""
