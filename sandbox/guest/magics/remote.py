"""`%%remote`: run the cell elsewhere, show what it shows, raise what it raises."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .api import ANSWER_TIMEOUT_S, Api, KeeperError, Run
from .arguments import ArgumentError, Arguments, check_known, parse

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

STOP_TIMEOUT_S = 10.0
"""How long an interrupted cell has to end before its sandbox is removed."""

NOT_STOPPED = f"The remote cell has not stopped within {STOP_TIMEOUT_S:.0f} s, so its sandbox was removed"

EXIT_TIMEOUT_S = 2.0

GONE = ("sandbox_not_found", "not_found", "conflict")
"""Codes that say that a kept sandbox is no more."""


class RemoteError(Exception):
    """What a remote cell raised, with the remote traceback as its own."""

    def __init__(self, value: str, traceback: list[str]) -> None:
        super().__init__(value)
        self._traceback = traceback

    def __str__(self) -> str:
        return str(self.args[0])

    def _render_traceback_(self) -> list[str]:
        return self._traceback

    @staticmethod
    def of(content: Mapping[str, Any]) -> BaseException:
        """The error that an `error` message tells: named as over there, and a subclass of that builtin if it is one."""
        name, value = str(content.get("ename")), str(content.get("evalue"))
        lines = [str(line) for line in content.get("traceback") or [f"{name}: {value}"]]
        builtin = getattr(builtins, name, None)
        bases: tuple[type, ...] = (RemoteError,)
        if isinstance(builtin, type) and issubclass(builtin, BaseException) and builtin is not Exception:
            bases = (RemoteError, builtin)
        try:
            return type(name, bases, {})(value, lines)  # type: ignore[no-any-return]
        except TypeError:
            return type(name, (RemoteError,), {})(value, lines)  # type: ignore[no-any-return]


class Remote:
    """The magic of one shell and the sandboxes that it keeps warm, one for each GPU request."""

    def __init__(self, shell: InteractiveShell, connect: Callable[[], Api]) -> None:
        self._shell = shell
        self._connect = connect
        self._api: Api | None = None
        self._warm: dict[str | None, Mapping[str, Any]] = {}
        self._lock = threading.Lock()
        atexit.register(self.close)

    def magic(self, line: str, cell: str) -> None:
        """Run this cell in another sandbox, with its own memory and, if asked for, its own GPU.

            %%remote [gpu=KIND] [send=NAMES] [get=NAMES]

        ======  =====================================================  =====================
        key     meaning                                                example
        ======  =====================================================  =====================
        gpu     which GPU it runs on: a kind, a count after a colon,   gpu=A100, gpu=H100:2,
                a least size of memory, or any; without it, none       gpu=24GiB, gpu=any
        send    variables that it finds in its namespace               send=data,model
        get     variables that are brought back when it has finished   get=loss
        ======  =====================================================  =====================

        Output and pictures appear as they come. An error over there is an error here; the stop button stops the
        remote cell. The sandbox is kept for the next %%remote with the same gpu=, variables included, and removed
        with this kernel. It sees the same files as this notebook.
        """
        from IPython.core.error import UsageError

        try:
            arguments = parse(line)
            check_known(arguments.send, self._shell.user_ns)
        except ArgumentError as error:
            raise UsageError(f"%%remote: {error}") from None
        if not cell.strip():
            raise UsageError("%%remote runs the lines below it, and there are none")
        send = {name: self._shell.user_ns[name] for name in arguments.send}
        with self._lock:
            self._run(arguments, cell, send)

    def close(self) -> None:
        """Remove the sandboxes that are kept. Idempotent."""
        atexit.unregister(self.close)
        for gpu in list(self._warm):
            self._drop(gpu, timeout=EXIT_TIMEOUT_S)

    def _run(self, arguments: Arguments, cell: str, send: Mapping[str, Any]) -> None:
        self._api = self._api or self._connect()
        kept = self._warm.get(arguments.gpu)
        if kept is not None:
            _say(f"{_place(kept)}, warm")
            try:
                self._run_in(kept, arguments, cell, send)
                return
            except KeeperError as error:
                if error.code not in GONE:
                    raise
            _say("it is gone, with its variables; another one takes its place")
        self._run_in(self._started(arguments.gpu), arguments, cell, send)

    def _started(self, gpu: str | None) -> Mapping[str, Any]:
        """A new sandbox with a running kernel; says where it is and how it was started."""
        assert self._api is not None
        info = self._warm[gpu] = self._api.create(gpu=gpu)
        try:
            with contextlib.closing(self._api.run(str(info["id"]), "", send={}, get=())) as first:
                while first.next() is not None:
                    pass
        except BaseException:
            self._drop(gpu)
            raise
        how = "from a template" if first.done.get("started_from") == "template" else "cold"
        took = first.done.get("started_ms")
        _say(f"{_place(info)}, started {how}" + (f" in {took:.0f} ms" if took else ""))
        return info

    def _run_in(self, info: Mapping[str, Any], arguments: Arguments, cell: str, send: Mapping[str, Any]) -> None:
        assert self._api is not None
        run = self._api.run(str(info["id"]), cell, send=send, get=arguments.get)
        try:
            with contextlib.closing(run):
                error = self._follow(str(info["id"]), run)
        except BaseException:
            # Nobody knows what it is doing now, so the next cell does not go there.
            self._drop(arguments.gpu)
            raise
        if error is not None:
            raise error
        self._shell.user_ns.update(run.values())

    def _follow(self, sandbox_id: str, run: Run) -> BaseException | None:
        """Show what the cell shows until it has ended; what it raised, if it did."""
        assert self._api is not None
        error: BaseException | None = None
        stopping: threading.Timer | None = None
        try:
            while True:
                try:
                    message = run.next()
                    if message is None:
                        return error
                    if message["msg_type"] == "error":
                        error = RemoteError.of(message["content"])
                    else:
                        self._show(message)
                except KeyboardInterrupt:
                    if stopping is not None:
                        raise
                    stopping = threading.Timer(STOP_TIMEOUT_S, run.abort, [NOT_STOPPED])
                    stopping.daemon = True
                    stopping.start()
                    self._api.interrupt(sandbox_id)
        finally:
            if stopping is not None:
                stopping.cancel()
            sys.stdout.flush()
            sys.stderr.flush()

    def _show(self, message: Mapping[str, Any]) -> None:
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            stream = sys.stderr if content.get("name") == "stderr" else sys.stdout
            stream.write(content.get("text", ""))
        elif kind == "clear_output":
            self._shell.display_pub.clear_output(wait=bool(content.get("wait")))  # type: ignore[no-untyped-call]
        elif kind in ("display_data", "update_display_data", "execute_result"):
            self._shell.display_pub.publish(
                content.get("data", {}),
                content.get("metadata", {}),
                transient=content.get("transient", {}),
                update=kind == "update_display_data",
            )

    def _drop(self, gpu: str | None, *, timeout: float = ANSWER_TIMEOUT_S) -> None:
        info = self._warm.pop(gpu, None)
        if info is not None and self._api is not None:
            with contextlib.suppress(KeeperError):
                self._api.delete(str(info["id"]), timeout=timeout)


def _say(text: str) -> None:
    print(f"Remote: {text}", flush=True)  # noqa: T201 - it is the cell's output.


def _place(info: Mapping[str, Any]) -> str:
    """Where that sandbox is, in a few words."""
    names: dict[str, int] = {}
    for gpu in info.get("gpus") or []:
        name = str(gpu.get("name")) + (" (simulated)" if gpu.get("simulated") else "")
        names[name] = names.get(name, 0) + 1
    what = ", ".join(f"{count} × {name}" if count > 1 else name for name, count in names.items()) or "CPU"
    open_ = "" if info.get("isolated", True) else ", not isolated"
    return f"sandbox {info.get('id')} on {what}{open_}"
