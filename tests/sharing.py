"""Who of two processes runs which tests (pytest-xdist)."""

import os

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARED_OUT = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this process has a part of the tests only."""


class ByFile(LoadScopeScheduling):
    """A file's tests run in one process, since they share servers; those with the Docker engine all in the same one."""

    def _split_scope(self, nodeid: str) -> str:
        return "docker" if with_docker(nodeid) else nodeid.partition("::")[0]


def with_docker(nodeid: str) -> bool:
    """Whether it is one of those with the Docker engine; where they are handed out nothing but its name is known."""
    return "docker" in nodeid


def check_name(item: pytest.Item) -> None:
    """That a test with the Docker engine can be told by its name.

    Raises:
        pytest.UsageError: It cannot.
    """
    if item.get_closest_marker("docker") is not None and not with_docker(item.nodeid):
        raise pytest.UsageError(
            f'{item.nodeid} has the marker docker: its name, or its file\'s, must have the word "docker"'
        )
