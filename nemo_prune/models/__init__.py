"""Which model: the demo, a known one, a folder, a single file or a repo of the Hub; and where masks come from."""
