"""Saving a kernel: its tree is stopped, written by criu, and goes on or ends when the caller has the layer as well."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import time
from pathlib import Path

from warmcell.sandbox.helper import copying, criu, enter, held, parted, program, view
from warmcell.sandbox.helper.enter import Cancelled
from warmcell.sandbox.helper.images import lazy
from warmcell.sandbox.helper.images.errors import ImageError
from warmcell.sandbox.helper.places import field, guest_pid_of, status
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.shelf import MEMORY, PINNED, full
from warmcell.sandbox.helper.tree import AT_REST_S, Guardian, Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from warmcell.sandbox.helper.places import Place
    from warmcell.sandbox.helper.program import Program
    from warmcell.sandbox.helper.shelf import Draft, Shelf

PARTED_TIMEOUT_S = 5.0
"""How long a kernel may take to see that its clients have gone."""
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
REMAPS = "remap-fpath.img"
"""What criu writes of files whose names are gone: some of them get others."""
OVERCOMMIT = "/proc/sys/vm/overcommit_memory"
STRICT = "2"
FIRST_PID = 1000
"""Kernels have numbers from here on, since what restores them has small ones."""
FIRST_PID_OF_TEMPLATES = 20_000
"""Theirs are used again by each kernel that comes from them, also in sandboxes where others have run."""


def enroll(place: Place, cache: bytes, *, template: bool) -> None:
    """Make the sandbox one whose kernels can be saved, as templates or for themselves."""
    least = FIRST_PID_OF_TEMPLATES if template else FIRST_PID
    fd = os.open(enter.LAST_PID, os.O_RDWR | os.O_CLOEXEC)

    def work() -> None:
        view.make_room(cache)
        # The number belongs to the pid namespace of whoever reads and writes, not to the /proc that it was opened in.
        if int(os.pread(fd, 32, 0)) < least:
            os.pwrite(fd, str(least).encode(), 0)

    try:
        enter.do(place, work, namespaces=("mnt", "pid"))
    finally:
        os.close(fd)


def dump(
    program_: Program,
    shelf: Shelf,
    place: Place,
    *,
    image: str,
    guest_pid: int,
    then: str,
    nothing: int,
    cache: bytes,
    frozen: Callable[[bool], None],
    saved: Callable[[Draft, dict[str, Any]], None],
    stopped: Callable[[], None] | None = None,
    reader: tuple[int, int] = (0, 0),
) -> Draft:
    """Save the kernel; returns the image, which has its name.

    Args:
        program_: Which criu.
        shelf: Where the image goes.
        place: The kernel's sandbox.
        image: Id of the image.
        guest_pid: The kernel, as the guest numbers it.
        then: "go_on" or "stop".
        nothing: An empty directory.
        cache: What criu knows of this kernel of the machine.
        frozen: Tells the caller that the tree is stopped, and whether criu has given files further names since, and
            returns when the caller has its layer.
        saved: Tells the caller of the image, all of which is there. A kernel that is to end ends after that: until it
            is said, the caller cannot know whether there is an image, and takes the kernel to live. Raises nothing.
        stopped: Tells the caller that the tree is stopped before its memory is written, if that is of use.
        reader: uid and gid of the caller, with whose rights files of the host are kept.

    Raises:
        HelperError: It cannot be saved; the kernel runs on and there is no image.
        Cancelled: The caller has gone; likewise.
    """
    kernel = place.find(guest_pid)
    who = _user(kernel)
    tree = Tree(place, kernel)
    try:
        draft = shelf.draft(image)
    except OSError as error:
        raise full(error, "the image directory") or error from error
    keep = False
    guardian = Guardian(tree)
    dismissed = False
    running: enter.Run | None = None
    code = nowhere = -1
    try:
        began = time.perf_counter()
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        running = criu.start(
            program_,
            place,
            "dump",
            ["-t", str(guest_pid), "--leave-stopped"],
            images=draft.fd,
            work=draft.fd,
            nothing=nothing,
            user=criu.dump_user(*who),
            held=[guardian.held],
            needs=[nowhere],
            prepare=lambda: view.make_room(cache),
        )
        parted.wait(tree.pids(), timeout_s=PARTED_TIMEOUT_S)
        tree.stop()
        stopped_ms = 1e3 * (time.perf_counter() - began)
        guardian.renew()
        if copying.is_first(tree.pids()):
            copying.divert(draft.fd, nowhere)
        running.go()
        if stopped is not None:
            stopped()
        if not shelf.pages.spare.is_there():
            with contextlib.suppress(OSError, HelperError):
                shelf.pages.renew_spare()  # While criu is at work: perhaps one of the files that go is of use.
        code = running.wait(timeout_s=criu.DUMP_TIMEOUT_S, needed=tree.is_whole)
        dumped_ms = 1e3 * (time.perf_counter() - began)
        if code != 0:
            raise criu.explain(draft.fd, "dump", code)
        tree.require_stopped(timeout_s=AT_REST_S)
        pids = tree.pids()
        copying.fill(draft.path, {guest_pid_of(pid): pid for pid in pids}, spare=shelf.pages.spare)
        copied_ms = 1e3 * (time.perf_counter() - began) - dumped_ms
        found = held.collect(pids)
        for name, inode in found.pages.items():
            shelf.pages.require(name, inode)
        about = {
            "created_at": time.time(),
            "engine": "criu",
            "criu": program_.version,
            "linux": program.release(),
            "cpu": program.flags(),
            "pid": guest_pid,
            "pids": [guest_pid_of(pid) for pid in pids],
            "last_pid": max(_last_number(pid) for pid in pids),
            "user": list(who),
            "memory_bytes": sum(_resident_bytes(pid) for pid in pids),
            "stopped": [guest_pid_of(pid) for pid in pids if pid in tree.stopped_before],
            "open": found.open,
        }
        renamed = os.path.exists(f"{draft.path}/{REMAPS}")
        frozen(renamed)
        tree.require_stopped()
        if then != "stop":
            tree.thaw()
            guardian.dismiss()
            dismissed = True
        thawed_ms = 1e3 * (time.perf_counter() - began)
        if renamed and then != "stop":
            folders = sorted({"/dev/shm", *found.folders})
            enter.do(place, lambda: view.sweep(folders))
        _remove_logs(draft)
        edited_at = time.perf_counter()
        about["lazy"] = _edit(draft)
        edited_ms = 1e3 * (time.perf_counter() - edited_at)
        for name in (MEMORY, PINNED):
            os.makedirs(f"{draft.path}/{name}", 0o700, exist_ok=True)
        about["pinned"] = held.pin(
            found.mapped, f"{draft.path}/{PINNED}", pins=shelf.pins, reader=reader, code=found.code
        )
        needed = lazy.page_files(Path(draft.path))
        draft.commit(about, old_pages={name: inode for name, inode in found.pages.items() if name in needed})
        keep = True
        ms = {
            "stop": stopped_ms,
            "dump": dumped_ms,
            "copy": copied_ms,
            "frozen": thawed_ms,
            "edit": edited_ms,
            "all": 1e3 * (time.perf_counter() - began),
        }
        told = {
            "memory_bytes": about["memory_bytes"],
            "pids": about["pids"],
            "versions": {
                "engine": "criu",
                "criu": program_.version,
                "linux": program.release(),
                "cpu": " ".join(program.flags()),
            },
            "ms": {name: round(value, 1) for name, value in ms.items()},
        }
        ending = tree.handles() if then == "stop" else []
        saved(draft, told)
        for handle in ending:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
    except OSError as error:
        shelf.pages.spare.discard()  # It may be what has filled the disk.
        raise full(error, "the image directory") or error from error
    finally:
        if running is not None:
            running.end()
        if nowhere >= 0:
            os.close(nowhere)
        if not keep:
            tree.thaw(repair=code != 0)
        if not dismissed:
            guardian.dismiss()
        guardian.wait()
        if not keep:
            draft.close(keep=False)
    return draft


def wait_for_thaw(caller: int, read: Callable[[], bool], *, timeout_s: float) -> None:
    """Wait for the caller's word.

    Raises:
        Cancelled: The caller has gone.
        HelperError: It takes too long.
    """
    waiting = select.poll()
    waiting.register(caller, select.POLLIN | select.POLLRDHUP)
    if not waiting.poll(1e3 * timeout_s):
        raise HelperError("timeout", "The writable layer was not saved in time", details={"timeout": timeout_s})
    if not read():
        raise Cancelled


def _user(pid: int) -> tuple[int, int]:
    found = status(pid)
    if not found:
        raise HelperError("conflict", "The kernel has ended", hint="Start it anew.")
    return int(found["Uid"].split()[0]), int(found["Gid"].split()[0])


def _resident_bytes(pid: int) -> int:
    return int((field(pid, "VmRSS") or "0").split()[0]) * 1024


def _last_number(pid: int) -> int:
    """The highest number of its threads, as the guest counts."""
    threads: Sequence[str] = ()
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{pid}/task")
    return max((guest_pid_of_thread(pid, thread) for thread in threads), default=0)


def guest_pid_of_thread(pid: int, thread: str) -> int:
    """A thread's number in its innermost pid namespace."""
    return int((field(f"{pid}/task/{thread}", "NSpid") or "0").split()[-1])


def _edit(draft: Draft) -> bool:
    """Let restores map the memory instead of copying it, where that can be."""
    if os.environ.get(program.PLAIN_VARIABLE) or not _reservations_are_known():
        return False
    name = "".join(secrets.choice(ALPHABET) for _ in range(12))
    try:
        edited = lazy.edit(Path(draft.path), page_file=name, durable=False)
    except ImageError as error:
        raise HelperError(error.code, error.message, hint=error.hint) from error
    draft.reopen()
    return edited.lazy


def _reservations_are_known() -> bool:
    """Whether areas of allocators that count on zeros can be told: where all memory is accounted, none is marked."""
    with contextlib.suppress(OSError), open(OVERCOMMIT) as file:
        return file.read().strip() != STRICT
    return True


def _remove_logs(draft: Draft) -> None:
    for name in ("dump.log", "stats-dump"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=draft.fd)
