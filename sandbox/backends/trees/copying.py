"""One copy of a tree."""

from __future__ import annotations

import errno
import os
import stat

from .entries import (
    CREATE,
    GONE,
    Refused,
    allocated,
    beneath,
    copy_data,
    entries,
    entry,
    is_whiteout,
    joined,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_BYTES = 4096
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
NO_ATTRIBUTES = frozenset({errno.ENOTSUP, errno.ENODATA, errno.EPERM, errno.EACCES})
CLOSED_MAX = 64
OPAQUE = "overlay.opaque"


class Copy:
    """One copy of a tree, from one descriptor of a directory to another, whose directory is empty."""

    def __init__(
        self,
        source: int,
        target: int,
        *,
        most_bytes: int,
        most_entries: int,
        owners: bool,
        overlay: str = "",
        base: int = -1,
        lowest: int = -1,
        onto: bool = False,
    ) -> None:
        """Prepare it.

        Args:
            source: What is copied.
            target: Where to.
            most_bytes: Cap of what the copy stands for, in whole pages.
            most_entries: Cap of files, links and directories.
            owners: Whether files keep their owners; else they are whoever's this process is.
            overlay: "user" or "trusted" where `source` is an overlay's upper layer that keeps its marks in such
                attributes.
            base: A saved layer below it, else -1.
            lowest: What lies below all layers, else -1. A mark that something was removed is left out where that is
                not there: a later overlay would list it in directories that only one of its layers has.
            onto: Whether directories of the copy may be there already; those stay as they are.
        """
        self._source, self._target, self._base, self._lowest = source, target, base, lowest
        self._hidden: tuple[str, frozenset[str]] = ("", frozenset())
        self._device = os.fstat(source).st_dev
        self._onto, self._there = onto, set[str]()
        self._bytes_left, self._entries_left = most_bytes, most_entries
        self._owners = owners
        self._marks = f"{overlay}.overlay." if overlay else ""
        self._opaque = f"{overlay}.{OPAQUE}" if overlay else ""
        self._linked: dict[tuple[int, int], str] = {}
        self._waiting: list[tuple[str, bool, bool, bool]] = []
        self._late_modes: list[tuple[str, int]] = []
        self._opened_up: list[tuple[int, int]] = []

    def run(self) -> int:
        """Copy all of it; the bytes that the copy stands for. Blocks.

        Raises:
            Refused: It holds what cannot be copied, or is larger than it may be.
            OSError: The file system refuses.
        """
        most = self._bytes_left
        try:
            self._waiting.append((".", True, self._base >= 0, False))
            while self._waiting:
                self._directory(*self._waiting.pop())
            for path, mode in reversed(self._late_modes):
                handle = beneath(self._target, path)
                os.fchmod(handle, mode)
                os.close(handle)
        finally:
            for handle, mode in self._opened_up:
                os.chmod(f"/proc/self/fd/{handle}", mode)
                os.close(handle)
        return most - self._bytes_left

    def top(self) -> None:
        """Only give the target what its source is itself: owner, mode, times, attributes."""
        self._finish(".", self._source, self._target, False)

    # Directories ------------------------------------------------------------------------------------------------

    def _directory(self, path: str, from_source: bool, from_base: bool, opaque: bool) -> None:
        """Fill one directory of the copy, which exists, and note down those that lie in it."""
        source = self._enter(self._source, path) if from_source else -1
        base = self._enter(self._base, path) if from_base else -1
        target = beneath(self._target, path)
        try:
            if source >= 0:
                opaque = opaque or self._is_opaque(source)
                if self._is_opaque(source) and base >= 0:
                    os.close(base)
                    base = -1
            if base >= 0:
                opaque = opaque or self._is_opaque(base)
            taken = set()
            if source >= 0:
                for name, found in entries(source):
                    taken.add(name)
                    below = entry(base, name) if base >= 0 else None
                    self._entry(path, name, found, source, target, below=below, opaque=opaque)
            if base >= 0:
                for name, found in entries(base):
                    if name not in taken:
                        self._kept(path, name, found, base, target)
            if (source >= 0 or base >= 0) and path not in self._there:
                self._finish(path, source if source >= 0 else base, target, opaque)
        finally:
            for handle in (source, base, target):
                if handle >= 0:
                    os.close(handle)

    def _enter(self, top: int, path: str) -> int:
        """A directory of a tree, -1 where it has vanished; one that its owner has closed is opened for the while."""
        try:
            return beneath(top, path)
        except PermissionError:
            pass
        except OSError as error:
            if error.errno in GONE:
                return -1
            raise
        try:
            handle = beneath(top, path, HANDLE | os.O_DIRECTORY)
        except OSError as error:
            if error.errno in GONE:
                return -1
            raise
        self._opened_up.append((handle, stat.S_IMODE(os.fstat(handle).st_mode)))
        if len(self._opened_up) > CLOSED_MAX:
            raise Refused("Too many directories that their owner may not read")
        os.chmod(f"/proc/self/fd/{handle}", 0o700)
        return beneath(top, path)

    def _is_opaque(self, handle: int) -> bool:
        """Whether nothing of the layers below shows through a directory."""
        if not self._opaque:
            return False
        try:
            return os.getxattr(handle, self._opaque) == b"y"
        except OSError as error:
            if error.errno in NO_ATTRIBUTES:
                return False
            raise

    def _finish(self, path: str, origin: int, target: int, opaque: bool) -> None:
        """Give a directory of the copy, when all is in it, what it is besides."""
        found = os.fstat(origin)
        mode = dict(self._opened_modes()).get((found.st_dev, found.st_ino), stat.S_IMODE(found.st_mode))
        self._attributes(origin, target)
        if opaque and self._opaque and path != ".":
            os.setxattr(target, self._opaque, b"y")
        if self._owners:
            os.fchown(target, found.st_uid, found.st_gid)
        if mode & 0o700 == 0o700 or path == ".":
            os.fchmod(target, mode)
        else:
            self._late_modes.append((path, mode))
        os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))

    def _opened_modes(self) -> Iterator[tuple[tuple[int, int], int]]:
        for handle, mode in self._opened_up:
            found = os.fstat(handle)
            yield (found.st_dev, found.st_ino), mode

    # What lies in them ------------------------------------------------------------------------------------------

    def _entry(
        self,
        path: str,
        name: str,
        found: os.stat_result,
        source: int,
        target: int,
        *,
        below: os.stat_result | None,
        opaque: bool,
    ) -> None:
        """Copy one entry of `source`, above an entry `below` of the earlier layer."""
        if self._marks and is_whiteout(found):
            if opaque or not self._hides(path, name):
                return
            self._count(0)
            os.mknod(name, 0o600 | stat.S_IFCHR, 0, dir_fd=target)
        elif found.st_dev != self._device:
            return  # What is mounted there is not the tree's own.
        elif stat.S_ISDIR(found.st_mode):
            self._count(0)
            self._make_directory(path, name, target)
            merges = below is not None and stat.S_ISDIR(below.st_mode)
            self._waiting.append((joined(path, name), True, merges, opaque or (below is not None and not merges)))
        elif stat.S_ISREG(found.st_mode):
            self._file(path, name, source, target)
        else:
            self._special(path, name, found, source, target)

    def _make_directory(self, path: str, name: str, target: int) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=target)
        except FileExistsError:
            if not self._onto:
                raise
            self._there.add(joined(path, name))

    def _kept(self, path: str, name: str, found: os.stat_result, base: int, target: int) -> None:
        """Let the copy have an entry of the earlier layer, unchanged."""
        if stat.S_ISDIR(found.st_mode):
            self._count(0)
            os.mkdir(name, 0o700, dir_fd=target)
            self._waiting.append((joined(path, name), False, True, False))
            return
        if is_whiteout(found) and not self._hides(path, name):
            return
        self._count(found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0)
        try:
            os.link(name, name, src_dir_fd=base, dst_dir_fd=target, follow_symlinks=False)
        except OSError as error:
            # Another file system, one without hard links, or too many of them.
            if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP):
                raise
            if is_whiteout(found):
                os.mknod(name, 0o600 | stat.S_IFCHR, 0, dir_fd=target)
            elif stat.S_ISREG(found.st_mode):
                self._file(path, name, base, target, counted=True)
            else:
                self._special(path, name, found, base, target, counted=True)

    def _hides(self, path: str, name: str) -> bool:
        """Whether there is something below all layers that a mark at `path` hides."""
        if self._lowest < 0:
            return True
        if self._hidden[0] != path:
            self._hidden = (path, frozenset(self._names_below(path)))
        return name in self._hidden[1]

    def _names_below(self, path: str) -> list[str]:
        try:
            handle = beneath(self._lowest, path)
        except OSError:
            return []
        try:
            return os.listdir(handle)
        finally:
            os.close(handle)

    def _file(self, path: str, name: str, source: int, target: int, *, counted: bool = False) -> None:
        handle = self._open(source, name)
        if handle < 0:
            return
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                return
            key = (found.st_dev, found.st_ino)
            if found.st_nlink > 1 and key in self._linked:
                self._count(0)
                os.link(self._linked[key], name, src_dir_fd=self._target, dst_dir_fd=target, follow_symlinks=False)
                return
            self._count(0 if counted else allocated(found))
            made = os.open(name, CREATE, 0o600, dir_fd=target)
            try:
                copy_data(handle, made, found)
                self._attributes(handle, made)
                if self._owners:
                    os.fchown(made, found.st_uid, found.st_gid)
                os.fchmod(made, stat.S_IMODE(found.st_mode))
                os.utime(made, ns=(found.st_atime_ns, found.st_mtime_ns))
            finally:
                os.close(made)
            if found.st_nlink > 1:
                self._linked[key] = joined(path, name)
        finally:
            os.close(handle)

    def _open(self, source: int, name: str) -> int:
        """A file to read from, -1 where it has vanished; one that its owner has closed is opened for the while."""
        try:
            return os.open(name, READ, dir_fd=source)
        except PermissionError:
            pass
        except BlockingIOError:
            raise Refused(f"A process holds a lease on the file {name!r}") from None
        except OSError as error:
            if error.errno in (*GONE, errno.ENXIO):
                return -1
            raise
        try:
            handle = os.open(name, HANDLE, dir_fd=source)
        except OSError as error:
            if error.errno in GONE:
                return -1
            raise
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                return -1
            through = f"/proc/self/fd/{handle}"
            os.chmod(through, 0o600)
            try:
                return os.open(through, READ & ~os.O_NOFOLLOW)
            finally:
                os.chmod(through, stat.S_IMODE(found.st_mode))
        finally:
            os.close(handle)

    def _special(
        self, path: str, name: str, found: os.stat_result, source: int, target: int, *, counted: bool = False
    ) -> None:
        """A link, a fifo, a socket without whoever listened, or the mark 0:0; other devices cannot be had."""
        kind = stat.S_IFMT(found.st_mode)
        if not counted:
            self._count(0)
        if kind == stat.S_IFLNK:
            try:
                text = os.readlink(name, dir_fd=source)
            except OSError as error:
                if error.errno in (*GONE, errno.EINVAL):
                    return
                raise
            os.symlink(text, name, dir_fd=target)
        elif kind in (stat.S_IFIFO, stat.S_IFSOCK) or is_whiteout(found):
            os.mknod(name, 0o600 | kind, 0, dir_fd=target)
            os.chmod(name, stat.S_IMODE(found.st_mode), dir_fd=target)
        else:
            return
        if self._owners:
            os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
            if kind != stat.S_IFLNK:
                os.chmod(name, stat.S_IMODE(found.st_mode), dir_fd=target)
        os.utime(name, ns=(found.st_atime_ns, found.st_mtime_ns), dir_fd=target, follow_symlinks=False)

    def _attributes(self, source: int, target: int) -> None:
        """Extended attributes and access lists; of an overlay's own marks none, since those name its former layers."""
        try:
            names = os.listxattr(source)
        except OSError as error:
            if error.errno in NO_ATTRIBUTES:
                return
            raise
        for name in names:
            if not name.startswith(("user.", "system.posix_acl_")):
                continue
            if self._marks and name.startswith(self._marks) and not name.startswith(f"{self._marks}overlay."):
                continue
            try:
                os.setxattr(target, name, os.getxattr(source, name))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.E2BIG):
                    raise Refused("A file has larger extended attributes than the disk can hold") from None
                if error.errno != errno.ENODATA and not name.startswith("system."):
                    raise

    def _count(self, size: int) -> None:
        self._entries_left -= 1
        self._bytes_left -= -(-size // PAGE_BYTES) * PAGE_BYTES
        if self._entries_left < 0 or self._bytes_left < 0:
            raise Refused("The sandbox's files are more than its limits allow", full=True)
