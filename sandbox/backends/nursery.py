"""Where the processes come from that become sandboxes: started anew, or forked by one that waits for that."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from warmcell.sandbox.backends.control import Control
from warmcell.sandbox.errors import SandboxStartError, WarmcellError

IMPORT = f"""import sys
package = sys.modules["backends"] = type(sys)("backends")
package.__path__ = [{str(Path(__file__).parent)!r}]
"""
"""An import, since a script itself would be compiled anew at each start; of this tree alone."""
START_STAGE = f"{IMPORT}from backends.stage.main import main\nmain(int(sys.argv[1]))"
START_NURSERY = f"{IMPORT}from backends.stage.nursery import main\nmain(int(sys.argv[1]), int(sys.argv[2]))"
START_NEST = f"{IMPORT}from backends.stage.nest import main\nmain(*map(int, sys.argv[1:]))"
STAGE_ENV: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}
FORK_TIMEOUT_S = 30.0


class Process(Protocol):
    """A child of this process; `asyncio.subprocess.Process` is one."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None:
        """None while it lives; -n if signal n ended it."""

    async def wait(self) -> int: ...

    def send_signal(self, signal: int, /) -> None: ...


async def start(
    control: socket.socket, stderr: int, *, prefix: Sequence[str] = (), env: Mapping[str, str] = STAGE_ENV
) -> Process:
    """Start a stage of its own interpreter.

    Args:
        control: Its end of the control socket.
        stderr: Likewise.
        prefix: A command that starts it.
        env: What that command has in its environment.
    """
    return await asyncio.create_subprocess_exec(
        *prefix,
        *(sys.executable, "-I", "-S", "-c", START_STAGE, str(control.fileno())),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=[control.fileno()],
        env=dict(env),
        cwd="/",
    )


class Nursery:
    """A process of this one's that forks stages, started when the first is wanted. On one loop, in one thread."""

    def __init__(self) -> None:
        self._forking = asyncio.Lock()
        self._server: asyncio.subprocess.Process | None = None
        self._connection: socket.socket | None = None
        self._control: Control | None = None
        self._useless = False

    async def start(self, control: socket.socket, stderr: int, *, alone: bool = False) -> Process:
        """As the function; where nothing can be forked, it does what that does.

        Args:
            control: The stage's end of the control socket.
            stderr: Likewise.
            alone: Whether it is to be the first process of a pid namespace; else, or where that cannot be, its plan
                may still make it go on as one.
        """
        if not self._useless:
            work = asyncio.ensure_future(self._fork(control, stderr, b"1" if alone else b"."))
            try:
                forked = await asyncio.shield(work)
            except asyncio.CancelledError:
                with contextlib.suppress(WarmcellError):
                    if (child := await work) is not None:
                        child.send_signal(signal.SIGKILL)
                        await child.wait()
                raise
            if forked is not None:
                return forked
        return await start(control, stderr)

    async def open(self) -> None:
        """Start it now, so that the first need not wait for it. Idempotent."""
        async with self._forking:
            if self._connection is None:
                self._connection, self._control = await self._begin()

    async def close(self) -> None:
        """End it; what it has forked lives on. Idempotent."""
        async with self._forking:
            await self._end()

    async def _fork(self, control: socket.socket, stderr: int, how: bytes) -> "Forked | None":
        """None where nothing can be forked, and nothing was.

        Raises:
            WarmcellError: It is not known whether anything was.
        """
        async with self._forking:
            if self._server is not None and self._server.returncode is not None:
                await self._end()
            if self._connection is None or self._control is None:
                self._connection, self._control = await self._begin()
            try:
                socket.send_fds(self._connection, [how], [control.fileno(), stderr])
            except OSError:
                await self._end()
                return None
            try:
                said = await self._control.line(FORK_TIMEOUT_S)
                if said is None:
                    raise SandboxStartError("What starts sandboxes has ended", hint="Try again.")
            except BaseException:
                await self._end()
                raise
            if "pid" not in said:
                self._useless = True
                await self._end()
                return None
            (pidfd,) = self._control.take_fds()
            return Forked(said["pid"], pidfd)

    async def _begin(self) -> tuple[socket.socket, Control]:
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                self._server = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", "-c", START_NURSERY, str(theirs.fileno()), str(os.getpid())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=dict(STAGE_ENV),
                    cwd="/",
                )
            undo.pop_all()
        ours.setblocking(False)
        return ours, Control(ours)

    async def _end(self) -> None:
        if self._control is not None:
            self._control.close()  # The connection with it.
        self._connection = self._control = None
        server, self._server = self._server, None
        if server is not None:
            with contextlib.suppress(ProcessLookupError):
                server.kill()
            await server.wait()


class Forked:
    """A child that was not started by asyncio. It is reaped as soon as it ends."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._loop.add_reader(pidfd, self._reap)

    async def wait(self) -> int:
        """Wait for its end; any number may wait."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signal_: int, /) -> None:
        """Nothing happens where it has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal_)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        self.returncode = os.waitstatus_to_exitcode(status) if pid else -signal.SIGKILL
        os.close(self._pidfd)
        self._pidfd = -1
        self._ended.set()
