"""Change an image directory all at once: the new one is made beside it, then the two change places.

A crash leaves the old image or the new one, and perhaps `.NAME.new` beside it, which nothing refers to.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_COPY_BYTES = 1 << 30


def beside(image: Path) -> Path:
    """Where the new image is made; an old one of that name was left by a crash and may be removed."""
    return image.with_name(f".{image.name}.new")


@contextmanager
def rewriting(image: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a directory with hard links to all that `image` has; when the block ends it becomes `image`.

    Files in it must be replaced (`write`), never changed, for they are those of the old image. After an error the old
    image is as it was. A directory descriptor that was opened before stays with the old one.

    Args:
        durable: Wait until the new directory is on disk before and after the change. Only what `write` wrote is
            flushed; the large files were on disk before, or are the caller's to flush.

    Raises:
        OSError: The disk is full, or the file system cannot exchange directories.
    """
    new = beside(image)
    if new.exists():
        shutil.rmtree(new)
    try:
        _link_tree(image, new)
        yield new
        if durable:
            for directory in (new, *(path for path in new.rglob("*") if path.is_dir())):
                _flush(directory)
        swap(new, image)
        if durable:
            _flush(image.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put a new file in the place of what is there."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy(source: int, target: int, offset_bytes: int, length_bytes: int, *, to_bytes: int) -> None:
    """Copy a range between files, inside the kernel (and without copying, where the file system shares blocks).

    Raises:
        EOFError: The source is shorter than that.
        OSError: The disk is full, or a file cannot be read.
    """
    end = offset_bytes + length_bytes
    while offset_bytes < end:
        wanted = min(end - offset_bytes, _COPY_BYTES)
        try:
            done = os.copy_file_range(source, target, wanted, offset_bytes, to_bytes)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
            done = os.pwrite(target, os.pread(source, min(wanted, 1 << 20), offset_bytes), to_bytes)
        if done == 0:
            raise EOFError("the file ends before the range does")
        offset_bytes += done
        to_bytes += done


def punch(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Give back what ranges (offset, length in bytes) of a file take on disk; their bytes read as zeros from now on.

    Where that cannot be done they stay as they are.
    """
    libc = ctypes.CDLL(None)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    with suppress(OSError):
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            for offset_bytes, length_bytes in ranges:
                if libc.fallocate(file, _KEEP_SIZE | _PUNCH_HOLE, offset_bytes, length_bytes) != 0:
                    return
        finally:
            os.close(file)


def _link_tree(source: Path, target: Path) -> None:
    status = source.stat()
    target.mkdir(mode=0o700)
    for entry in os.scandir(source):
        if entry.is_dir(follow_symlinks=False):
            _link_tree(Path(entry.path), target / entry.name)
        else:
            os.link(entry.path, target / entry.name, follow_symlinks=False)
    os.chmod(target, status.st_mode & 0o7777)
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(target, status.st_uid, status.st_gid)


def _flush(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def swap(one: Path, other: Path) -> None:
    """Let two directories change places, at one moment.

    Raises:
        OSError: The file system cannot do that.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))
