"""Library files of other file systems that images of one user keep: each copied once, and linked into all that map it.

    .pins/KEY           a copy; the key says of which file, as it was then

What no image links any more goes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat


class Pins:
    """The copies below one directory."""

    def __init__(self, path: str) -> None:
        self._path = path

    def keep(self, file: int, target: str) -> None:
        """Have an open file under another name: as a link of its own, of a copy that there is, or of a new one.

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
        try:
            shutil.copyfile(f"/proc/self/fd/{file}", target)
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


def _key(found: os.stat_result) -> str:
    seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return "-".join(f"{number:x}" for number in seen)
