"""What a remote cell raised, as an error here."""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping, Sequence
from typing import Any

_PLACE = re.compile(r"(Cell(?:\x1b\[[\d;]*m|\s)*In(?:\x1b\[[\d;]*m|\s)*\[)\d+(\])")


class RemoteError(Exception):
    """What a remote cell raised, with the remote traceback as its own."""

    def __init__(self, value: str, traceback: Sequence[str], rank: int | None = None) -> None:
        super().__init__(value)
        self.rank = rank
        """Which of several ranks raised it; None where there was one."""
        self._traceback = list(traceback)

    def __str__(self) -> str:
        return str(self.args[0])

    def _render_traceback_(self) -> list[str]:
        return self._traceback


def error_of(content: Mapping[str, Any], *, where: str = "", rank: int | None = None, cell: int = 0) -> BaseException:
    """The error that an `error` message tells: named as over there, and a subclass of that builtin if it is one.

    Args:
        content: Of the message.
        where: Whose it is, as in "Rank 2"; empty where there is one only.
        rank: Its number.
        cell: The number of the cell here, which the traceback is to name.
    """
    name, value = str(content.get("ename")), str(content.get("evalue"))
    lines = [str(line) for line in content.get("traceback") or [f"{name}: {value}"]]
    if name == "StdinNotImplementedError":
        value = "input() cannot be answered in a remote cell: set a variable here, which the cell then reads"
        lines[-1] = f"{name}: {value}"
    if cell:
        lines = [_PLACE.sub(rf"\g<1>{cell}\g<2>", line) for line in lines]
    if where:
        lines = [f"{where}:", *lines]
    builtin = getattr(builtins, name, None)
    bases: tuple[type, ...] = (RemoteError,)
    # What ends an interpreter has ended none here, and IPython would say that it has.
    kinds = (Exception, KeyboardInterrupt)
    if isinstance(builtin, type) and issubclass(builtin, kinds) and builtin is not Exception:
        bases = (RemoteError, builtin)
    try:
        return type(name, bases, {})(value, lines, rank)  # type: ignore[no-any-return]
    except TypeError:
        return type(name, (RemoteError,), {})(value, lines, rank)  # type: ignore[no-any-return]
