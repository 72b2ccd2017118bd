"""Weights on disk: checkpoints of this package, and files of other packages."""
