"""Values that go with a cell: put into the kernel before it, and taken out after it, in one request.

A request to execute may have `warmcell` in its content: `load`, what `values.load` is told, and `dump`, the arguments
of `values.dump`. Where one of them fails, the answer is that error, with `step` saying which. Variables of the
environment in `env` are there for this cell alone. With `quiet` nobody else listens than whoever asks, so it is not
said that the kernel is busy, and with what: each message wakes both.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

KEY = "warmcell"
NOTHING = {"status": "ok", "user_expressions": {}, "payload": []}
"""The answer where there is no code."""


def install(kernel: Any) -> None:
    """Have this kernel heed it."""
    execute = kernel.do_execute

    async def do_execute(code: str, silent: bool, *args: Any, **more: Any) -> Any:
        asked = _asked(kernel.get_parent("shell"))
        if not asked:
            return await execute(code, silent, *args, **more)
        from .. import values

        if "load" in asked:
            failed = _failure(kernel.shell, "load", lambda: values.load(asked["load"]))
            if failed:
                return failed
        if code:
            with _lent(asked.get("env") or {}):
                reply = await execute(code, silent, *args, **more)
        else:  # What is asked for is what the cell before has left: the value of its last line, too.
            reply = {**NOTHING, "execution_count": kernel.execution_count}
        if "dump" in asked and reply["status"] == "ok":
            return _failure(kernel.shell, "dump", lambda: values.dump(**asked["dump"])) or reply
        return reply

    kernel.do_execute = do_execute
    say_input, say_status = kernel._publish_execute_input, kernel._publish_status

    def _publish_execute_input(code: str, parent: Mapping[str, Any], *args: Any) -> None:
        if not _asked(parent).get("quiet"):
            say_input(code, parent, *args)

    def _publish_status(status: str, channel: str, *args: Any) -> None:
        if not (status == "busy" and channel == "shell" and _asked(kernel.get_parent("shell")).get("quiet")):
            say_status(status, channel, *args)

    kernel._publish_execute_input, kernel._publish_status = _publish_execute_input, _publish_status


def _asked(parent: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What goes with a request; nothing where it is any client's."""
    asked = ((parent or {}).get("content") or {}).get(KEY)
    return asked if isinstance(asked, dict) else {}


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
