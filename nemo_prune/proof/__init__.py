"""What a pruned model still gives back, and what pruning costs."""
