"""All checks, in the order in which they run."""

from warmcell.sandbox.testing.contract import files, isolation, life, limits, requests

CHECKS = (
    *requests.check.checks,
    *life.check.checks,
    *limits.check.checks,
    *files.check.checks,
    *isolation.check.checks,
)
