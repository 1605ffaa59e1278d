"""Values that go with a cell: put into the kernel before it, and taken out after it, in one request.

A request to execute may have `warmcell` in its content: `load`, what `values.load` is told, and `dump`, the arguments
of `values.dump`. Where one of them fails, the answer is that error, with `step` saying which. Variables of the
environment in `env` are there for this cell alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

KEY = "warmcell"


def install(kernel: Any) -> None:
    """Have this kernel heed it."""
    execute = kernel.do_execute

    async def do_execute(code: str, silent: bool, *args: Any, **more: Any) -> Any:
        asked = (kernel.get_parent("shell") or {}).get("content", {}).get(KEY) or {}
        if not asked:
            return await execute(code, silent, *args, **more)
        from .. import values

        if "load" in asked:
            failed = _failure(kernel.shell, "load", lambda: values.load(asked["load"]))
            if failed:
                return failed
        with _lent(asked.get("env") or {}):
            reply = await execute(code, silent, *args, **more)
        if "dump" in asked and reply["status"] == "ok":
            return _failure(kernel.shell, "dump", lambda: values.dump(**asked["dump"])) or reply
        return reply

    kernel.do_execute = do_execute


@contextlib.contextmanager
def _lent(env: Mapping[str, str]) -> Iterator[None]:
    """Within this, these variables are as told."""
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _failure(shell: Any, step: str, do: Callable[[], object]) -> dict[str, Any] | None:
    """The answer where it fails, an interrupt included."""
    try:
        do()
    except (Exception, KeyboardInterrupt) as error:
        if hasattr(error, "_render_traceback_"):
            lines = error._render_traceback_()
        else:
            lines = shell.InteractiveTB.structured_traceback(*sys.exc_info())
        return {
            "status": "error",
            "step": step,
            "ename": type(error).__name__,
            "evalue": str(error),
            "traceback": list(lines),
            "execution_count": shell.execution_count,
            "user_expressions": {},
            "payload": [],
        }
    return None
