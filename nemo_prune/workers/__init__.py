"""Many devices: a session on the workers of a Ray cluster."""
