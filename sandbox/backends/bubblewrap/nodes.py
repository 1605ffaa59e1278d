"""Device nodes of a sandbox that runs: others come, and those that it had go."""

import contextlib
import ctypes
import os
import re
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.backends.stage.linux import (
    AT_EMPTY_PATH,
    CLONE_NEWNS,
    SYS_MOUNT_SETATTR,
    MountAttr,
    Refused,
    attach,
    call,
    clone,
    libc,
)
from warmcell.sandbox.errors import UnsupportedOperationError

CLONE_FS = 0x200
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOEXEC = 1, 2, 8
DEV = "/dev"

_ON_THEIR_WAY = re.compile(r"^scm_fds:\s*[1-9]", re.M)
"""Files that were sent to a socket, or to one that has connected to it, and that nobody has received (Linux 5.6)."""


def change(process: int, *, add: Mapping[str, str], remove: Mapping[str, str]) -> None:
    """Change what nodes are in the /dev of a sandbox that root has made. Blocks for a moment.

    Args:
        process: A pidfd of a process of it.
        add: Place in the sandbox → node of the host.
        remove: Likewise; the host's may have gone, as those of a driver do that is loaded anew.

    Raises:
        UnsupportedOperationError: The system refuses it; the nodes are as they were.
    """
    failures: list[Exception] = []

    def work() -> None:
        try:
            _change(process, add, remove)
        except (Refused, OSError) as error:
            failures.append(error)

    # A thread that has entered another mount namespace is of no use for anything else, and ends.
    thread = threading.Thread(target=work, name="warmcell-nodes")
    thread.start()
    thread.join()
    if failures:
        raise UnsupportedOperationError(
            f"The sandbox cannot be given another GPU while it runs: {failures[0]}",
            hint="Restart the kernel with the other GPU.",
        ) from failures[0]


def identities(nodes: Collection[str]) -> Sequence[os.stat_result]:
    """What these nodes of the host are; one that has gone is nobody's."""
    found = []
    for node in nodes:
        with contextlib.suppress(OSError):
            found.append(os.stat(node))
    return found


def user_of(devices: Sequence[os.stat_result], processes: Callable[[], Collection[int]]) -> int | None:
    """A process that has one of these `identities` open, or maps it; None if there is none. Blocks.

    Which files are on their way in a socket is told to nobody, but that some are: whoever has such a socket counts.
    """
    numbers = {one.st_rdev for one in devices}
    mapped = {f"{os.major(one.st_dev):02x}:{os.minor(one.st_dev):02x} {one.st_ino}" for one in devices}
    seen: set[tuple[int, int]] = set()
    while devices and (more := _threads(processes()) - seen):  # Some may come while it is looked.
        looked: set[int] = set()  # Memory is one for all threads of a process, descriptors need not be.
        for pid, thread in more:
            maps = [] if pid in looked else _maps(pid, thread)
            if maps:
                looked.add(pid)
            if _has(pid, thread, numbers) or any(line in mapped for line in maps):
                return pid
        seen |= more
    return None


def _threads(processes: Collection[int]) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for pid in processes:
        with contextlib.suppress(OSError):  # It has ended.
            found.update((pid, int(thread)) for thread in os.listdir(f"/proc/{pid}/task"))
    return found


def _has(pid: int, thread: int, devices: Collection[int]) -> bool:
    place = f"/proc/{pid}/task/{thread}"
    with contextlib.suppress(OSError):
        for name in os.listdir(f"{place}/fd"):
            with contextlib.suppress(OSError):
                one = os.stat(f"{place}/fd/{name}")
                if stat.S_ISCHR(one.st_mode) and one.st_rdev in devices:
                    return True
                if stat.S_ISSOCK(one.st_mode) and _ON_THEIR_WAY.search(Path(f"{place}/fdinfo/{name}").read_text()):
                    return True
    return False


def _maps(pid: int, thread: int) -> Sequence[str]:
    """Device and inode of each file that is mapped; nothing of a thread that has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/task/{thread}/maps").read_text(errors="replace").splitlines()
        return [" ".join(line.split(maxsplit=5)[3:5]) for line in lines]
    return []


def _change(process: int, add: Mapping[str, str], remove: Mapping[str, str]) -> None:
    trees: dict[str, int] = {}
    try:
        # Those that go too: they come back if another one cannot go.
        for place, node in {**add, **remove}.items():
            if place not in add and not os.path.exists(node):
                continue
            trees[place] = clone(node)
            _set(trees[place], add=MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC)
        call("leave what threads share", libc.unshare(CLONE_FS))
        os.umask(0o022)  # This thread's own by now; the keeper's lets nobody into what it makes.
        call("enter the sandbox", libc.setns(process, CLONE_NEWNS))
        dev = os.open(DEV, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # It is root's, and nobody in there is root: what is written meanwhile is written here.
            _set(dev, clear=MOUNT_ATTR_RDONLY)
            try:
                _swap(trees, add, remove)
            finally:
                _set(dev, add=MOUNT_ATTR_RDONLY)
        finally:
            os.close(dev)
    finally:
        for tree in trees.values():
            os.close(tree)


def _swap(trees: dict[str, int], add: Iterable[str], remove: Iterable[str]) -> None:
    added: list[str] = []
    gone: list[str] = []
    try:
        for place in add:
            _put(trees, place)
            added.append(place)
        for place in remove:
            gone.append(place)
            _take_away(place)
    except BaseException:
        for place in added:
            _take_away(place)
        for place in gone:
            if place in trees and not os.path.lexists(place):
                _put(trees, place)
        raise


def _put(trees: dict[str, int], place: str) -> None:
    Path(place).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    attach(trees.pop(place), place)


def _take_away(place: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISCHR(os.stat(place, follow_symlinks=False).st_mode):
            call(f"take {place} away", libc.umount2(os.fsencode(place), MNT_DETACH))
        os.unlink(place)


def _set(mounted: int, *, add: int = 0, clear: int = 0) -> None:
    attributes = MountAttr(add, clear, 0, 0)
    result = libc.syscall(
        SYS_MOUNT_SETATTR, mounted, b"", AT_EMPTY_PATH, ctypes.byref(attributes), ctypes.sizeof(attributes)
    )
    call("change a mount", result)
