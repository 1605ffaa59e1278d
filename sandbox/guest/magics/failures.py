"""What a remote cell raised, as an error here."""

from __future__ import annotations

import builtins
import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .. import values

_PLACE = re.compile(r"(Cell(?:\x1b\[[\d;]*m|\s)*In(?:\x1b\[[\d;]*m|\s)*\[)\d+(\])")


class RemoteError(Exception):
    """What a remote cell raised, with the remote traceback as its own."""

    def __init__(self, value: str, traceback: Sequence[str], rank: int | None = None) -> None:
        super().__init__(value)
        self.args = (value,)  # Whatever the notebook's own class makes of it.
        self.rank = rank
        """Which of several ranks raised it; None where there was one."""
        self._traceback = list(traceback)

    def __str__(self) -> str:
        return str(self.args[0])

    def _render_traceback_(self) -> list[str]:
        return self._traceback


def error_of(content: Mapping[str, Any], *, where: str = "", rank: int | None = None, cell: int = 0) -> BaseException:
    """The error that an `error` message tells: of that name, and of the class of that name here.

    That is one of this notebook, or a builtin.

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
    # What ends an interpreter has ended none here, and IPython would say that it has.
    kinds = (Exception, KeyboardInterrupt)
    for known in (values.namespace().get(name), getattr(builtins, name, None)):
        if isinstance(known, type) and issubclass(known, kinds) and known is not Exception:
            with contextlib.suppress(Exception):  # One that is made otherwise.
                return type(name, (RemoteError, known), {})(value, lines, rank)  # type: ignore[no-any-return]
    return type(name, (RemoteError,), {})(value, lines, rank)  # type: ignore[no-any-return]
