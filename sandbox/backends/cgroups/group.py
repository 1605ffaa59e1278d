"""One sandbox's control group, as directories and files."""

import asyncio
import contextlib
import errno
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.backends.processes import keeper_mark, start_time
from warmcell.sandbox.models import SandboxId

PREFIX = "warmcell-"
PERIOD_US = 100_000
QUOTA_MIN_US = 1000


class Cgroup:
    """The control group, or the groups under version 1, of one sandbox."""

    prefix: Sequence[str] = ()
    """Command that starts a process in it, where a process cannot enter it by itself."""
    env: Mapping[str, str] = {}
    """What that command needs in its environment."""

    def __init__(self, directories: Mapping[str, Path], version: int) -> None:
        self._directories = dict(directories)
        self._version = version

    @property
    def directories(self) -> Sequence[Path]:
        """Its directories, each once."""
        return list(dict.fromkeys(self._directories.values()))

    @property
    def entrances(self) -> Sequence[Path]:
        """Files into which a process writes 0 to join."""
        return [directory / "cgroup.procs" for directory in self.directories]

    def started(self, pid: int) -> None:
        """Told whom `prefix` has started, where there is a prefix. Blocks."""

    def set(self, controller: str, value: float) -> None:
        """Limit something. Blocks.

        Raises:
            OSError: The kernel refuses it.
        """
        directory = self._directories[controller]
        for file, content in settings(controller, value, self._version).items():
            if file.startswith("?"):
                with contextlib.suppress(OSError):
                    write(directory / file[1:], content)
            else:
                write(directory / file, content)

    def pids(self) -> tuple[int, ...]:
        """Who is in it."""
        return tuple(sorted({pid for directory in self.directories for pid in members(directory)}))

    def oom_kills(self) -> int:
        """How many of its processes were killed for memory; 0 where no memory group is."""
        return counter(Path(self.events()), "oom_kill") if "memory" in self._directories else 0

    def events(self) -> str:
        """The file that counts them, which anybody may read; empty where no memory group is."""
        directory = self._directories.get("memory")
        name = "memory.events" if self._version == 2 else "memory.oom_control"
        return "" if directory is None else str(directory / name)

    def kill(self) -> None:
        """Kill all members, with version 2 those included that are being started meanwhile."""
        for directory in self.directories:
            try:
                write(directory / "cgroup.kill", "1")
                continue
            except OSError:  # An older kernel, version 1, or the group is gone.
                pass
            for pid in members(directory):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)

    async def remove(self) -> None:
        """Kill all members and remove it. Idempotent; waits as long as members do not die."""
        pause_s = 0.001
        while not await asyncio.to_thread(self.remove_now):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)

    def remove_within(self, timeout: float) -> bool:
        """`remove`, for who has no event loop; False if members are left after `timeout` seconds. Blocks."""
        deadline = time.monotonic() + timeout
        while not self.remove_now():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def remove_now(self) -> bool:
        """Try to remove it, killing members that are in the way; False if some are not gone yet. Blocks."""
        gone = True
        for directory in self.directories:
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                    raise
                self.kill()
                gone = False
        return gone


def name_for(sandbox_id: SandboxId) -> str:
    """Says whose it is, so that what a killed keeper leaves can be told from what another one has."""
    return f"{PREFIX}{keeper_mark()}-{sandbox_id}"


def leftovers(parents: Sequence[Path]) -> list[Cgroup]:
    """Groups whose keeper is gone. Blocks."""
    found = []
    for parent in parents:
        for directory in sorted(parent.glob(f"{PREFIX}*")):
            owner, _, _ = directory.name.removeprefix(PREFIX).partition("-")
            pid, _, began = owner.partition(".")
            if pid.isdigit() and began.isdigit() and start_time(int(pid)) != int(began):
                found.append(Cgroup({"": directory}, 2 if (directory / "cgroup.controllers").exists() else 1))
    return found


def settings(controller: str, value: float, version: int) -> dict[str, str]:
    """File to content; a leading ? marks those that not every kernel has."""
    quota = max(QUOTA_MIN_US, int(value * PERIOD_US))
    if controller == "memory" and version == 2:
        return {"memory.max": str(int(value)), "?memory.swap.max": "0"}
    if controller == "memory":
        return {"memory.limit_in_bytes": str(int(value)), "?memory.memsw.limit_in_bytes": str(int(value))}
    if controller == "pids":
        return {"pids.max": str(int(value))}
    if version == 2:
        return {"cpu.max": f"{quota} {PERIOD_US}"}
    return {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(quota)}


def members(directory: Path) -> list[int]:
    """Host pids in a group; none where it is gone."""
    try:
        return [int(pid) for pid in (directory / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def words(path: Path) -> list[str]:
    """What a file says, none where it cannot be read."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def counter(path: Path, name: str) -> int:
    """The number behind a name in a file of names and numbers."""
    return next((int(value) for key, value in itertools.pairwise(words(path)) if key == name), 0)


def write(path: Path, content: str) -> None:
    """Write a file of the kernel's, which is never made.

    Raises:
        OSError: There is none, or the kernel refuses it.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content.encode())
    finally:
        os.close(fd)
