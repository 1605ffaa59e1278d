"""Templates that have a process of their own: it imports once, and the kernels of many sandboxes are forks of it.

For those who cannot keep templates as snapshots. Each has a nest, in which the sandboxes are made that its kernels
enter; both are there as long as one of these sandboxes is. Where a machine or a spec does not allow that, sandboxes
have fork servers of their own.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import socket
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from warmcell.sandbox import errors
from warmcell.sandbox.backends.base import SandboxBackend, SandboxInstance
from warmcell.sandbox.channel import KernelStarted
from warmcell.sandbox.guest.kernel.decided import DECIDED
from warmcell.sandbox.guest.supervisor.template import STEADY_SECONDS, read_at_start
from warmcell.sandbox.guest_wire import read_object, socket_name, whole_number
from warmcell.sandbox.models import SandboxSpec, TemplateStatus

log = logging.getLogger(__name__)

REPORT_MAX_BYTES = 64 * 1024


class Process(Protocol):
    """A template's process; `backends.bubblewrap.nest.TemplateProcess` is one."""

    env: Mapping[str, str]
    pid: int

    async def fork(self, instance: SandboxInstance, *, late: bool) -> socket.socket: ...
    async def wait(self) -> int: ...
    async def close(self) -> None: ...
    @property
    def words(self) -> str: ...


class Nest(SandboxBackend, Protocol):
    """Makes sandboxes, and the process whose forks enter them; `backends.bubblewrap.nest.Nest` is one."""

    async def start_template(
        self,
        spec: SandboxSpec,
        *,
        modules: Sequence[str],
        env: Mapping[str, str],
        told: Callable[[Mapping[str, Any]], None],
    ) -> Process: ...
    def environment(self, instance: SandboxInstance) -> Mapping[str, str] | None: ...
    async def close(self) -> None: ...


class Follower(Protocol):
    """A sandbox whose kernels come from the template."""

    def template_told(self, status: TemplateStatus) -> None: ...


