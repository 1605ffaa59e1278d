"""Lanes, places and the leak check: what every test has around it."""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from blockbuster import BlockBuster, BlockBusterFunction

from benchmarks import machine
from tests import groups, leaks
from tests.engines import docker, dockerd, mortal, podman, podmand
from tests.lanes import AS_ROOT, LANES, absence, as_ordinary_user, ordinary_uid
from tests.leaks import Places, own_places
from tests.sharing import SHARED_OUT, ByFile, check_name, with_docker
from warmcell.sandbox.helper import program
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.snapshots.criu import helper_environment

__all__ = ["docker", "dockerd", "mortal", "podman", "podmand"]
"""Fixtures from elsewhere."""

ORDER = ("unit", "packaging", "contract", "integration", "security", "jupyter", "remote", "browser")
"""Folders of tests, the quick ones first."""

USED = pytest.StashKey[set[str]]()
"""Lanes that have a test in this run."""

GROUPS = pytest.StashKey[list[Path]]()
"""Control groups that this process has entered."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long forms of tests, and only those")


def pytest_configure(config: pytest.Config) -> None:
    # As from a terminal: a shell has it ignored in what it starts in the background, and so would every plain kernel.
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    config.addinivalue_line("markers", "long: the long form of a test; runs with --long (make long)")
    config.addinivalue_line("markers", "alone: measures, so that no other test may run beside it")
    for name, lane in LANES.items():
        config.addinivalue_line("markers", f"{name}: lane: {lane.about}")

    if _runs_tests(config):
        made = config.stash[GROUPS] = groups.enter()
        leaks.GROUPS[:] = made or [groups.EVERYWHERE]


def pytest_unconfigure(config: pytest.Config) -> None:
    groups.leave(config.stash.get(GROUPS, []))


def _runs_tests(config: pytest.Config) -> bool:
    """False in the process that hands them out to others (pytest-xdist)."""
    return SHARED_OUT or not config.getoption("numprocesses", None)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The log of the long tests is kept, so it says of what and where it is."""
    if not config.getoption("--long"):
        return []
    try:
        criu = program.find(helper_environment()).version
    except HelperError as error:
        criu = error.message
    return [
        f"commit: {machine.commit()} (+: with changes)",
        f"machine: {machine.sentence(machine.describe())}",
        f"CRIU: {criu}",
    ]


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = bool(config.getoption("--long"))
    left_out = [item for item in items if (item.get_closest_marker("long") is not None) != wanted]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=_rank)
    for item in items:  # It is to be there before the test's own places are looked at.
        for lane, engine in (("docker", "dockerd"), ("podman", "podmand")):
            if isinstance(item, pytest.Function) and item.get_closest_marker(lane) is not None:
                item.fixturenames = [engine, *item.fixturenames]  # The list is that of all of a test's parameters.
        check_name(item)
    config.stash[USED] = {name for name in LANES for item in items if item.get_closest_marker(name) is not None}


def _rank(item: pytest.Item) -> int:
    """In which order they run; what one process has to run alone begins first."""
    if SHARED_OUT and with_docker(item.nodeid):
        return -1
    folder = item.nodeid.split("/")[1]
    return ORDER.index(folder) if folder in ORDER else len(ORDER)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in LANES:
        if item.get_closest_marker(name) is None:
            continue
        missing = absence(name)
        if missing is not None:
            message = f"lane {name} is absent: {missing.why}. To add it: {missing.cure}"
            if os.environ.get("CI") == "true":
                pytest.fail(message, pytrace=False)
            pytest.skip(message)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    absent = {name: missing for name in sorted(config.stash.get(USED, ())) if (missing := absence(name)) is not None}
    if absent:
        terminalreporter.section("absent lanes")
        for name, missing in absent.items():
            terminalreporter.line(f"{name}: {missing.why}")
        cures = {missing.cure for missing in absent.values()}
        terminalreporter.line("To add them: " + (AS_ROOT if AS_ROOT in cures else " && ".join(sorted(cures))))


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """Warmcell's and Jupyter's directories of this test; after it nothing of ours may be left."""
    with own_places() as made:
        for name, value in made.env.items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture(autouse=True, scope="session")
def no_waiting_in_event_loops() -> Iterator[None]:
    """Our code may not wait in an event loop: `BlockingError` where it does. A look at a local file is no wait."""
    detector = BlockBuster("warmcell")
    for name in [name for name in detector.functions if name.startswith(("os.", "io."))]:
        del detector.functions[name]
    detector.functions["subprocess.Popen.wait"] = BlockBusterFunction(
        subprocess.Popen, "wait", scanned_modules="warmcell"
    )
    detector.activate()
    yield
    detector.deactivate()


@dataclass(frozen=True, slots=True)
class OrdinaryUser:
    """Somebody who is not root: whoever runs the tests, or a uid that root can become."""

    uid: int
    places: Places
    home: Path
    env: Mapping[str, str]
    """A whole environment, with the user's own home and Warmcell directories."""

    def argv(self, *command: str) -> list[str]:
        """The command line that runs `command` as this user; to be started with `env`."""
        return as_ordinary_user(*command, uid=self.uid)


@pytest.fixture
def ordinary_user(places: Places) -> Iterator[OrdinaryUser]:
    """An ordinary user with directories of their own, checked for leaks; mark the test with `user`."""
    if os.getuid() != 0:
        home = places.root / "home"
        home.mkdir()
        yield OrdinaryUser(os.getuid(), places, home, {**os.environ, "HOME": str(home)})
        return
    uid = ordinary_uid()
    with own_places(owner=uid) as made:
        home = made.root / "home"
        home.mkdir()
        os.chown(home, uid, uid)
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
        env = {**kept, **made.env, "HOME": str(home), "USER": f"u{uid}", "LOGNAME": f"u{uid}", "TMPDIR": "/tmp"}
        yield OrdinaryUser(uid, made, home, {**env, "PYTHONDONTWRITEBYTECODE": "1"})
