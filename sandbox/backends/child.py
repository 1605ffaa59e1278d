"""The host's end of a process that was started through the stage: its words, its end, its death."""

import asyncio
import contextlib
import marshal
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from warmcell.sandbox.backends.cgroups import Cgroup
from warmcell.sandbox.backends.control import Control
from warmcell.sandbox.backends.nursery import STAGE_ENV, Forked, Nursery, Process, start
from warmcell.sandbox.errors import WarmcellError

TAIL_BYTES = 4096
READ_BYTES = 65536
READ_PAUSE_S = 0.05
"""Pause after each read of what a sandbox says on stderr, so that a flood of it costs the keeper little."""
START_TIMEOUT_S = 60.0


class StageFailedError(Exception):
    """What was started ended before it was up; `step` says where, `stderr` what was said."""

    def __init__(self, step: str, error: int, stderr: str) -> None:
        super().__init__(f"{step}: {os.strerror(error)}" if error else step)
        self.step = step
        self.errno = error
        self.stderr = stderr


class Tail:
    """The last words that come through a pipe, read at a modest pace whatever the other side does."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._said = b""
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._on_data)

    @property
    def text(self) -> str:
        """At most the last 4 KiB."""
        if self._fd >= 0:
            self._read()
        return self._said.decode(errors="replace")

    def close(self) -> None:
        """Read no more. Idempotent."""
        if self._pause is not None:
            self._pause.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_data(self) -> None:
        self._loop.remove_reader(self._fd)
        if self._read():
            self._pause = self._loop.call_later(READ_PAUSE_S, self._loop.add_reader, self._fd, self._on_data)

    def _read(self) -> bool:
        """False at the end."""
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return True
        self._said = (self._said + data)[-TAIL_BYTES:]
        return bool(data)


class Child:
    """A process that was started through the stage. Made by `start`; ends by itself or by `kill`."""

    def __init__(self, process: Process, control: socket.socket, tail: Tail, cgroup: Cgroup | None) -> None:
        self._process = process
        self._control = Control(control)
        self._tail = tail
        self._cgroup = cgroup
        self._reported = False

    @classmethod
    async def start(
        cls,
        plan: Mapping[str, Any],
        *,
        cgroup: Cgroup | None = None,
        nursery: Nursery | None = None,
        nest: Sequence[int] = (),
    ) -> "Child":
        """Start the stage from this thread, whose end is the child's end, and give it its plan.

        Args:
            plan: What `stage.main.main` carries out.
            cgroup: The group that the plan names, or that a command has to start the stage in.
            nursery: Where it is forked, if that can be.
            nest: Descriptors of the nest in which the plan says that it goes on.
        """
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            reading, writing = os.pipe2(os.O_CLOEXEC)
            tail = Tail(reading)
            undo.callback(tail.close)
            try:
                process: Process
                if cgroup is not None and cgroup.prefix:
                    env = {**STAGE_ENV, **cgroup.env}
                    process = await start(theirs, writing, prefix=cgroup.prefix, env=env)
                elif nursery is not None:
                    clones = (plan.get("mounts") or {}).get("clones", ())
                    swaps = {made["swap"] for made in clones if made.get("swap")}
                    process = await nursery.start(theirs, writing, alone=bool(plan.get("alone")), swaps=sorted(swaps))
                else:
                    process = await start(theirs, writing)
            finally:
                theirs.close()
                os.close(writing)
            undo.pop_all()
        ours.setblocking(False)
        child = cls(process, ours, tail, cgroup)
        data = marshal.dumps(dict(plan))
        try:
            await asyncio.get_running_loop().sock_sendall(ours, len(data).to_bytes(8, "big") + data)
            if nest:
                child.send(b".", nest)
        except ConnectionError:
            pass  # It has ended; `line` tells why.
        except BaseException:
            await child.kill()
            raise
        return child

    def send(self, data: bytes, fds: Sequence[int]) -> None:
        """Send to what it has become; raises as `Control.send`."""
        self._control.send(data, fds)

    @property
    def pid(self) -> int:
        """Host pid of the process."""
        return self._process.pid

    @property
    def tail(self) -> str:
        """The last words on its stderr, at most 4 KiB."""
        return self._tail.text

    async def stage_report(self, *, timeout_s: float = START_TIMEOUT_S) -> tuple[dict[str, str], list[int]]:
        """What the stage reports, and the descriptors that it sent; the caller closes them.

        Raises:
            StageFailedError: It could not do what it was told.
            OperationTimeoutError: It said nothing for too long.
        """
        said = await self.line(timeout_s=timeout_s)
        if "pid" in said:
            await self._go_on(said["pid"])
            said = await self.line(timeout_s=timeout_s)
        self._reported = True
        if self._cgroup is not None and self._cgroup.prefix:
            await asyncio.to_thread(self._cgroup.started, self.pid)
        fds = self._control.take_fds()
        if "failed" in said:
            raise StageFailedError(said["failed"], said["errno"], self.tail)
        return said["stage"], fds

    async def _go_on(self, pid: int) -> None:
        """It goes on as another process, in another pid namespace."""
        before, self._process = self._process, Forked(pid, self._control.take_fd())
        await before.wait()

    async def line(self, *, timeout_s: float | None = START_TIMEOUT_S) -> dict[str, Any]:
        """The next JSON line on its control socket.

        Raises:
            StageFailedError: It ended instead.
            OperationTimeoutError: It said nothing for too long.
        """
        said = await self._control.line(timeout_s)
        if said is None:
            code = await self.wait()
            raise StageFailedError(f"it ended with exit code {code}", 0, self.tail)
        return said

    async def executed(self) -> None:
        """Wait until the stage has become what it was told to become; what its end then is, `wait` tells.

        Raises:
            StageFailedError: It could not.
        """
        said = await self._control.line(START_TIMEOUT_S)
        if said is not None:
            raise StageFailedError(said["failed"], said["errno"], self.tail)

    async def wait(self) -> int:
        """Wait for its end; the exit code as a shell says it. Any number may wait."""
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    @property
    def ended(self) -> bool:
        """Whether it is gone and reaped."""
        return self._process.returncode is not None

    async def kill(self) -> int:
        """Kill it, wait for its end and close everything that belongs to it. Idempotent."""
        await self._end()
        if not self._reported:
            with contextlib.suppress(WarmcellError):
                said = await self._control.line(0)
                if said is not None and "pid" in said:  # It had just gone on as another.
                    await self._go_on(said["pid"])
                    await self._end()
        self.close()
        return await self.wait()

    async def _end(self) -> None:
        if not self.ended:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)
        await self.wait()

    def close(self) -> None:
        """Close what belongs to it on this side. Idempotent."""
        self._tail.close()
        self._control.close()
