"""The stages of a run, each a function from data to data."""
