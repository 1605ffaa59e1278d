"""An IPython of a context's own: what it is asked comes from the kernel that has started it, what it says goes there.

It is ipykernel's kernel without its sockets, so cells are run, shown and interrupted as in any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import zmq
from ipykernel.iostream import IOPubThread
from ipykernel.ipkernel import IPythonKernel
from jupyter_client.session import Session
from tornado.ioloop import IOLoop
from traitlets.config import Config

from . import displays, graphics, hooks, iopub, module, newborn, offline, saving, travelling
from .context_channel import Channel

TOPIC = b"context"
"""Under which replies are published: they come among the output, in its order."""


class ContextKernel(IPythonKernel):
    """Of this process."""

    _channel: Channel
    _asked: queue.SimpleQueue[Mapping[str, Any]]
    _waiting: set[str]
    """Requests that have not begun, by their id; of these, those that are not to."""
    _withdrawn: set[str]
    _runs: str
    """Id of the request that runs; empty: none does."""
    _come: asyncio.Event

    @classmethod
    def made(cls, channel: Channel) -> ContextKernel:
        """The one of this process, with its standard streams."""
        session = Session(key=b"")
        publisher = IOPubThread(_Outlet(channel), session=session)  # type: ignore[no-untyped-call]
        publisher.start()  # type: ignore[no-untyped-call]
        for name in ("stdout", "stderr"):
            setattr(sys, name, iopub.Stream(session, publisher, name))  # type: ignore[no-untyped-call]
        if "" not in sys.path:
            sys.path.insert(0, "")  # As kernels have it: modules of the directory are found.
        with _nobody_debugs():
            made = cls._made(session, publisher)
        made._execute_sleep = 0.0
        made._channel = channel
        made._asked = queue.SimpleQueue()
        made._waiting = set()
        made._withdrawn = set()
        made._runs = ""
        saving.survive_traps()
        offline.install()
        graphics.install()
        displays.install(made.shell)
        travelling.install(made)
        module.offer()
        return made

    @classmethod
    def _made(cls, session: Session, publisher: IOPubThread) -> ContextKernel:
        return cls.instance(
            # Snapshots and forks must not share an open database.
            config=Config({"HistoryManager": {"enabled": False}}),
            session=session,
            iopub_thread=publisher,
            iopub_socket=publisher.background_socket,
            log=logging.getLogger(__name__),
            shell_channel_thread=SimpleNamespace(parent_thread=threading.main_thread()),
        )

    def serve(self) -> None:
        """Run what comes, until the kernel has gone."""
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self.io_loop = IOLoop.current()
        self._come = asyncio.Event()
        threading.Thread(target=self._read, args=(loop,), daemon=True).start()
        serving = loop.create_task(self._serve())
        while not serving.done():
            with contextlib.suppress(KeyboardInterrupt):  # It came in between, in the loop itself.
                loop.run_until_complete(serving)

    async def _serve(self) -> None:
        while True:
            await self._come.wait()
            self._come.clear()
            while not self._asked.empty():
                await self._run(self._asked.get())

    async def _run(self, request: Mapping[str, Any]) -> None:
        """One request, from its busy to its idle. One interrupt may come while it is `_runs`."""
        header = request["header"]
        message = {
            **{"header": header, "msg_id": header["msg_id"], "msg_type": header["msg_type"]},
            **{"parent_header": {}, "metadata": {}, "content": request["content"], "buffers": []},
        }
        self.set_parent([], message, channel="shell")  # type: ignore[no-untyped-call]
        self._publish_status("busy", "shell")  # type: ignore[no-untyped-call]
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._runs = header["msg_id"]
            self._waiting.discard(self._runs)
            if self._runs in self._withdrawn:
                self._reply({"status": "aborted"}, message)
            else:
                saving.change_environment(request["env"])
                await self.execute_request(self.iopub_socket, [TOPIC], message)  # type: ignore[no-untyped-call]
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:  # Before the cell had begun, or after its end.
            self._reply({"status": "aborted"}, message)
        except Exception as error:
            told = {
                "ename": type(error).__name__,
                "evalue": str(error),
                "traceback": traceback.format_exc().split("\n"),
            }
            self._reply({"status": "error", **told}, message)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._runs = ""
        self._withdrawn.discard(header["msg_id"])
        self._publish_status("idle", "shell")  # type: ignore[no-untyped-call]
        self.iopub_thread.schedule(lambda: self._channel.send([b"done", header["msg_id"].encode()]))

    def _reply(self, content: Mapping[str, Any], message: dict[str, Any]) -> None:
        assert self.session is not None
        self.session.send(self.iopub_socket, "execute_reply", dict(content), message, ident=[TOPIC])

    # In a thread of its own, so also while a cell runs.

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        while (frames := self._channel.receive()) is not None:
            kind, told = frames[0], json.loads(frames[1])
            if kind == b"run":
                self._waiting.add(told["header"]["msg_id"])
                self._asked.put(told)
                loop.call_soon_threadsafe(self._come.set)
            elif kind == b"interrupt":
                self._interrupt(told)
            else:
                self._channel.send([b"did", json.dumps(self._done(kind, told)).encode(), frames[2]])
        os._exit(0)

    def _interrupt(self, name: str) -> None:
        if self._runs == name:
            os.killpg(os.getpgrp(), signal.SIGINT)
        elif name in self._waiting:
            self._withdrawn.add(name)

    def _done(self, kind: bytes, told: Any) -> str:
        """Get ready to be saved, or freshen up after it; why that cannot be."""
        try:
            if kind == b"rest":
                hooks.run(hooks.before, when="before a snapshot")
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                graphics.let_go()
            else:
                if told["restored"]:
                    newborn.reseed()
                    newborn.forget_files()
                saving.change_environment(told["env"])
                time.tzset()
                if told["restored"]:
                    hooks.run(hooks.after, when="after a restore")
        except Exception as error:
            return str(error) or type(error).__name__
        return ""


@contextlib.contextmanager
def _nobody_debugs() -> Iterator[None]:
    """Within this, ipykernel finds no debugger: nobody could attach to it, and it takes a fifth of a second to load."""
    known = sys.modules.get("debugpy")
    sys.modules["debugpy"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["debugpy"]
        if known is not None:
            sys.modules["debugpy"] = known


class _Outlet:
    """What ipykernel's thread for output takes for a socket."""

    def __init__(self, channel: Channel) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self._channel = channel

    def send_multipart(self, frames: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        """Whoever waits for that at the other end has gone if it fails; so will this process."""
        with contextlib.suppress(OSError):
            self._channel.send([b"said", *(bytes(frame) for frame in frames)])

    def close(self) -> None:
        """The channel is closed with the process."""
