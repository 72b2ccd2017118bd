"""Training: one step, the loop around it, and what a run keeps in its folder."""
