"""Benchmarks: each op is checked, then timed against other implementations and the machine's own limits."""
