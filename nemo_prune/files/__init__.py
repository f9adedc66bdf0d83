"""Files: written whole or not at all, read without trust, kept where they belong."""
