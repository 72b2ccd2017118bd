"""Training: one step, the loop around it, several processes, and the files of a run."""
