"""How the demo model was made: its data, its training, its figures and its card."""
