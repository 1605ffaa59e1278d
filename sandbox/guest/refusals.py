"""What cannot travel between kernels, said by name and with the cure."""

from __future__ import annotations

import io
import mmap
import socket
import subprocess
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

LOOKS_MAX = 500
"""How many values are tried to find the one that stands in the way."""

REFUSED_FILES = (io.FileIO, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.TextIOWrapper)

BACK_CURE = "Bring back what you need of it, as a value of its own."

_CURES: tuple[tuple[tuple[type, ...], str, str], ...] = (
    (REFUSED_FILES, "an open file", "Send its path, and open it in the remote cell."),
    (
        (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event, threading.Semaphore),
        "a lock",
        "Make one in the remote cell: locks hold within one process only.",
    ),
    ((types.GeneratorType, types.AsyncGeneratorType), "a generator", "Send what it gives, as in list(…)."),
    ((types.CoroutineType,), "a coroutine", "Await it first, or make it in the remote cell."),
    ((socket.socket,), "a socket", "Connect in the remote cell."),
    ((threading.Thread,), "a thread", "Start it in the remote cell."),
    ((subprocess.Popen,), "a process that runs", "Start it in the remote cell."),
    ((mmap.mmap,), "mapped memory", "Send what is in it, as in bytes(…), or map it in the remote cell."),
    ((weakref.ReferenceType,), "a weak reference", "Send what it refers to."),
    ((types.FrameType, types.TracebackType), "a part of a running program", "Send what you need of it."),
)

_NAMED: Mapping[str, tuple[str, str]] = {
    "sqlite3.Connection": ("a connection to a database", "Connect in the remote cell."),
    "sqlite3.Cursor": ("a connection to a database", "Connect in the remote cell."),
    "ipywidgets.widgets.widget.Widget": ("a widget", "Make it in the remote cell."),
    "tqdm.std.tqdm": ("a progress bar", "Make it in the remote cell."),
    "ipykernel.iostream.OutStream": ("this notebook's output", "Use sys.stdout or sys.stderr in the remote cell."),
    "_asyncio.Future": ("a future", "Await it first."),
    "concurrent.futures._base.Future": ("a future", "Send its result()."),
    "concurrent.futures._base.Executor": ("a pool of workers", "Make it in the remote cell."),
    "multiprocessing.synchronize.SemLock": ("a lock", "Make one in the remote cell."),
}
"""Those of modules that are not to be loaded for this, by the full names of their classes."""


class CannotTravelError(TypeError):
    """A variable that cannot be pickled, or not be unpickled on the other side."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message.rstrip('.')}. {hint}".strip() if hint else message)

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class TooLargeError(CannotTravelError):
    """More than may be sent."""


class NoRoomError(CannotTravelError):
    """More than fits now, which may be otherwise once something else has gone."""


def blame(
    values: Mapping[str, Any],
    error: BaseException,
    travels: Callable[[Any], bool],
    *,
    back: Mapping[str, str] | None = None,
) -> CannotTravelError:
    """The error that says which of `values` cannot be pickled, and why.

    Args:
        values: Of which one cannot, by name.
        error: What came of it.
        travels: Whether a value can be pickled.
        back: They were to come back from the remote cell; what some are called.
    """
    cannot = "cannot be sent" if back is None else "cannot be brought back"
    left = LOOKS_MAX

    def fails(value: Any) -> bool:
        nonlocal left
        left -= 1
        return left >= 0 and not travels(value)

    culprit = next(((name, value) for name, value in values.items() if fails(value)), None)
    if culprit is None:
        return CannotTravelError(f"A variable {cannot}: {words(error)}")
    path, value = (back or {}).get(culprit[0], culprit[0]), culprit[1]
    seen: set[int] = set()
    while id(value) not in seen:
        seen.add(id(value))
        known = _known(value)
        if known is not None:
            what, cure = known
            return CannotTravelError(f"{path} {cannot}: it is {what}", cure if back is None else BACK_CURE)
        inner = next(((f"{path}{step}", part) for step, part in _parts(value) if fails(part)), None)
        if inner is None:
            break
        path, value = inner
    cure = "Make it in the remote cell." if back is None else BACK_CURE
    return CannotTravelError(f"{path} {cannot}: {words(error)}", cure)


def words(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}"


def _known(value: object) -> tuple[str, str] | None:
    for kinds, what, cure in _CURES:
        if isinstance(value, kinds):
            return what, cure
    for kind in type(value).__mro__:
        found: tuple[str, str] | None = getattr(kind, "cannot_travel", None)
        found = found or _NAMED.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None:
            return found
    return None


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value is made of, each with how it is written behind the value's own name."""
    if isinstance(value, Mapping):
        for key, part in list(value.items()):
            yield f"[{key!r}]", part
    elif isinstance(value, (list, tuple, set, frozenset)):
        for number, part in enumerate(value):
            yield f"[{number}]", part
    elif isinstance(value, types.FunctionType):
        inside = value.__code__.co_names
        for name in [name for name in inside if name in value.__globals__]:
            yield f" (which uses {name})", value.__globals__[name]
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            yield f" (which uses {name})", cell.cell_contents
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    else:
        for name, part in list(getattr(value, "__dict__", {}).items()):
            yield f".{name}", part
