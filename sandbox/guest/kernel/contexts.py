"""Further contexts of a kernel: each is a process of its own, with an IPython of its own, below the kernel's.

They run at once, and one that ends, hangs or is restarted leaves the others alone. As they are in the kernel's tree of
processes they are saved, restored and cloned with it, and as all that they say goes through the kernel's sockets they
have no connection to the outside.

The keeper asks on the control channel, `warmcell_context_request` with an `action`: `start`, `run`, `interrupt`, `end`.
The answer says that it was heard. What comes of a start or a run is published, with the header that came with it as its
parent: output, then an `execute_reply`, then idle.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from . import iopub
from .context_channel import Channel
from .refused import ConflictError, RefusedError

REST_TIMEOUT_S = 20.0
"""How long contexts have to get ready to be saved, or to freshen up."""

END_TIMEOUT_S = 10.0
SAID_TIMEOUT_S = 60.0
ENDED = -1
"""In the place of a number: there will be no answer."""

HEARD_MAX = 1000
"""Requests that are known, so that one that is sent again is not run twice."""

CONTEXTS_MAX = 64
"""Of one kernel; each takes some 40 MiB."""

Publish = Callable[[Mapping[str, Any], Mapping[str, Any]], None]


def installed(app: Any) -> Contexts:
    """Those of this kernel, which takes requests about them from now on."""
    made = Contexts(app)
    app.kernel.control_handlers["warmcell_context_request"] = made.handle
    os.register_at_fork(after_in_child=made.leave_to_parent)
    return made


class Context:
    """One of them, from its start to its end."""

    def __init__(self, publisher: Any, publish: Publish, cwd: str) -> None:
        """Start its process.

        Raises:
            OSError: It cannot be, as where there is no such directory.
        """
        self._publisher, self._publish = publisher, publish
        self._open: dict[str, Mapping[str, Any]] = {}
        """Header of each request that has no reply yet, by its id."""
        self._starts: list[Mapping[str, Any]] = []
        self._ready = threading.Event()
        self._sending: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._asked = 0
        """Number of the last question of `ask`, which its answer has: the one before may be answered too late."""
        self._lock = threading.Lock()
        self._why = ""
        self._ending = False
        own, its = Channel.pair()
        enter = os.path.join(os.path.dirname(sys.modules["warmcell_guest"].__file__ or ""), "enter.py")
        try:
            self._process = subprocess.Popen(
                [sys.executable, enter, "kernel.context_process", str(its.fileno())],
                cwd=cwd or None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                start_new_session=True,
            )
        except OSError:
            own.close()
            raise
        finally:
            its.close()
        self._end = own
        self._channel = Channel(own)
        for what in (self._relay, self._send, self._wait):
            threading.Thread(target=what, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._process.returncode is None and not self._ending

    def started(self, header: Mapping[str, Any]) -> None:
        """Reply to that request when it is up."""
        with self._lock:
            if self.alive and not self._ready.is_set():
                self._starts.append(header)
                return
        self._reply(header, {"status": "ok"} if self._ready.is_set() else self._death())

    def run(self, request: Mapping[str, Any]) -> None:
        """Have it run that when what it has been given before has ended."""
        header = request["header"]
        with self._lock:
            if self.alive:
                self._open[header["msg_id"]] = header
                self._sending.put([b"run", json.dumps(request).encode()])
                return
        self._reply(header, self._death())

    def interrupt(self, name: str) -> None:
        """Interrupt that request, or have it never begin."""
        self._sending.put([b"interrupt", json.dumps(name).encode()])

    def end(self) -> None:
        """Kill it and the programs that it runs. What it was asked is replied to as aborted."""
        self._ending = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)

    def ask(self, kind: bytes, told: Any) -> None:
        """Have it get ready to be saved, or freshen up; `answer` waits for it."""
        self._asked += 1
        self._sending.put([kind, json.dumps(told).encode(), str(self._asked).encode()])

    def answer(self) -> str:
        """Why it cannot do what it was asked last; empty: it has, or has ended.

        Raises:
            queue.Empty: It does not say in time.
        """
        until = time.monotonic() + REST_TIMEOUT_S
        while True:
            asked, why = self._done.get(timeout=max(0.0, until - time.monotonic()))
            if asked in (self._asked, ENDED):
                return why

    def leave_to_parent(self) -> None:
        """In a forked child: this end is the kernel's alone."""
        self._end.close()

    # Each in a thread of its own.

    def _send(self) -> None:
        while frames := self._sending.get():
            with contextlib.suppress(OSError):  # It has ended.
                self._channel.send(frames)

    def _wait(self) -> None:
        self._process.wait()
        with contextlib.suppress(OSError):  # Its own children may hold the other end.
            self._end.shutdown(2)

    def _relay(self) -> None:
        while (frames := self._channel.receive()) is not None:
            kind = frames[0]
            if kind == b"said":
                # No faster than they go out: what it floods fills its own channel, and it waits.
                iopub.in_order(
                    self._publisher,
                    lambda said=frames[1:]: self._publisher._really_send(said),  # type: ignore[misc]
                    timeout=SAID_TIMEOUT_S,
                )
            elif kind == b"ready":
                with self._lock:
                    self._ready.set()
                    starts, self._starts = self._starts, []
                for header in starts:
                    self._reply(header, {"status": "ok"})
            elif kind == b"failed":
                self._why = json.loads(frames[1])
            elif kind == b"done":
                with self._lock:
                    self._open.pop(frames[1].decode(), None)
            elif kind == b"did":
                self._done.put((int(frames[2]), json.loads(frames[1])))
        self._process.wait()
        with self._lock:
            left = [*self._starts, *self._open.values()]
            self._starts, self._open = [], {}
        self._done.put((ENDED, ""))
        self._sending.put([])
        for header in left:
            self._reply(header, {"status": "aborted"} if self._ending else self._death())
        self._end.close()

    def _death(self) -> Mapping[str, Any]:
        code = self._process.returncode or 0
        return {"status": "died", "exit_code": 128 - code if code < 0 else code, "why": self._why}

    def _reply(self, header: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        self._publish(header, content)


class Contexts:
    """All of one kernel."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._all: dict[str, Context] = {}
        self._heard: OrderedDict[str, None] = OrderedDict()

    def handle(self, stream: Any, identities: Any, request: Any) -> None:
        """Take a request (ipykernel's hook). In the control thread, so nothing here waits for long."""
        try:
            self._do(request["content"])
            content: dict[str, Any] = {"status": "ok"}
        except Exception as error:
            words = str(error) or type(error).__name__
            content = {"status": "error", "ename": type(error).__name__, "evalue": words, "traceback": []}
            content["hint"] = getattr(error, "hint", "")
        session = self._app.kernel.session
        session.send(stream, "warmcell_context_reply", content, request, ident=identities)

    def rest(self) -> None:
        """Have all of them get ready to be saved.

        Raises:
            RefusedError: One of them cannot, or does not answer.
        """
        self._ask(b"rest", None)

    def renew(self, env: Mapping[str, Any], *, restored: bool) -> None:
        """Have all of them take over these variables, and fresh randomness where they were `restored`.

        Raises:
            RefusedError: One of them cannot, or does not answer.
        """
        self._ask(b"renew", {"env": dict(env), "restored": restored})

    def leave_to_parent(self) -> None:
        """In a forked child: they are the kernel's alone."""
        for one in self._all.values():
            one.leave_to_parent()
        self._all = {}

    def _do(self, content: Mapping[str, Any]) -> None:
        action, name = content["action"], str(content["context"])
        found = self._all.get(name)
        if action == "interrupt":
            if found is not None:
                found.interrupt(str(content["run"]))
        elif action == "end":
            if found is not None:
                del self._all[name]
                found.end()
        elif action in ("start", "run"):
            header = content["header"]
            if header["msg_id"] in self._heard:
                return
            living = self._living(name, str(content.get("cwd") or ""))
            if action == "start":
                living.started(header)
            else:
                living.run({"header": header, "content": content["content"], "env": content.get("env") or {}})
            self._heard[header["msg_id"]] = None
            while len(self._heard) > HEARD_MAX:
                self._heard.popitem(last=False)
        else:
            raise RefusedError(f"{action!r} is nothing that contexts do")

    def _living(self, name: str, cwd: str) -> Context:
        found = self._all.get(name)
        if found is None or not found.alive:
            self._all = {key: one for key, one in self._all.items() if one.alive}
            if len(self._all) >= CONTEXTS_MAX:
                raise ConflictError(f"{CONTEXTS_MAX} contexts have a process", "Remove one that is not needed.")
            found = self._all[name] = Context(self._app.iopub_thread, self._reply, cwd)
        return found

    def _reply(self, header: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Publish how a request has ended, after all that was said of it."""
        session, socket = self._app.kernel.session, self._app.kernel.iopub_socket
        parent = {"header": dict(header)}
        for kind, said in (("execute_reply", content), ("status", {"execution_state": "idle"})):
            session.send(socket, session.msg(kind, dict(said), parent=parent), ident=[b"context"])

    def _ask(self, kind: bytes, told: Any) -> None:
        living = {name: one for name, one in self._all.items() if one.alive}
        for one in living.values():
            one.ask(kind, told)
        for name, one in living.items():
            try:
                why = one.answer()
            except queue.Empty:
                raise ConflictError(
                    f"The context {name} does not answer", "Wait until its code has ended, or restart it."
                ) from None
            if why:
                raise RefusedError(f"In the context {name}: {why}")
