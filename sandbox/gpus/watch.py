"""Hears of leases and tickets that come and go, in whichever process: the kernel tells (inotify)."""

import asyncio
import ctypes
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

_CLOSE_WRITE, _CREATE, _DELETE = 0x8, 0x100, 0x200
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC  # inotify's own have the same values
_BUFFER_BYTES = 64 * 1024
_EVENT = struct.Struct("iIII")


class Watch:
    """Calls `changed` in the loop's thread whenever a file of the directory that was held is let go of, as it is when
    its holder is killed, and whenever one comes or goes. Files that are opened for reading only make no news.
    """

    def __init__(self, path: Path, changed: Callable[[], None]) -> None:
        self._path = path
        self._changed = changed
        self._descriptor = -1
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self) -> None:
        """Watch the directory, which must exist. Idempotent. Where that cannot be had nothing is told."""
        if self._descriptor >= 0:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = libc.inotify_init1(_FLAGS)
        if descriptor < 0:
            log.warning("leases cannot be watched: %s", os.strerror(ctypes.get_errno()))
            return
        if libc.inotify_add_watch(descriptor, os.fsencode(self._path), _CLOSE_WRITE | _CREATE | _DELETE) < 0:
            log.warning("%s cannot be watched: %s", self._path, os.strerror(ctypes.get_errno()))
            os.close(descriptor)
            return
        self._descriptor = descriptor
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(descriptor, self._read)

    def end(self) -> None:
        """Watch no more. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(descriptor)
            os.close(descriptor)

    def _read(self) -> None:
        data = os.read(self._descriptor, _BUFFER_BYTES)
        gone = any(mask & 0x8000 for mask in _masks(data))  # IN_IGNORED: somebody has removed the directory.
        if gone:
            self.end()
        self._changed()


def _masks(data: bytes) -> list[int]:
    found, at = [], 0
    while at + _EVENT.size <= len(data):
        _, mask, _, length = _EVENT.unpack_from(data, at)
        found.append(mask)
        at += _EVENT.size + length
    return found
