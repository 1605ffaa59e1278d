"""What kernels show besides what IPython knows, in sandboxes of E2B's clients: the data of tables and of figures."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

ASKED = "E2B_SANDBOX"
"""As in E2B's own sandboxes, this variable says that it is one."""

DATA, CHART = "e2b/data", "e2b/chart"
CELLS_MAX = 250_000
"""A larger table is shown as text and HTML alone."""


def install(shell: Any) -> None:
    """Have the kernel show these, too, if its sandbox is one of E2B's clients. Idempotent."""
    known = shell.display_formatter.formatters
    if os.environ.get(ASKED) == "true" and CHART not in known:
        from .charts import chart_of  # Most kernels need none of it.

        known[DATA] = _formatter(shell, DATA, ("pandas", "DataFrame"), data_of)
        known[CHART] = _formatter(shell, CHART, ("matplotlib", "Figure"), chart_of)


def renew() -> None:
    """The environment has changed."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        install(shell)


def data_of(frame: Any) -> dict[str, list[Any]] | None:
    """The columns of a table; None where it is too large."""
    if frame.size > CELLS_MAX:
        return None
    from .charts import plain

    names = [str(name) for name in frame.columns]
    return {name: [plain(one) for one in frame.iloc[:, at].array] for at, name in enumerate(names)}


def _formatter(shell: Any, mime: str, kind: tuple[str, str], tell: Callable[[Any], dict[str, Any] | None]) -> Any:
    """One that tells of a kind: the first part of its module's name, and its own.

    Types are not registered with it: matplotlib takes its figures off every formatter when its back end is set up.
    """
    from IPython.core.formatters import BaseFormatter

    class Formatter(BaseFormatter):
        def __call__(self, obj: Any) -> Any:
            if not any((one.__module__.partition(".")[0], one.__name__) == kind for one in type(obj).__mro__):
                return super().__call__(obj)
            try:
                return tell(obj)
            except Exception:
                return None  # What is shown besides is never an error of what is shown.

    formatter = Formatter(parent=shell.display_formatter)
    formatter.format_type = mime
    formatter.print_method = f"_repr_{mime.replace('/', '_')}_"
    formatter._return_type = dict
    return formatter
