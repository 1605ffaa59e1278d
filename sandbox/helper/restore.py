"""Bringing kernels back, each in a fresh sandbox."""

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


class Source:
    """An image that clones are restored from: checked and read when the first is begun, until none is under way."""

    def __init__(self, program_: Program, shelf: Shelf, image: str, *, nothing: int, cache: bytes) -> None:
        """Configure it; nothing is looked at yet.

        Args:
            program_: Which criu.
            shelf: Where the image is.
            image: Its id.
            nothing: An empty directory.
            cache: What criu knows of this kernel of the machine.
        """
        self.program, self.image, self.nothing = program_, image, nothing
        self._shelf, self._cache = shelf, cache
        self._users = 0
        self._found: Image | None = None
        self._pins: list[tuple[str, list[int], str]] = []
        self._allowed: list[Mapping[str, Any]] = []

    def take(self, told: Callable[[int, int], None]) -> Image:
        """Hold the image for one more clone; `let_go` has to follow.

        Args:
            told: Where memory is compressed, of how far that is undone.

        Raises:
            HelperError: It does not fit or is damaged.
        """
        if self._found is None:
            found = packing.opened(self._shelf, self.image, told=told)
            try:
                check_machine(found.about, self.program.version)
                self._pins = _pins(found)
            except BaseException:
                found.close()
                raise
            self._found, self._allowed = found, []
        self._users += 1
        return self._found

    def let_go(self) -> None:
        """One clone less. What nobody uses may be removed or changed, and is checked anew before the next one."""
        self._users -= 1
        if self._users == 0 and self._found is not None:
            self._found.close()
            self._found = None

    def check_rights(self, place: Place) -> None:
        """That a restore gives nobody more than the sandbox's own guest has.

        Raises:
            HelperError: It would.
        """
        assert self._found is not None
        rights = guest_rights(place)
        if rights in self._allowed:
            return
        try:
            credentials.check(Path(self._found.path), **rights)
        except ImageError as error:
            raise HelperError(error.code, error.message, hint=error.hint) from error
        self._allowed.append(rights)

    @contextlib.contextmanager
    def shows(self) -> Iterator[Callable[[], None]]:
        """What puts into a sandbox, from within, what the image maps; to be called in a fork of this process."""
        assert self._found is not None
        about, trees = self._found.about, list[int]()
        try:
            pages: dict[str, int] = {}
            # By the name that stays: criu takes a mapped file whose name is gone for a deleted one.
            for name in about["memory"]:
                trees.append(linux.clone_mount(self._shelf.pages.place(name)))
                linux.change_mount(
                    trees[-1], add=linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
                )
                pages[name] = trees[-1]
            pins: list[tuple[str, list[int], int]] = []
            for path, known, kept in self._pins:
                if kept:
                    trees.append(linux.clone_mount(kept))
                    linux.change_mount(trees[-1], add=linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID)
                pins.append((path, known, trees[-1] if kept else -1))

            def prepare() -> None:
                view.make_room(self._cache)
                view.show_pages(pages)
                view.cover(pins)
                view.check_open(about["open"])

            yield prepare
        finally:
            for tree in trees:
                os.close(tree)


