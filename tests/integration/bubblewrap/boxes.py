"""A bubblewrap backend of a test's own, and sandboxes of it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from tests.leaks import Places
from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.testing.contract import Subject


def paths_of(places: Places) -> Paths:
    """Warmcell's directories of a test."""
    return Paths(runtime=places.runtime, state=places.state, leases=places.leases)


def subject_of(places: Places, **changes: Any) -> Subject:
    """A backend whose sandboxes go below the test's directories."""
    paths = paths_of(places).make()
    directory = places.root / "c"
    directory.mkdir(exist_ok=True)
    subject = Subject(backend=BubblewrapBackend(paths=paths), directory=directory)
    return dataclasses.replace(subject, **changes)


def folder(places: Places, name: str, *, owner: int | None = None, mode: int = 0o755) -> Path:
    """A directory for a workspace."""
    path = places.root / name
    path.mkdir(parents=True)
    path.chmod(mode)
    if owner is not None:
        os.chown(path, owner, owner)
    return path
