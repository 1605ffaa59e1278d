"""Bringing a kernel back in a fresh sandbox."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from warmcell.sandbox.helper import criu, dump, enter, linux, packing, program, view
from warmcell.sandbox.helper.images import credentials
from warmcell.sandbox.helper.images.errors import ImageError
from warmcell.sandbox.helper.places import children, guest_pid_of, status
from warmcell.sandbox.helper.problems import HelperError, incompatible
from warmcell.sandbox.helper.shelf import PINNED, full

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    from warmcell.sandbox.helper.enter import Run
    from warmcell.sandbox.helper.places import Place
    from warmcell.sandbox.helper.program import Program
    from warmcell.sandbox.helper.shelf import Image, Shelf

LOG_BYTES = 16 << 20


def restore(
    program_: Program,
    shelf: Shelf,
    place: Place,
    *,
    image: str,
    nothing: int,
    cache: bytes,
    caller: int,
    told: Callable[[int, int], None],
) -> dict[str, Any]:
    """Restore an image; returns what is said to the caller. Where memory is compressed, `told` how far that is undone.

    Raises:
        HelperError: It does not fit or is damaged, and nothing was started; or criu failed, and nothing is left of it.
        Cancelled: The caller has gone; likewise.
    """
    began = time.perf_counter()
    found = packing.opened(shelf, image, told=told)
    try:
        about = found.about
        check_machine(about, program_.version)
        with _room_for_log() as work:
            code = -1
            running = criu.start(
                program_,
                place,
                "restore",
                ["--restore-detached"],
                images=found.fd,
                work=work,
                nothing=nothing,
                last_pid=max(dump.FIRST_PID, int(about["last_pid"])),
                prepare=_shows(shelf, found, cache),
            )
            try:
                _check_rights(found, place)
                _go(running)
                prepared = time.perf_counter()
                code = running.wait(timeout_s=criu.RESTORE_TIMEOUT_S, caller=caller)
            finally:
                running.end()
                if code != 0:
                    _end_half_restored(place, set(about["pids"]))
            if code != 0:
                raise criu.explain(work, "restore", code)
            restored = time.perf_counter()
            host_pid = _set_going(place, int(about["pid"]), set(about["stopped"]))
    finally:
        found.close()
    steps = {"prepare": prepared - began, "restore": restored - prepared}
    return {
        "pid": about["pid"],
        "host_pid": host_pid,
        "ms": {name: round(1e3 * seconds, 1) for name, seconds in steps.items()},
    }


@contextlib.contextmanager
def _room_for_log() -> Iterator[int]:
    """In memory: a directory on disk takes milliseconds to make and to remove, in each restore."""
    work = linux.memory_directory(size_bytes=LOG_BYTES)
    try:
        yield work
    finally:
        os.close(work)


def _go(running: Run) -> None:
    try:
        running.go()
    except OSError as error:
        raise full(error, "the sandbox's own room") or error from error


def check_machine(about: Mapping[str, Any], version: str) -> None:
    """That this machine can go on where the one that wrote the image stopped.

    Raises:
        HelperError: It cannot.
    """
    if about["criu"].split(".")[:2] != version.split(".")[:2]:
        raise incompatible("CRIU", about["criu"], version, hint="Install the version that it was made with.")
    if about["linux"].split(".")[:2] != program.release().split(".")[:2]:
        raise incompatible("Linux", about["linux"], program.release(), hint="Boot the version that it was made with.")
    lacking = sorted(set(about["cpu"]) - set(program.flags()))
    if lacking:
        raise incompatible(
            "the processor", "one with " + ", ".join(lacking), "without", hint="Restore it on the machine that made it."
        )


def _check_rights(image: Image, place: Place) -> None:
    """That a restore gives nobody more than the sandbox's own guest has."""
    rights = guest_rights(place)
    try:
        credentials.check(Path(image.path), **rights)
    except ImageError as error:
        raise HelperError(error.code, error.message, hint=error.hint) from error


def guest_rights(place: Place) -> dict[str, Any]:
    """What the sandbox's guest has: the user of the process that its first one has started for it."""
    for pid in (*children(place.pid), place.pid):
        found = status(pid)
        if (found and guest_pid_of(pid) != 1) or not children(place.pid):
            uid, gid = int(found["Uid"].split()[0]), int(found["Gid"].split()[0])
            if uid == 0:
                break
            groups = tuple(map(int, found.get("Groups", "").split()))
            sealed = {"no_new_privs": found.get("NoNewPrivs") == "1", "seccomp": found.get("Seccomp") == "2"}
            return {"uid": uid, "gid": gid, "groups": groups, **sealed}
    raise HelperError("conflict", "The sandbox has no guest to restore for", hint="Create another one.")


def _shows(shelf: Shelf, image: Image, cache: bytes) -> Callable[[], None]:
    """What puts into the sandbox, from within, what the image maps."""
    # By the name that stays: criu takes a mapped file whose name is gone for a deleted one.
    pages = {name: linux.clone_mount(shelf.pages.place(name)) for name in image.about["memory"]}
    for tree in pages.values():
        linux.change_mount(tree, add=linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV)
    pins: list[tuple[str, list[int], int]] = []
    for path, (inode, size, changed_ns, name) in image.about["pinned"].items():
        tree = -1
        if name and not _is_on_host(path, inode, size, changed_ns):
            kept = f"{image.path}/{PINNED}/{name}"
            now = os.stat(kept)
            if [now.st_size, now.st_mtime_ns] == [size, changed_ns]:
                tree = linux.clone_mount(kept)
                linux.change_mount(tree, add=linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID)
        pins.append((path, [inode, size, changed_ns], tree))

    def prepare() -> None:
        view.make_room(cache)
        view.show_pages(pages)
        view.cover(pins)
        view.check_open(image.about["open"])

    return prepare


def _is_on_host(path: str, inode: int, size: int, changed_ns: int) -> bool:
    """Whether the file that was mapped is still at its place; then the sandbox most likely sees it as well."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return [found.st_ino, found.st_size, found.st_mtime_ns] == [inode, size, changed_ns]
    return False


def _set_going(place: Place, guest_pid: int, stopped: set[int]) -> int:
    """It was stopped when it was saved, so it is stopped now; what its own user had stopped stays so. Its host pid."""
    tree = list(place.processes(place.find(guest_pid)))
    enter.hold_limits(place, tree)
    for pid in tree:
        if guest_pid_of(pid) not in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    return tree[0]


def _end_half_restored(place: Place, guest_pids: set[int]) -> None:
    """Kill what a criu that failed, or was killed, has left of the tree."""
    for pid in place.processes():
        if guest_pid_of(pid) in guest_pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
