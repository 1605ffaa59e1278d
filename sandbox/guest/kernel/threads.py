"""Thread pools of numerical libraries: none may start before the fork, all are as usual after it.

OpenBLAS and numexpr start their threads when they are loaded, so they are told to have one and are given
their number back in each kernel. OpenMP runtimes, MKL and torch start theirs at the first parallel region and
are left alone: what they have read from the environment is what they would read in a kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

HELD = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMEXPR_MAX_THREADS")
_PREFIXES = ("", "scipy_")
_SUFFIXES = ("", "64_", "_64", "_")
_CLONE_THREAD = 0x10000

_setters: list[Callable[[int], object]] = []


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within this, loading such a library starts no thread."""
    before = {name: os.environ.get(name) for name in HELD}
    for name in HELD:
        os.environ[name] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def remember() -> None:
    """Look up the functions that set OpenBLAS's number of threads, so that no kernel has to search."""
    _setters[:] = [setter for path in _loaded("openblas") for setter in _openblas(path)]


def alone() -> bool:
    """Whether this process has no thread but this one. Asked of the system, which knows those of libraries too."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_THREAD) == 0:  # Refused to whom has several, else nothing.
        return True
    return ctypes.get_errno() != errno.EINVAL and len(os.listdir("/proc/self/task")) == 1


def trim() -> None:
    """Give back what imports have freed."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def restore() -> None:
    """Give each library the number of threads that it would have taken by itself in this environment."""
    most = len(os.sched_getaffinity(0))
    count = _first_number("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS") or most
    for setter in _setters:
        setter(min(count, most))
    numexpr = sys.modules.get("numexpr")
    if numexpr is not None:
        numexpr.set_num_threads(numexpr._init_num_threads())


class _Loaded(ctypes.Structure):
    """How `struct dl_phdr_info` begins."""

    _fields_ = [("address", ctypes.c_void_p), ("name", ctypes.c_char_p)]


def _loaded(name: str) -> list[str]:
    """Paths of the shared libraries in this process whose file name has `name` in it."""
    paths: set[str] = set()

    def note(info: Any, size: int, data: object) -> int:
        paths.add(os.fsdecode(info.contents.name or b""))
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Loaded), ctypes.c_size_t, ctypes.c_void_p)
    ctypes.CDLL(None).dl_iterate_phdr(kind(note), None)
    return sorted(path for path in paths if name in os.path.basename(path) and ".so" in path)


def _openblas(path: str) -> list[Callable[[int], object]]:
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return []
    names = [f"{prefix}openblas_set_num_threads{suffix}" for prefix in _PREFIXES for suffix in _SUFFIXES]
    return [getattr(library, name) for name in names if hasattr(library, name)][:1]


def _first_number(*names: str) -> int:
    """The first of these variables that has a positive number, else 0."""
    for name in names:
        value = os.environ.get(name, "").split(",")[0].strip()
        if value.isdigit() and int(value) > 0:
            return int(value)
    return 0
