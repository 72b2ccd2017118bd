"""Weights on disk: this package's checkpoints, and the files of other packages."""
