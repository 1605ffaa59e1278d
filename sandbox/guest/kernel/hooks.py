"""What a notebook can ask for: `warmcell.before_snapshot`, `warmcell.after_restore`, `warmcell.fork`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .forking import Clone, Fork, ForkError, fork

__all__ = ["Clone", "Fork", "ForkError", "HookError", "after_restore", "before_snapshot", "fork", "run"]

Hook = TypeVar("Hook", bound=Callable[[], object])

before: list[Callable[[], object]] = []
after: list[Callable[[], object]] = []


class HookError(Exception):
    """A function of the notebook's has failed."""


def before_snapshot(function: Hook) -> Hook:
    """Call `function` before each snapshot, fork or suspension of this kernel. Usable as a decorator.

    It runs beside the cells, in a thread of its own, and must return soon. If it raises there is no snapshot.
    """
    return _registered(before, function)


def after_restore(function: Hook) -> Hook:
    """Call `function` in a kernel that has come back from a snapshot, before it takes requests. Usable as a decorator.

    There it can connect to what it had connections to, and seed its own random generators. If it raises, the restore
    fails.
    """
    return _registered(after, function)


def run(functions: list[Callable[[], object]], *, when: str) -> None:
    """Call them in the order in which they were registered.

    Raises:
        HookError: One has failed; it says which and how.
    """
    for function in list(functions):
        try:
            function()
        except Exception as error:
            name = getattr(function, "__qualname__", repr(function))
            raise HookError(f"{name}, which is to run {when}, has failed: {type(error).__name__}: {error}") from error


def _registered(functions: list[Callable[[], object]], function: Hook) -> Hook:
    if not callable(function):
        raise TypeError(f"{function!r} is no function")
    for known in functions:
        # A cell that is run again defines its function again, and means the same one.
        if (known.__module__, known.__qualname__) == (
            getattr(function, "__module__", None),
            getattr(function, "__qualname__", ""),
        ) and "<lambda>" not in known.__qualname__:
            functions.remove(known)
            break
    functions.append(function)
    return function
