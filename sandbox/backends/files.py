"""Removing what sandboxes have left on disk."""

import itertools
import os
import stat
from pathlib import Path

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a whole tree, however deep it is and whatever its names and modes are. Blocks.

    Nothing else may be writing to it. What cannot be removed stays.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        path.chmod(0o700)
        top = os.open(path, _OPEN)
    except OSError:
        return
    try:
        _empty(top)
    except OSError:
        return
    finally:
        os.close(top)
    path.rmdir()


def _empty(top: int) -> None:
    """Remove what lies in a directory.

    What lies deeper is first moved up to here, so no path is ever longer than one name and nothing recurses.
    """
    numbers = (f"..{number}" for number in itertools.count())
    waiting = _unlink_files(top)
    while waiting:
        name = waiting.pop()
        os.chmod(name, 0o700, dir_fd=top)  # An overlay leaves a directory of mode 0 behind, and guests what they like.
        inner = os.open(name, _OPEN, dir_fd=top)
        try:
            for deeper in _unlink_files(inner):
                os.chmod(deeper, 0o700, dir_fd=inner)  # Moving it writes its `..`.
                above = next(unused for unused in numbers if not _exists(unused, top))
                os.rename(deeper, above, src_dir_fd=inner, dst_dir_fd=top)
                waiting.append(above)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=top)


def _unlink_files(directory: int) -> list[str]:
    """Unlink what is in a directory but directories, which are answered."""
    left = []
    for name in os.listdir(directory):
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            left.append(name)
        else:
            os.unlink(name, dir_fd=directory)
    return left


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
