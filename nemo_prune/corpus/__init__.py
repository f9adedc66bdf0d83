"""Captions: where they come from, and which of many deserve a closer look."""
