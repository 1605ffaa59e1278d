"""All checks, in the order in which they run."""

from warmcell.sandbox.testing.contract import files, isolation, layers, life, limits, replacing, requests

CHECKS = (
    *requests.check.checks,
    *life.check.checks,
    *limits.check.checks,
    *files.check.checks,
    *layers.check.checks,
    *replacing.check.checks,
    *isolation.check.checks,
)
