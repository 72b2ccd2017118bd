"""`python -m bench.validate`: executes what every compiler pass makes of every kernel, on a CPU."""
