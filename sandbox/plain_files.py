"""Files of which nobody vouches that they are any: what code of others could write may be a pipe or without an end."""

import errno
import os
import stat
from pathlib import Path


def read_plain(path: Path, *, most_bytes: int) -> bytes:
    """What is in a plain file, to which links may lead. Blocks, but waits for nobody.

    Raises:
        OSError: It cannot be read, is no plain file, or is larger.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "It is no plain file", str(path))
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"It is larger than {most_bytes} bytes", str(path))
    return content
