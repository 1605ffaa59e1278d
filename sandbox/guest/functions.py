"""Functions of the notebook in what Python's library wraps them in, and no pickler takes apart: caches, dispatchers.

A wrapped function may use its wrapper, by that name, and a class its own properties. So a wrapper is made first, and is
told afterwards what it wraps.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

_CACHE = type(functools.lru_cache(lambda: None))
_DISPATCHER = functools.singledispatch(lambda value: None).__code__  # type: ignore[attr-defined]
"""What all dispatchers run."""


def reduce(value: Any) -> tuple[Any, ...] | None:
    """How such a one is pickled; None for all else, and for those that can be imported."""
    if type(value) is functools.cached_property:
        # Until Python 3.12 it has a lock.
        name = value.attrname
        return functools.cached_property, (None,), {"func": value.func, "attrname": name, "__doc__": value.__doc__}
    if type(value) is _CACHE and not _is_imported(value):
        return new_cache, tuple(value.cache_parameters().values()), value.__wrapped__, None, None, wrap
    # Of others nothing is asked: what a proxy says to that may be an error.
    if type(value) is types.FunctionType and value.__code__ is _DISPATCHER and not _is_imported(value):
        return new_dispatcher, (), dict(vars(value)["registry"]), None, None, register
    return None


def new_cache(maxsize: int | None, typed: bool) -> Any:
    """An empty cache around what `wrap` names."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return cache.__wrapped__(*args, **kwargs)

    cache: Any = functools.lru_cache(maxsize, typed)(call)
    return cache


def wrap(cache: Any, function: Callable[..., Any]) -> None:
    """Have `function` fill it."""
    functools.update_wrapper(cache, function)


def new_dispatcher() -> Any:
    """One that knows no types yet."""
    return functools.singledispatch(lambda value: None)


def register(dispatcher: Any, registry: Mapping[type, Callable[..., Any]]) -> None:
    """Have it know these types."""
    for kind, function in registry.items():
        dispatcher.register(kind, function)
    base = registry[object]
    functools.update_wrapper(dispatcher, base)


def _is_imported(value: Any) -> bool:
    """Whether it is in a module under its name, as the other side finds it; the notebook itself is no such module."""
    found: Any = None if value.__module__ == "__main__" else sys.modules.get(value.__module__)
    name = getattr(value, "__qualname__", "")  # A cache's is that of what it wraps, if that has one.
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value