class Restoring:
    """One clone under way, by steps of which none waits, so that a process can look after several."""

    def __init__(self, source: Source, place: Place, *, told: Callable[[int, int], None]) -> None:
        """Begin to enter its sandbox.

        Args:
            source: What it is a clone of.
            place: Its sandbox; closed in the end.
            told: See `Source.take`.

        Raises:
            HelperError: It does not fit, or may not be restored there. Nothing was started.
        """
        self._began = time.perf_counter()
        self._source, self._place = source, place
        self._run: Run | None = None
        self._work, self._code = -1, -1
        self._prepared_s = 0.0
        self._about: Mapping[str, Any] = {}
        self._held = self._done = False
        self._others = set(place.processes())
        self.deadline = time.monotonic() + criu.RESTORE_TIMEOUT_S
        """Of its present step, on that clock."""
        try:
            found = source.take(told)
            self._held, self._about = True, found.about
            # In memory: a directory on disk takes milliseconds to make and to remove, in each restore.
            self._work = linux.memory_directory(size_bytes=LOG_BYTES)
            with source.shows() as prepare:
                self._run = criu.start(
                    source.program,
                    place,
                    "restore",
                    ["--restore-detached"],
                    images=found.fd,
                    work=self._work,
                    nothing=source.nothing,
                    last_pid=max(dump.FIRST_PID, int(found.about["last_pid"])),
                    prepare=prepare,
                )
            source.check_rights(place)
            self.deadline = time.monotonic() + enter.WORK_TIMEOUT_S
        except BaseException:
            self.end()
            raise

    @property
    def waits(self) -> int:
        """A descriptor that can be read as soon as `step` would not wait."""
        assert self._run is not None
        return self._run.waits

    def step(self) -> dict[str, Any] | None:
        """Do what comes next; what is said to the caller once it goes on, else None.

        Raises:
            HelperError: It failed; `end` removes what there is of it.
            OSError: Likewise.
        """
        assert self._run is not None
        if not self._prepared_s:
            try:
                self._run.go()
            except OSError as error:
                raise full(error, "the sandbox's own room") or error from error
            self._prepared_s = time.perf_counter()
            self.deadline = time.monotonic() + criu.RESTORE_TIMEOUT_S
            self._run.join()
            return None
        self._code = self._run.end()
        if self._code != 0:
            raise criu.explain(self._work, "restore", self._code)
        restored_s = time.perf_counter()
        host_pid = _set_going(self._place, int(self._about["pid"]), set(self._about["stopped"]))
        self._done = True
        steps = {"prepare": self._prepared_s - self._began, "restore": restored_s - self._prepared_s}
        return {
            "pid": self._about["pid"],
            "host_pid": host_pid,
            "ms": {name: round(1e3 * seconds, 1) for name, seconds in steps.items()},
        }

    def late(self) -> HelperError:
        """That its deadline is over."""
        timeout_s = criu.RESTORE_TIMEOUT_S if self._prepared_s else enter.WORK_TIMEOUT_S
        what = "CRIU" if self._prepared_s else "Work inside the sandbox"
        return HelperError("timeout", f"{what} did not finish in {timeout_s:.0f} s", details={"timeout": timeout_s})

    def end(self) -> None:
        """Let go of all; nothing is left of a clone that does not go on. To be called once."""
        if self._run is not None:
            self._run.end()
            if not self._done:
                _end_half_restored(self._place, set(self._about["pids"]), spared=self._others)
        if self._work >= 0:
            os.close(self._work)
        if self._held:
            self._source.let_go()
        self._place.close()


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


def _pins(image: Image) -> list[tuple[str, list[int], str]]:
    """Of each library that it maps: path, what it was, and what was kept of it where the machine has another now."""
    pins: list[tuple[str, list[int], str]] = []
    for path, (inode, size, changed_ns, name) in image.about["pinned"].items():
        kept = ""
        if name and not _is_on_host(path, inode, size, changed_ns):
            found = os.stat(f"{image.path}/{PINNED}/{name}")
            if [found.st_size, found.st_mtime_ns] == [size, changed_ns]:
                kept = f"{image.path}/{PINNED}/{name}"
        pins.append((path, [inode, size, changed_ns], kept))
    return pins


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


def _end_half_restored(place: Place, guest_pids: set[int], *, spared: set[int]) -> None:
    """Kill what there is of the tree, but not who was there before, perhaps with a number that the tree needs.

    Who comes later has a higher one than any of the tree, as that is set before criu begins.
    """
    for pid in place.processes():
        if pid not in spared and guest_pid_of(pid) in guest_pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
