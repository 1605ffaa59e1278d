"""The contract suite that is shipped, against every backend of ours, as whoever runs the tests."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines import IMAGE, PYTHON, Dockerd
from tests.leaks import Places
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
from warmcell.sandbox.backends.docker import DockerBackend
from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.backends.gvisor import GvisorBackend
from warmcell.sandbox.backends.nursery import Nursery
from warmcell.sandbox.backends.process import ProcessBackend
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.testing.contract import CHECKS, Check, Subject
from warmcell.sandbox.testing.fakes import FakeBackend


def _paths(places: Places) -> Paths:
    return Paths(runtime=places.runtime, state=places.state, leases=places.leases)


def _fake(places: Places) -> SandboxBackend:
    return FakeBackend()


def _process(places: Places) -> SandboxBackend:
    return ProcessBackend()


def _bubblewrap(places: Places) -> SandboxBackend:
    return BubblewrapBackend(paths=_paths(places), nursery=NURSERIES.setdefault(places, Nursery()))


def _gvisor(places: Places) -> SandboxBackend:
    return GvisorBackend(paths=_paths(places))


def _docker(places: Places) -> SandboxBackend:
    return DockerBackend(paths=_paths(places), host=ENGINES.get(places, ""), image=IMAGE)


def _podman(places: Places) -> SandboxBackend:
    return _docker(places)


MAKERS: tuple[Callable[[Places], SandboxBackend], ...] = (_fake, _process, _bubblewrap, _docker, _podman, _gvisor)
LANES = {
    _bubblewrap: pytest.mark.bubblewrap,
    _docker: pytest.mark.docker,
    _podman: pytest.mark.podman,
    _gvisor: pytest.mark.gvisor,
}
OF_PODMANS = (
    "everything of a sandboxs own is there again",
    "an enforced memory limit ends a hog and counts it",
    "an enforced limit of processes holds",
    "a full layer is an error of the guest alone",
    "the run directory is capped",
    "the guest is not root",
    "the guest has no capabilities and can gain none",
    "no descriptor of the host is inherited",
    "the environment is only what a guest needs",
    "only its own processes are in sight",
    "without network no port of the host is reached",
    "devices are the harmless ones",
)
"""Of Podman what an engine can do in another way than Docker: the rest is the same code on the same guest, and is tried
in the long form.
"""
NOT_PODMANS = "the guest has namespaces of its own"
"""It gives none of control groups where those are of version 1."""
NOWHERE = Places(Path("/nowhere"))
NURSERIES: dict[Places, Nursery] = {}
"""What forks the sandboxes of a test."""
ENGINES: dict[Places, str] = {}
"""Where a test's engine of containers is."""


def _subject(make: Callable[[Places], SandboxBackend], places: Places) -> Subject:
    directory = places.root / "c"
    contained = make in (_docker, _podman)
    return Subject(
        backend=make(places),
        directory=directory,
        python=PYTHON if contained else sys.executable,
        image=IMAGE if contained else None,
        programs=make is not _fake,
    )


def _promises() -> list[object]:
    """Each check with each backend that makes that promise."""
    return [
        pytest.param(make, check, id=f"{make.__name__.strip('_')}: {check}", marks=_marks(make, check))
        for make in MAKERS
        for check in CHECKS
        if check.applies(_subject(make, NOWHERE)) and (make is not _podman or check.name != NOT_PODMANS)
    ]


def _marks(make: Callable[[Places], SandboxBackend], check: Check) -> list[pytest.MarkDecorator]:
    late = [pytest.mark.long] if make is _podman and check.name not in OF_PODMANS else []
    return [LANES[make], *late] if make in LANES else []


@pytest.fixture
def engine(places: Places, request: pytest.FixtureRequest) -> None:
    """The engine of containers, for a test that needs one."""
    if request.node.get_closest_marker("docker") is not None:
        made: Dockerd = request.getfixturevalue("docker")
        ENGINES[places] = made.host
    if request.node.get_closest_marker("podman") is not None:
        engine: Engine = request.getfixturevalue("podman")
        ENGINES[places] = engine.address


@pytest.mark.parametrize(("make", "check"), _promises())
@pytest.mark.usefixtures("engine")
async def test_promise(make: Callable[[Places], SandboxBackend], check: Check, places: Places) -> None:
    """A backend keeps a promise, and leaves nothing behind."""
    subject = _subject(make, places)
    subject.directory.mkdir()
    nursery = NURSERIES.pop(places, None)
    if nursery is None:
        await check.run(subject)
        return
    await nursery.open()
    try:
        await check.run(subject)
    finally:
        await nursery.close()


def test_the_suite_is_large_enough_to_prove_a_backend() -> None:
    """Every backend is held to at least the number of checks that other engines' suites have."""
    counts = {make.__name__: sum(check.applies(_subject(make, NOWHERE)) for check in CHECKS) for make in MAKERS}
    assert counts["_bubblewrap"] >= 60
    assert counts["_gvisor"] >= 60
    assert counts["_docker"] >= 60
    assert counts["_process"] >= 30
    assert counts["_fake"] >= 25


def test_what_podman_is_held_to_is_in_the_suite() -> None:
    """A check that is renamed is not lost."""
    assert {check.name for check in CHECKS}.issuperset({*OF_PODMANS, NOT_PODMANS})


def test_no_two_checks_have_the_same_name() -> None:
    """A name says which promise was broken."""
    assert len({check.name for check in CHECKS}) == len(CHECKS)
