"""What a kernel does before it is saved and after it has come back, asked for on its control channel.

It is done in the control thread, so also while a cell runs; the messages and their order are those of
docs/explanation/guest-protocol.md.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..magics import doors
from . import displays, gpu_memory, graphics, hooks, iopub, newborn
from .contexts import Contexts
from .offloading import Offload
from .refused import ConflictError, RefusedError
from .replies import Replies

OUTPUT_TIMEOUT_S = 50.0
CONNECTIONS_TIMEOUT_S = 5.0
"""How long requests to the keeper that are under way have to end before a snapshot is refused."""

TOKEN_MAX = 200

KINDS = ("", "cuda", "cpu")
"""Of devices that torch may be asked to empty; the last one stands for GPUs that are made up."""


class Saving:
    """The three requests, for one kernel and its contexts."""

    def __init__(self, app: Any, contexts: Contexts) -> None:
        self._app = app
        self._contexts = contexts
        self._token = ""
        self._replies = Replies(app.kernel.session, app.control_thread)
        self._offload = Offload(_MainLoop(app.kernel))

    def install(self) -> None:
        """Take the requests from now on."""
        survive_traps()
        for name, handler in (
            ("before_snapshot", self._before_snapshot),
            ("after_restore", self._after_restore),
            ("go_on", self._go_on),
        ):
            self._app.kernel.control_handlers[f"warmcell_{name}_request"] = self._answering(name, handler)

    def _answering(
        self, name: str, handler: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> Callable[[Any, Any, Any], None]:
        def handle(stream: Any, identities: Any, request: Any) -> None:
            try:
                content = {"status": "ok", **handler(request["content"])}
            except Exception as error:
                words = str(error) or type(error).__name__
                content = {"status": "error", "ename": type(error).__name__, "evalue": words, "traceback": []}
                content["hint"] = getattr(error, "hint", "")
            session = self._app.kernel.session
            session.send(stream, f"warmcell_{name}_reply", content, request, ident=identities)

        return handle

    def _before_snapshot(self, content: Mapping[str, Any]) -> dict[str, Any]:
        token = content.get("token")
        if not isinstance(token, str) or not 0 < len(token) <= TOKEN_MAX:
            raise RefusedError("A snapshot needs a token")
        kind = content.get("offload") or ""
        if kind not in KINDS:
            raise RefusedError(f"{kind!r} is no kind of device", "Ask for one of " + ", ".join(KINDS[1:]))
        if kind:
            self._offload.check(kind)
        else:
            gpu_memory.check()
        hooks.run(hooks.before, when="before a snapshot")
        self._contexts.rest()
        if not doors.shut(timeout=CONNECTIONS_TIMEOUT_S):
            raise ConflictError(
                "A cell is waiting for another sandbox, as with %%remote, and is connected to it",
                "Wait until that has ended, or stop it: %remote lists it.",
            )
        try:
            # No garbage collection: it would write to every object, and so copy what clones and later snapshots share.
            # What a template has imported stays for ever, so its kernels' collections need not look at it either. What
            # a notebook has may become garbage, and has to be found then.
            if content.get("template") is True:
                gc.collect()
                gc.freeze()
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            graphics.let_go()
            self._replies.hold()
            self._in_order(self._hold)
            # The last step: the way back may have no room on the device, and nothing else could be undone then.
            moved = self._offload.take(kind) if kind else 0
        except BaseException:
            self._replies.let_go()
            self._app.iopub_thread.schedule(self._let_go)
            doors.reopen()
            raise
        self._token = token
        return {"moved_bytes": moved} if kind else {}

    def _after_restore(self, content: Mapping[str, Any]) -> dict[str, Any]:
        token = content.get("token")
        if not self._token or token != self._token:
            raise RefusedError("This kernel is not the one that was saved: it does not know the snapshot's token")
        newborn.reseed()
        newborn.forget_files()
        change_environment(content.get("env") or {})
        time.tzset()
        cwd = content.get("cwd")
        if cwd:
            os.chdir(str(cwd))
        hooks.run(hooks.after, when="after a restore")
        self._contexts.renew(content.get("env") or {}, restored=True)
        self._token = ""
        doors.reopen()
        self._replies.let_go()
        self._in_order(self._let_go)
        return {"token": token}

    def _go_on(self, content: Mapping[str, Any]) -> dict[str, Any]:
        self._offload.bring_back()
        self._token = ""
        env = content.get("env") or {}
        change_environment(env)
        if env:
            try:
                self._contexts.renew(env, restored=False)
            except RefusedError as error:  # What keeps one of them busy is not to hold up all others.
                sys.stderr.write(f"{error} It goes on with the environment variables of before.\n")
        doors.reopen()
        self._replies.let_go()
        self._in_order(self._let_go)
        return {}

    def _hold(self) -> None:
        self._app.iopub_thread.hold()

    def _let_go(self) -> None:
        self._app.iopub_thread.let_go()

    def _in_order(self, what: Callable[[], None]) -> None:
        if not iopub.in_order(self._app.iopub_thread, what, timeout=OUTPUT_TIMEOUT_S):
            raise RefusedError(f"The kernel's output did not come to rest within {OUTPUT_TIMEOUT_S:g} s")


class _MainLoop:
    """The loop in which cells run. The kernel has it only when it serves."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def add_callback(self, what: Callable[[], None]) -> None:
        """Have that done there."""
        self._kernel.io_loop.add_callback(what)


def survive_traps() -> None:
    """Have this process outlive whoever writes its memory.

    What writes it makes threads trap. Killed just then it leaves them with the trap, which must not be their end;
    whoever puts them back takes them from the beginning of this handler.
    """
    if signal.getsignal(signal.SIGTRAP) == signal.SIG_DFL:
        signal.signal(signal.SIGTRAP, _trapped)


def _trapped(number: int, _: object) -> None:
    """A trap of the notebook's own: it ends the kernel, as it would anywhere."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(signal.Signals(number))


def change_environment(changes: Any) -> None:
    """Set these variables, or take away those that are null; what depends on them is worked out anew.

    Raises:
        RefusedError: They are not of that form.
    """
    if not isinstance(changes, Mapping) or not all(_is_change(*pair) for pair in changes.items()):
        raise RefusedError("env must have names with strings or null")
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if changes:
        graphics.renew()
        displays.renew()


def _is_change(name: object, value: object) -> bool:
    if not isinstance(name, str) or not name or "=" in name or "\0" in name:
        return False
    return value is None or (isinstance(value, str) and "\0" not in value)
