"""`python -m benchmarks`: each promise beside its baseline, in one run."""
