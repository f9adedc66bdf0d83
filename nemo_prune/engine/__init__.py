"""Finding the neurons: NeMo's scores, its search, and one mask for a corpus."""
