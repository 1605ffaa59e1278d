"""A docker backend of a test's own, and sandboxes of it."""

from tests.engines import IMAGE, PYTHON, Dockerd
from tests.leaks import Places
from warmcell.sandbox.backends.docker import DockerBackend
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.testing.contract import Subject


def paths_of(places: Places) -> Paths:
    """Warmcell's directories of a test."""
    return Paths(runtime=places.runtime, state=places.state, leases=places.leases)


def subject_of(places: Places, docker: Dockerd) -> Subject:
    """A backend whose sandboxes go below the test's directories."""
    paths = paths_of(places).make()
    directory = places.root / "c"
    directory.mkdir(exist_ok=True)
    backend = DockerBackend(paths=paths, host=docker.host, image=IMAGE)
    return Subject(backend=backend, directory=directory, python=PYTHON, image=IMAGE)
