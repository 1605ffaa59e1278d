"""Reads what an image maps of its page files from disk, for a kernel that will need all of it soon.

Without that a page comes from disk when the kernel first reads it. Nothing is mapped or copied here: the pages are in
the system's cache then, shared by all kernels that map them, and go again where memory is short.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from warmcell.sandbox.helper.images import lazy
from warmcell.sandbox.helper.images.errors import ImageError
from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from warmcell.sandbox.helper.shelf import Image, Shelf

STEP_BYTES = 128 << 10
"""Most that the system reads ahead at one word, whatever it is told."""


def needed(shelf: Shelf, image: str) -> list[tuple[str, int, int]]:
    """What an image maps: places of page files, with offset and length in bytes, in order and none twice.

    Raises:
        HelperError: There is none, or it is damaged.
    """
    found: Image = shelf.open(image)
    try:
        parts = sorted(lazy.mapped(Path(found.path)))
    except ImageError as error:
        raise HelperError(error.code, error.message, hint=error.hint) from error
    finally:
        found.close()
    joined: list[tuple[str, int, int]] = []
    for name, offset, length in parts:
        place = shelf.pages.place(name)
        if joined and joined[-1][0] == place and offset <= joined[-1][1] + joined[-1][2]:
            _, start, before = joined.pop()
            offset, length = start, max(before, offset + length - start)
        joined.append((place, offset, length))
    return joined


def read(parts: list[tuple[str, int, int]]) -> None:
    """Have the system read them; returns when it has all orders. A file that is gone by then nobody needs."""
    for place, offset, length in parts:
        with contextlib.suppress(OSError):
            file = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                for at in range(offset, offset + length, STEP_BYTES):
                    os.posix_fadvise(file, at, min(STEP_BYTES, offset + length - at), os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)
