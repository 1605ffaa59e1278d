"""Importing modules ahead of the fork so that they do not notice: no threads, no shell, late streams, own variables."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

_changed: dict[str, str] = {}
_before: dict[str, str] = {}


@contextlib.contextmanager
def noting_environment() -> Iterator[None]:
    """Note which variables are set within this, for `environment`."""
    _before.update(os.environ)
    try:
        yield
    finally:
        _changed.update({name: value for name, value in os.environ.items() if _before.get(name) != value})


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """`given` with what imports have set, as if they had been done with it."""
    set_by_imports = {k: v for k, v in _changed.items() if given.get(k) == _before.get(k)}
    return {**given, **set_by_imports}


@contextlib.contextmanager
def disguised() -> Iterator[None]:
    """Within this, what is imported finds things as in a kernel; a stream that it keeps is the kernel's later one."""
    streams = sys.stdout, sys.stderr
    own_choice = "MPLBACKEND" in os.environ
    # As the kernel's application sets it, for matplotlib, which reads it once.
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    sys.stdout, sys.stderr = _Late("stdout"), _Late("stderr")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        if not own_choice:
            os.environ.pop("MPLBACKEND", None)


class _Late(io.TextIOBase):
    """Whatever the standard stream of that name is when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def close(self) -> None:
        """Nothing; the stream is not ours, and a lost file object closes itself."""

    @property
    def _stream(self) -> TextIO:
        stream = getattr(sys, self._name)
        return getattr(sys, f"__{self._name}__") if stream is self else stream  # type: ignore[no-any-return]

    def __getattribute__(self, name: str) -> Any:
        if name in ("_name", "_stream", "close", "__class__", "__dict__", "__init__"):
            return object.__getattribute__(self, name)
        return getattr(self._stream, name)


class ShellWatch:
    """Notes whether an import asks for the running shell: it would find none and settle for a plain terminal."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note it within this."""
        from IPython.core.interactiveshell import InteractiveShell

        def initialized(cls: type) -> bool:
            self.asked = True
            return False

        self.asked = False
        InteractiveShell.initialized = classmethod(initialized)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del InteractiveShell.initialized
