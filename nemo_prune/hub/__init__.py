"""The Hub: its errors by name, and downloads."""
