"""What nemo-prune costs and how well it holds, measured; each module is run as `python -m benchmarks.NAME`."""
