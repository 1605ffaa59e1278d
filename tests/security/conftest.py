"""The backends that isolate, each held to the same promises."""

import os
from pathlib import Path

import pytest

from tests.engines import Dockerd
from tests.integration.bubblewrap import boxes as bubblewrap
from tests.integration.docker import boxes as docker
from tests.lanes import ordinary_uid
from tests.leaks import Places
from warmcell.sandbox.backends.gvisor import GvisorBackend
from warmcell.sandbox.testing.contract import Subject

BACKENDS = {name: pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("bubblewrap", "docker", "gvisor")}
OF_THE_HOSTS_KERNEL = [BACKENDS["bubblewrap"], BACKENDS["docker"]]
"""Backends whose guests are processes of the host's kernel: what they may ask of it is a matter of rights."""


@pytest.fixture(params=BACKENDS.values())
def subject(request: pytest.FixtureRequest, places: Places) -> Subject:
    """A backend of the test's own."""
    if request.param == "docker":
        engine: Dockerd = request.getfixturevalue("docker")
        return docker.subject_of(places, engine)
    made = bubblewrap.subject_of(places)
    if request.param == "gvisor":
        made.backend = GvisorBackend(paths=bubblewrap.paths_of(places))
    return made


def writable_folder(subject: Subject, name: str) -> Path:
    """A folder that guests may write to as a workspace, whatever the backend: in containers none of root's is."""
    path = subject.folder(name)
    if os.getuid() == 0:
        os.chown(path, ordinary_uid(), ordinary_uid())
    return path
