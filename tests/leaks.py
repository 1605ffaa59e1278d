"""What a test may leave behind: nothing of ours.

Each test has runtime, state and lease directories of its own below one short, uniquely named directory. Whatever
belongs to the test can be told by that name: a process has it in its environment, its arguments or its mounts.
"""

import fcntl
import itertools
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests import groups

GRACE_S = 60.0
"""How long what is ending may take; a sandbox's processes die asynchronously with their keeper."""

GROUPS = [groups.EVERYWHERE]
"""Where control groups of this run can be; `groups.enter` narrows it."""

_OF_A_TEST = re.compile(r"/wc-\w+/")
_HELPERS_OF_PYTHON = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


@dataclass(frozen=True, slots=True)
class Places:
    """The directories of one test."""

    root: Path
    runtime: Path = field(init=False)
    state: Path = field(init=False)
    leases: Path = field(init=False)

    def __post_init__(self) -> None:
        for name, letter in (("runtime", "r"), ("state", "s"), ("leases", "l")):
            object.__setattr__(self, name, self.root / letter)

    @property
    def env(self) -> Mapping[str, str]:
        """The variables that point Warmcell, and Jupyter, at these directories."""
        return {
            "WARMCELL_RUNTIME_DIR": str(self.runtime),
            "WARMCELL_STATE_DIR": str(self.state),
            "WARMCELL_LEASE_DIR": str(self.leases),
            "JUPYTER_RUNTIME_DIR": str(self.root / "jupyter" / "runtime"),
            "JUPYTER_DATA_DIR": str(self.root / "jupyter" / "data"),
            "JUPYTER_CONFIG_DIR": str(self.root / "jupyter" / "config"),
            "IPYTHONDIR": str(self.root / "ipython"),
        }


Started = tuple[int, str]
"""A process by its number and the time at which it was started."""


class LeakError(AssertionError):
    """Something of ours outlived what made it."""


@contextmanager
def own_places(*, owner: int | None = None, grace_s: float = GRACE_S) -> Iterator[Places]:
    """Directories for a test (or a module of tests), checked for leaks and removed at the end.

    Args:
        owner: uid that the directories belong to; the caller's if None.
        grace_s: Seconds that processes, mounts and cgroups may still need to go away.

    Raises:
        LeakError: Something that was made meanwhile is still there.
    """
    places = Places(Path(tempfile.mkdtemp(prefix="wc-", dir="/tmp")))
    try:
        for path in (places.runtime, places.state, places.leases):
            path.mkdir(mode=0o700)
        if owner is not None:
            for path in (places.root, places.runtime, places.state, places.leases):
                os.chown(path, owner, owner)
        others = _strangers()
        before = traces(places, others)
        yield places
        _wait_until_gone(places, before, others, grace_s)
        left = leftover_files(places)
        if left:
            raise LeakError("files are left: " + ", ".join(left))
    finally:
        if not any(places.root.name in mount for mount in _mounts(places)):  # Else what is mounted would be emptied.
            shutil.rmtree(places.root, ignore_errors=True)


def traces(places: Places, others: frozenset[Started] = frozenset()) -> frozenset[str]:
    """Processes, mounts and cgroups on this machine that can belong to `places`, one line each.

    Args:
        places: A test's directories.
        others: Processes that are known to have nothing to do with them.
    """
    ours = _processes(places, others)
    return frozenset({*ours.values(), *_mounts(places), *_cgroups(set(ours))})


def leftover_files(places: Places) -> list[str]:
    """Files that nothing uses any more, or leases that somebody still holds; paths relative to the test's root."""
    found: list[str] = []
    for path in sorted(places.runtime.rglob("*")):
        mode = path.lstat().st_mode
        if not stat.S_ISDIR(mode) and path.name != "keeper.lock":
            found.append(str(path.relative_to(places.root)))
    for kind in ("s", "k"):
        directory = places.runtime / kind
        if directory.is_dir():
            found += [f"{path.relative_to(places.root)}/" for path in sorted(directory.iterdir()) if path.is_dir()]
    found += [f"{path.relative_to(places.root)} (held)" for path in sorted(places.leases.glob("*")) if _held(path)]
    return found


def _wait_until_gone(places: Places, before: frozenset[str], others: frozenset[Started], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    while left := traces(places, others) - before:
        if time.monotonic() > deadline:
            raise LeakError("left behind:\n  " + "\n  ".join(sorted(left)))
        time.sleep(0.02)


def _strangers() -> frozenset[Started]:
    """Processes that are there before a test and no descendants of this one: none has heard of its directory."""
    fields = {pid: _fields(pid) for pid in _pids()}
    parents = {pid: int(found[1]) for pid, found in fields.items() if found}
    return frozenset((pid, found[19]) for pid, found in fields.items() if found and not _descends(pid, parents))


def _processes(places: Places, others: frozenset[Started]) -> dict[int, str]:
    """Descendants of this process, and whoever mentions the test's directory."""
    token = places.root.name.encode()
    own_mounts = os.readlink("/proc/self/ns/mnt")
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    named: set[int] = set()
    for pid in _pids():
        fields = _fields(pid)
        if not fields or (pid, fields[19]) in others:
            continue
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
            foreign = os.readlink(f"/proc/{pid}/ns/mnt") != own_mounts
        except OSError:
            continue  # It ended while we looked, or is somebody else's.
        said = arguments.replace(bytes(1), b" ").decode(errors="replace").strip()
        parents[pid] = int(fields[1])
        lines[pid] = f"process {pid} (started at {fields[19]}): {said or 'ended, not waited for'}"
        read = _read(f"/proc/{pid}/environ") + (_read(f"/proc/{pid}/mountinfo") if foreign else b"")
        if token in arguments or token in read:
            named.add(pid)
    return {
        pid: line
        for pid, line in lines.items()
        if (pid in named or _descends(pid, parents)) and not any(name in line for name in _HELPERS_OF_PYTHON)
    }


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]


def _fields(pid: int) -> list[str]:
    """Of `stat`, from the state on; none where it has ended."""
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].decode().split()


def _descends(pid: int, parents: Mapping[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _mounts(places: Places) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if places.root.name in line or ("warmcell" in line.split(" - ")[0] and not _OF_A_TEST.search(line)):
            yield f"mount {line}"


def _cgroups(ours: set[int]) -> Iterator[str]:
    """Control groups of ours that hold processes of this test, or none and no living stranger made them.

    Others' tests may run beside it. A group's name tells who made it: `warmcell-PID.STARTED-…`.
    """
    for directory, names, _ in itertools.chain.from_iterable(map(os.walk, GROUPS)):
        for name in names:
            if name.startswith("warmcell"):
                path = Path(directory, name)
                try:
                    inside = {int(pid) for file in path.rglob("cgroup.procs") for pid in _read(str(file)).split()}
                except OSError:
                    continue  # It went while we looked.
                if inside & ours or not (inside or _made_by_stranger(name, ours)):
                    yield f"cgroup {path}"
        names[:] = [name for name in names if not name.startswith("warmcell")]


def _made_by_stranger(name: str, ours: set[int]) -> bool:
    maker = re.match(r"warmcell-(\d+)\.(\d+)-", name)
    if maker is None or int(maker[1]) in ours or int(maker[1]) == os.getpid():
        return False
    return _read(f"/proc/{maker[1]}/stat").rpartition(b")")[2].split()[19:20] == [maker[2].encode()]


def _held(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
