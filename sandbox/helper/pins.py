"""Library files of other file systems that images of one user keep: each copied once, and linked into all that map it.

    .pins/KEY           a copy; the key says of which file, as it was then

What no image links any more goes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from warmcell.sandbox.helper.stream import segments

ROOM = 4
"""The disk has so many times as much left, or no copy is made."""


class Pins:
    """The copies below one directory."""

    def __init__(self, path: str) -> None:
        self._path = path

    def keep(self, file: int, target: str, *, most_bytes: int | None = None) -> None:
        """Have an open file under another name: as a link of its own, of a copy that there is, or of a new one.

        Args:
            file: The descriptor.
            target: The name.
            most_bytes: Beyond which no copy is made.

        Raises:
            OSError: That cannot be; there is nothing of that name.
        """
        found = os.fstat(file)
        kept = f"{self._path}/{_key(found)}"
        try:
            # With a descriptor, though the path is absolute: without any, Python calls link(2), which follows no link.
            os.link(f"/proc/self/fd/{file}", target, src_dir_fd=file, follow_symlinks=True)
            return
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.link(kept, target)
                return
        taken = found.st_blocks * 512
        disk = os.statvfs(self._path)
        if most_bytes is not None and taken > most_bytes:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if disk.f_bavail * disk.f_frsize < ROOM * taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            _copy(file, target, found.st_size)
            os.chmod(target, stat.S_IMODE(found.st_mode) & 0o777)
            os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
            if _key(os.fstat(file)) != _key(found):
                raise OSError("it was written to meanwhile")
            with contextlib.suppress(FileExistsError):  # Somebody else has copied it in this moment.
                os.link(target, kept)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)
            raise

    def inodes(self) -> frozenset[int]:
        """Of all copies, to tell them from links of the machine's own files."""
        return frozenset(entry.inode() for entry in os.scandir(self._path))

    def collect(self) -> None:
        """Remove what no image links."""
        for name in os.listdir(self._path):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(f"{self._path}/{name}").st_nlink == 1:
                    os.unlink(f"{self._path}/{name}")


def _copy(file: int, target: str, size: int) -> None:
    """Holes stay holes."""
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        for begin, end in segments(file, size):
            os.lseek(out, begin, os.SEEK_SET)
            at = begin
            while at < end:
                sent = os.sendfile(out, file, at, end - at)
                if not sent:
                    raise OSError(errno.EIO, "it became shorter meanwhile")
                at += sent
        os.ftruncate(out, size)
    finally:
        os.close(out)


def _key(found: os.stat_result) -> str:
    seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return "-".join(f"{number:x}" for number in seen)
