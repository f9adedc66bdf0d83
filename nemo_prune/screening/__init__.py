"""Which captions of a large corpus are memorized."""
