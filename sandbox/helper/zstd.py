"""zstd, both ways, by the system's own library: the helper has Python's standard library and nothing else.

`libzstd.so.1` is part of every distribution that systemd, dpkg or rpm is part of, and root's. What is read here was
written here, and has been compared with its sum before.
"""

from __future__ import annotations

import ctypes
import functools

from warmcell.sandbox.helper.problems import HelperError, corrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LIBRARY = "libzstd.so.1"
LEVEL = 3
ROOM_BYTES = 1 << 20
_LEVEL, _CHECKSUM = 100, 201
_CONTINUE, _END = 0, 2


class _Buffer(ctypes.Structure):
    """The library's ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("at", ctypes.c_size_t)]


def compressed(plain: Iterable[bytes]) -> Iterator[bytes]:
    """All of `plain` as one frame with a checksum.

    Raises:
        HelperError: This machine has no zstd.
    """
    library = _library()
    context = library.ZSTD_createCCtx()
    room = ctypes.create_string_buffer(ROOM_BYTES)
    try:
        for name, value in ((_LEVEL, LEVEL), (_CHECKSUM, 1)):
            _checked(library, library.ZSTD_CCtx_setParameter(context, name, value))
        for piece in plain:
            source = _source(piece)
            while source.at < source.size:
                yield _step(library, library.ZSTD_compressStream2, context, room, source, _CONTINUE)[1]
        source, left = _source(b""), 1
        while left:
            left, out = _step(library, library.ZSTD_compressStream2, context, room, source, _END)
            yield out
    finally:
        library.ZSTD_freeCCtx(context)


def expanded(packed: Iterable[bytes]) -> Iterator[bytes]:
    """What is in one frame.

    Raises:
        HelperError: It is not whole, or not what was compressed; or this machine has no zstd.
    """
    library = _library()
    context = library.ZSTD_createDCtx()
    room = ctypes.create_string_buffer(ROOM_BYTES)
    ended = full = False
    try:
        for piece in packed:
            source = _source(piece)
            while not ended and (source.at < source.size or full):
                left, out = _step(library, library.ZSTD_decompressStream, context, room, source)
                ended, full = left == 0, len(out) == ROOM_BYTES
                yield out
            if source.at < source.size:
                raise corrupt("something follows compressed memory")
        if not ended:
            raise corrupt("compressed memory breaks off")
    finally:
        library.ZSTD_freeDCtx(context)


def _source(piece: bytes) -> _Buffer:
    """What is to be read; the caller keeps `piece`, of which this has the address alone."""
    return _Buffer(ctypes.cast(ctypes.c_char_p(piece), ctypes.c_void_p), len(piece), 0)


def _step(
    library: ctypes.CDLL,
    call: Callable[..., int],
    context: int,
    room: ctypes.Array[ctypes.c_char],
    source: _Buffer,
    *how: int,
) -> tuple[int, bytes]:
    """One call: what it returns, and what has come of it."""
    target = _Buffer(ctypes.addressof(room), ROOM_BYTES, 0)
    left = _checked(library, call(context, ctypes.byref(target), ctypes.byref(source), *how))
    return left, ctypes.string_at(room, target.at)


def _checked(library: ctypes.CDLL, result: int) -> int:
    if library.ZSTD_isError(result):
        raise corrupt(f"zstd: {library.ZSTD_getErrorName(result).decode()}")
    return result


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise HelperError(
            "backend_unavailable",
            f"Memory cannot be compressed, or used that is compressed: {LIBRARY} is not there",
            hint="Let root install it: the package is called libzstd1 or libzstd.",
            details={"required": LIBRARY},
        ) from error
    size, pointer, buffer = ctypes.c_size_t, ctypes.c_void_p, ctypes.POINTER(_Buffer)
    for name, result, arguments in (
        ("ZSTD_createCCtx", pointer, []),
        ("ZSTD_freeCCtx", size, [pointer]),
        ("ZSTD_CCtx_setParameter", size, [pointer, ctypes.c_int, ctypes.c_int]),
        ("ZSTD_compressStream2", size, [pointer, buffer, buffer, ctypes.c_int]),
        ("ZSTD_createDCtx", pointer, []),
        ("ZSTD_freeDCtx", size, [pointer]),
        ("ZSTD_decompressStream", size, [pointer, buffer, buffer]),
        ("ZSTD_isError", ctypes.c_uint, [size]),
        ("ZSTD_getErrorName", ctypes.c_char_p, [size]),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found
