"""What IPython reads on its way up, so that a kernel that is up already can no longer be given another value of."""

DECIDED = ("IPYTHON", "JUPYTER", "JPY_PARENT")
"""Prefixes of variables."""