class SharedTemplate:
    """One of them."""

    def __init__(self, nest: Nest, spec: SandboxSpec, *, left: Callable[[], None]) -> None:
        """`left` is called when no sandbox follows it any more."""
        self.nest = nest
        self._spec = spec
        self._left = left
        self._followers: set[Follower] = set()
        self._process: Process | None = None
        self._running: asyncio.Task[None] | None = None
        self._left_out: dict[str, str] = {}
        self._status = TemplateStatus(name=spec.template, state="none")
        self._unfit = False
        self._began = 0.0
        self._serves: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    @property
    def pids(self) -> Sequence[int]:
        """Host pid of its process, while that lives."""
        return () if self._process is None else (self._process.pid,)

    def follow(self, one: Follower) -> None:
        """That sandbox is made in its nest."""
        self._followers.add(one)

    def leave(self, one: Follower) -> None:
        """That sandbox has ended. Idempotent."""
        if one in self._followers:
            self._followers.remove(one)
            if not self._followers:
                self._left()

    async def prepare(self) -> bool:
        """Have it import, if it has not begun; its followers are told how that goes. False: it has no process here."""
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        if await asyncio.shield(self._serves):
            self._tell(self._status)
            return True
        return False

    def why_not(self, env: Mapping[str, str]) -> str:
        """Why a kernel with this environment cannot come from it now; empty if it can."""
        if self._process is None or self._status.state != "ready":
            return f"the template is in state {self._status.state}"
        wanted, given = read_at_start(env), read_at_start(self._process.env)
        differing = sorted(k for k in wanted.keys() | given.keys() if wanted.get(k) != given.get(k))
        return f"the template was imported with another {', '.join(differing)}" if differing else ""

    async def fork(self, instance: SandboxInstance, *, late: bool = False) -> socket.socket:
        """A kernel in a sandbox, which waits on that socket for what it is asked to be.

        Raises:
            SandboxStartError: There is none.
        """
        if self._process is None or self._status.state != "ready":
            raise errors.SandboxStartError("The template is not ready", hint="Start the kernel again.")
        return await self._process.fork(instance, late=late)

    def suits(self, env: Mapping[str, str]) -> bool:
        """Whether a kernel that has come up ahead can have that environment."""
        given = {} if self._process is None else self._process.env
        differing = {name for name in env.keys() | given.keys() if env.get(name) != given.get(name)}
        return not any(name.startswith(DECIDED) for name in differing)

    async def close(self) -> None:
        """End it, and all sandboxes in its nest. Idempotent."""
        if not self._serves.done():
            self._serves.set_result(False)
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        if self._process is not None:
            await self._process.close()
        await self.nest.close()

    async def _run(self) -> None:
        """Let a process import, and another one if it ended in the middle, without what has ended it."""
        while True:
            self._began = time.time()
            self._unfit = False
            self._status = self._next(state="importing", imported=(), failed=dict(self._left_out), importing="")
            modules = [name for name in self._spec.preload if name not in self._left_out]
            try:
                self._process = await self.nest.start_template(
                    self._spec, modules=modules, env=read_at_start(self._spec.env), told=self._told
                )
            except errors.WarmcellError as error:
                log.warning("template %s: %s", self._spec.template, error)
                if self._serves.done():
                    self._tell(self._next(state="failed", failed={"fork server": error.message}))
                else:
                    self._serves.set_result(False)
                return
            if not self._serves.done():
                self._serves.set_result(True)
            code = await self._process.wait()
            words = self._process.words.strip().splitlines()[-1:]
            self._process = None
            if not self._may_try_again(code, words):
                return

    def _may_try_again(self, code: int, words: Sequence[str]) -> bool:
        """Its process has ended: what is told of that, and whether another one may do better."""
        status = self._status
        how = f"was killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
        reason = ": ".join([f"the process {how}", *words])
        if status.state == "ready" and time.time() - self._began > STEADY_SECONDS:
            return True
        if not self._unfit and status.importing:
            self._left_out[status.importing] = reason
        elif not self._unfit:
            self._tell(self._next(state="failed", failed={**status.failed, "fork server": reason}))
            return False
        return self._unfit or status.importing in self._spec.preload

    def _told(self, said: Mapping[str, Any]) -> None:
        status = self._status
        if "importing" in said:
            self._tell(self._next(importing=str(said["importing"])))
        elif "imported" in said:
            self._tell(self._next(importing="", imported=(*status.imported, str(said["imported"]))))
        elif "failed" in said:
            failed = {**status.failed, str(said["failed"]): str(said.get("error", ""))}
            self._tell(self._next(importing="", failed=failed))
        elif "unfit" in said:
            self._left_out[str(said["unfit"])] = str(said.get("error", ""))
            self._unfit = True
        elif "ready" in said:
            self._tell(self._next(importing="", state="ready"))

    def _next(self, **changes: Any) -> TemplateStatus:
        now = time.time()
        return dataclasses.replace(self._status, since=now, seconds=round(now - self._began, 3), **changes)

    def _tell(self, status: TemplateStatus) -> None:
        self._status = status
        for follower in list(self._followers):
            follower.template_told(status)


async def ask(waiting: socket.socket, request: Mapping[str, Any], *, timeout_s: float) -> KernelStarted:
    """Let the kernel that waits there be the one that is asked for, and wait until it can be talked to.

    Raises:
        SandboxStartError: It is gone, or cannot come up.
        ProtocolError: It said what no kernel says.
        TimeoutError: It said nothing for too long.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(writing, True)
    reader = asyncio.StreamReader(limit=REPORT_MAX_BYTES)
    loop = asyncio.get_running_loop()
    try:
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [writing]))]
            waiting.sendmsg([json.dumps(request).encode()], rights)
        except OSError as error:
            os.close(reading)
            raise errors.SandboxStartError(f"The kernel is gone: {error.strerror}", hint="Start it again.") from error
        finally:
            os.close(writing)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb", buffering=0)
        )
        try:
            async with asyncio.timeout(timeout_s):
                while line := await reader.readline():
                    said: Mapping[str, Any] = {}
                    with contextlib.suppress(errors.ProtocolError):
                        said = read_object(line)
                    if "ready" in said:
                        pid = whole_number(said, "ready")
                        return KernelStarted(pid=pid, started_from="template", sockets=socket_name(said))
                    if "failed" in said:
                        raise errors.SandboxStartError(
                            f"The kernel could not start: {str(said['failed'])[:1000]}", hint="Start it again."
                        )
        except ValueError as error:
            raise errors.ProtocolError("A kernel said too much", hint="Start it again.") from error
        finally:
            transport.close()
        raise errors.SandboxStartError("The kernel ended before its sockets were bound", hint="Start it again.")
    finally:
        waiting.close()
