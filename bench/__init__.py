"""Measurements: correctness first, then speed, against what else is there and against the machine's own
limits."""
