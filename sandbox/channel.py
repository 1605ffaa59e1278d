"""The host's half of the guest protocol: talk with a sandbox's init over a socket in its run directory."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from warmcell.sandbox import guest_files
from warmcell.sandbox.background import Background
from warmcell.sandbox.errors import (
    CapacityError,
    NotFoundError,
    OperationTimeoutError,
    ProtocolError,
)
from warmcell.sandbox.guest_process import GuestProcess
from warmcell.sandbox.guest_wire import (
    RESTART,
    connect,
    gone,
    is_event,
    read_object,
    refusal,
    shown,
    socket_name,
    wait_for_socket,
    whole_number,
)
from warmcell.sandbox.models import MIB, ExecResult, StartedFrom

PROTOCOL = 1
LINE_MAX_BYTES = 4 * MIB
REQUEST_MAX_BYTES = 1 * MIB
STREAM_BUFFER_BYTES = 64 * 1024
"""Of what a sandbox sends to the host's proxy, so much waits in the keeper, twice."""
ANSWER_TIMEOUT_S = 60.0
"""For what init answers by itself at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who answers in a sandbox."""

    pid: int
    """As the guest sees it."""
    python: str
    """Version of the interpreter that init runs on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelStarted:
    """A kernel whose sockets are bound."""

    pid: int
    """As the guest sees it."""
    started_from: StartedFrom
    sockets: str
    """How the names of its sockets in the run directory begin; `-1` to `-5` follows."""
    why: str = ""
    """Why it is `cold` although the template was asked for."""


class GuestChannel:
    """Requests to one sandbox's init, each on a connection of its own."""

    def __init__(self, run_directory: Path, *, waits: bool = False) -> None:
        """Nobody is spoken with yet.

        Args:
            run_directory: The sandbox's run directory as the host sees it.
            waits: Its init does, and is to come with the first request.
        """
        self._run_directory = run_directory
        self._open: set[asyncio.StreamWriter] = set()
        self.came = asyncio.Event()
        """Set once its init is there."""
        self._coming: asyncio.Task[None] | None = None
        self._restored: list[int] = []
        """What init is to look after when it comes."""
        if not waits:
            self.came.set()
        self.asked = 0
        """Requests until now."""
        self._under_way = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is asked of the guest, and nothing that was asked for goes on."""
        return self._under_way == 0

    @classmethod
    async def open(cls, run_directory: Path, *, timeout: float = 10.0) -> Self:
        """Wait until the guest in `run_directory` serves requests.

        Args:
            run_directory: The sandbox's run directory as the host sees it.
            timeout: Seconds to wait.

        Raises:
            OperationTimeoutError: It did not come up in time.
            ProtocolError: Something else answers there, or another version of it.
        """
        channel = cls(run_directory)
        try:
            async with asyncio.timeout(timeout):
                await wait_for_socket(run_directory)
                await channel.hello()
        except TimeoutError as error:
            raise OperationTimeoutError(
                f"The sandbox's first process did not answer within {timeout:g} s",
                hint="Look at the sandbox's error for its last words; the machine may be overloaded.",
                details={"operation": "guest start", "timeout": timeout},
            ) from error
        return channel

    async def come(self) -> None:
        """Have its init come, if it waits.

        Raises:
            OperationTimeoutError: It did not come up in time.
            ProtocolError: The guest has put something in its way.
            TransportError: It was closed meanwhile.
        """
        if not self.came.is_set():
            if self._coming is None:
                self._coming = asyncio.create_task(self._come())
            try:
                await asyncio.shield(self._coming)
            except asyncio.CancelledError:
                if not self._coming.cancelled():
                    raise
                raise gone() from None  # Nobody has cancelled who asks.

    async def _come(self) -> None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                with guest_files.knocking(self._run_directory / guest_files.BEGIN):
                    await wait_for_socket(self._run_directory)
                await self.hello()
                for pid in self._restored:
                    with contextlib.suppress(NotFoundError):  # It has ended, as whoever restored it knows.
                        await self._ask({"op": "adopt", "pid": pid}, timeout=ANSWER_TIMEOUT_S)
        except TimeoutError as error:
            raise OperationTimeoutError(
                f"The sandbox's first process did not come within {ANSWER_TIMEOUT_S:g} s",
                hint="The machine may be overloaded; restart the sandbox if that stays so.",
                details={"operation": "guest start", "timeout": ANSWER_TIMEOUT_S},
            ) from error
        self.came.set()

    async def hello(self) -> Hello:
        """Ask who is there.

        Raises:
            TransportError: Nobody answers.
            ProtocolError: It is not a guest of this version.
        """
        answer = await self._ask({"op": "hello"}, timeout=ANSWER_TIMEOUT_S)
        if answer.get("protocol") != PROTOCOL:
            raise ProtocolError(
                f"The guest speaks protocol {shown(answer.get('protocol'))}, not {PROTOCOL}",
                hint="Restart the sandbox: it was started by another version of Warmcell.",
            )
        return Hello(pid=whole_number(answer, "pid"), python=str(answer.get("python", "")))

    async def prepare(self, preload: Sequence[str], *, name: str, env: Mapping[str, str] | None = None) -> None:
        """Start the fork server; its progress comes as events. An earlier one is replaced.

        Args:
            preload: Modules to import, in order.
            name: What the template is called in events.
            env: What is in its environment besides the sandbox's own. Kernels can come from the template only if
                they agree with it on the variables that interpreters and libraries read when they start.

        Raises:
            TransportError: The guest is gone.
        """
        request = {"op": "prepare", "preload": list(preload), "name": name, "env": _env(env)}
        await self._ask(request, timeout=ANSWER_TIMEOUT_S)

    async def start_kernel(
        self,
        connection: str,
        *,
        env: Mapping[str, str],
        cwd: str = "",
        engine: StartedFrom = "template",
        timeout: float = 60.0,
    ) -> KernelStarted:
        """Start a kernel and return once its sockets are bound. If this is cancelled it is killed.

        Args:
            connection: Path of the connection file, as the guest sees it.
            env: What it has in its environment besides the sandbox's own.
            cwd: Its directory, as the guest sees it; empty for its home.
            engine: `template` falls back to a cold start and says so; `cold` uses a fresh interpreter.
            timeout: Seconds allowed.

        Raises:
            SandboxStartError: It ended or failed before it could be talked to.
            InvalidRequestError: The directory does not exist in the sandbox.
            OperationTimeoutError: It was not ready in time; it is killed.
            TransportError: The guest is gone.
        """
        request = {"op": "kernel", "connection": connection, "env": dict(env), "cwd": cwd, "engine": engine}
        answer = await self._ask(request, timeout=timeout)
        started_from = answer.get("started_from")
        if started_from not in ("template", "cold"):
            raise ProtocolError(f"The guest said started_from {shown(started_from)}", hint=RESTART)
        return KernelStarted(
            pid=whole_number(answer, "pid"),
            started_from=started_from,
            sockets=socket_name(answer),
            why=str(answer.get("why", "")),
        )

    async def adopt(self, pid: int) -> None:
        """Let init look after a kernel that was restored in its sandbox, as after one that it has started.

        Its end comes as an event, with exit code -1 where the system does not tell it.

        Args:
            pid: As the guest sees it.

        Raises:
            NotFoundError: There is no such process.
            TransportError: The guest is gone.
        """
        if self._coming is None and not self.came.is_set():
            self._restored.append(pid)  # No reason to have init come.
        else:
            await self._ask({"op": "adopt", "pid": pid}, timeout=ANSWER_TIMEOUT_S)

    async def background(self) -> Background:
        """What runs in its sandbox besides kernels.

        Raises:
            ProtocolError: It says something else.
            TransportError: The guest is gone.
        """
        return Background.read(await self._ask({"op": "background"}, timeout=ANSWER_TIMEOUT_S))

    async def leave(self, until: str) -> None:
        """Let init end every connection with the host, this channel's too, and come back when a file appears.

        Args:
            until: Name of that file in the run directory.

        Raises:
            TransportError: The guest is gone.
            OperationTimeoutError: It did not leave in time.
        """
        request = {"op": "leave", "until": until}
        async with self._request(request, timeout=ANSWER_TIMEOUT_S) as (_, reader, _writer):
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await reader.read()
            except TimeoutError as error:
                raise OperationTimeoutError(
                    f"The guest did not leave within {ANSWER_TIMEOUT_S:g} s",
                    hint="The sandbox may be short of CPU or memory; restart it if that stays so.",
                    details={"operation": "leave", "timeout": ANSWER_TIMEOUT_S},
                ) from error
            except ConnectionError as error:
                raise gone() from error

    async def signal(self, pid: int, signum: int, *, group: bool = False) -> None:
        """Signal a kernel or a process of `exec`.

        Args:
            pid: As the guest sees it.
            signum: Number of the signal.
            group: Also to its process group.

        Raises:
            NotFoundError: It has ended, or is none of ours.
            TransportError: The guest is gone.
        """
        request = {"op": "signal", "pid": pid, "signum": signum, "group": group}
        await self._ask(request, timeout=ANSWER_TIMEOUT_S)

    async def exec(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        input: bytes = b"",
        timeout: float | None = None,
        output_max_bytes: int = 64 * MIB,
    ) -> ExecResult:
        """Run a command to its end. A command that cannot be found ends with exit code 127, as in a shell.

        Args:
            argv: The command; looked up on the PATH of its environment.
            env: What it has in its environment besides the sandbox's own.
            cwd: Its directory, as the guest sees it; empty for its home.
            input: Its standard input.
            timeout: Seconds allowed; None for no limit.
            output_max_bytes: The most that stdout and stderr may come to together.

        Raises:
            OperationTimeoutError: It took longer; it and its process group are killed.
            CapacityError: It printed more than `output_max_bytes`; killed too.
            TransportError: The sandbox is gone.
        """
        parts: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        size = 0
        try:
            async with asyncio.timeout(timeout), self.exec_stream(argv, env=env, cwd=cwd) as process:
                feeding = asyncio.create_task(process.feed(input))
                try:
                    async for name, content in process.output():
                        size += len(content)
                        if size > output_max_bytes:
                            break
                        parts[name].append(content)
                finally:
                    feeding.cancel()
                    await asyncio.gather(feeding, return_exceptions=True)
        except TimeoutError as error:
            raise OperationTimeoutError(
                f"{argv[0]} did not end within {timeout:g} s and was killed",
                hint="Give it a longer timeout.",
                details={"operation": "exec", "timeout": timeout},
            ) from error
        if size > output_max_bytes:
            raise CapacityError(
                f"{argv[0]} printed more than {output_max_bytes} bytes and was killed",
                hint="Let it write to a file, or read its output as a stream.",
            )
        assert process.exit_code is not None
        return ExecResult(
            stdout=b"".join(parts["stdout"]).decode(errors="replace"),
            stderr=b"".join(parts["stderr"]).decode(errors="replace"),
            exit_code=process.exit_code,
        )

    @contextlib.asynccontextmanager
    async def exec_stream(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        pty: tuple[int, int] | None = None,
    ) -> AsyncGenerator[GuestProcess]:
        """Start a process and hold its streams; on leaving it is killed if it still runs.

        Args:
            argv: The command; looked up on the PATH of its environment.
            env: What it has in its environment besides the sandbox's own.
            cwd: Its directory, as the guest sees it; empty for its home.
            pty: Give it a terminal of so many rows and columns; everything then comes as stdout.

        Raises:
            InvalidRequestError: The directory does not exist in the sandbox.
            TransportError: The sandbox is gone.
        """
        request: dict[str, Any] = {
            "op": "exec",
            "argv": list(argv),
            "env": _env(env),
            "cwd": cwd or "",
            "pty": pty is not None,
        }
        if pty is not None:
            request["size"] = list(pty)
        async with self._request(request, timeout=ANSWER_TIMEOUT_S) as (answer, reader, writer):
            yield GuestProcess(whole_number(answer, "pid"), reader, writer)

    @contextlib.asynccontextmanager
    async def files_stream(self) -> AsyncGenerator[GuestProcess]:
        """Start what does one thing with the sandbox's files (guest protocol: `files`); on leaving it is killed.

        Raises:
            TransportError: The sandbox is gone.
        """
        async with self._request({"op": "files"}, timeout=ANSWER_TIMEOUT_S) as (answer, reader, writer):
            yield GuestProcess(whole_number(answer, "pid"), reader, writer)

    @contextlib.asynccontextmanager
    async def forward(self, port: int) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Connect to a TCP port of the sandbox's loopback interface.

        Raises:
            NotFoundError: Nothing listens there.
            TransportError: The sandbox is gone.
        """
        request = {"op": "forward", "port": port}
        async with self._request(request, timeout=ANSWER_TIMEOUT_S) as (_, reader, writer):
            yield reader, writer

    async def listen(self, port: int) -> None:
        """Open a TCP port of the sandbox's loopback interface; who connects waits for `accept`.

        Raises:
            WarmcellError: The port is taken, or the sandbox is gone.
        """
        await self._ask({"op": "accept", "port": port, "wait": False}, timeout=ANSWER_TIMEOUT_S)

    @contextlib.asynccontextmanager
    async def accept(self, port: int) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Wait, however long, until something in the sandbox connects to a TCP port of its loopback interface.

        The port is open until whoever waits last is cancelled.

        Raises:
            WarmcellError: The port is taken, or the sandbox is gone.
        """
        request = {"op": "accept", "port": port}
        async with self._request(request, timeout=None, limit=STREAM_BUFFER_BYTES) as (_, reader, writer):
            yield reader, writer

    async def events(self) -> AsyncIterator[Mapping[str, Any]]:
        """The present state, with the latest ends of kernels, then every change, until the guest is gone.

        Each is checked: `{"event": "template", …}` has the fields of `TemplateStatus`, `{"event": "kernel", …}` has
        `pid`, `state` ("running" or "exited") and, when it has exited, `exit_code`. Other kinds are left out.

        Raises:
            TransportError: It was gone from the beginning.
            ProtocolError: It said something that is no event.
        """
        async with self._request({"op": "events"}, timeout=ANSWER_TIMEOUT_S) as (_, reader, _writer):
            while True:
                try:
                    line = await reader.readuntil(b"\n")
                except (asyncio.IncompleteReadError, ConnectionError):
                    return
                except asyncio.LimitOverrunError as error:
                    raise ProtocolError("The guest sent an endless line", hint=RESTART) from error
                event = read_object(line)
                if is_event(event):
                    yield event

    async def close(self) -> None:
        """Close the connections of all requests, which ends their streams."""
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.gather(self._coming, return_exceptions=True)
        for writer in list(self._open):
            writer.close()

    async def _ask(self, request: Mapping[str, object], *, timeout: float) -> Mapping[str, Any]:
        async with self._request(request, timeout=timeout) as (answer, _, _):
            return answer

    @contextlib.asynccontextmanager
    async def _request(
        self, request: Mapping[str, object], *, timeout: float | None, limit: int = LINE_MAX_BYTES
    ) -> AsyncGenerator[tuple[Mapping[str, Any], asyncio.StreamReader, asyncio.StreamWriter]]:
        """Send one request, check its answer and hold the connection."""
        line = json.dumps(request).encode() + b"\n"
        if len(line) > REQUEST_MAX_BYTES:
            raise CapacityError(
                f"A request of {len(line)} bytes is more than a sandbox takes",
                hint="Make the environment or the command shorter.",
            )
        if asyncio.current_task() is not self._coming:
            await self.come()
        self.asked += 1
        self._under_way += 1
        try:
            async with self._answered(line, request, timeout=timeout, limit=limit) as opened:
                yield opened
        finally:
            self._under_way -= 1

    @contextlib.asynccontextmanager
    async def _answered(
        self, line: bytes, request: Mapping[str, object], *, timeout: float | None, limit: int
    ) -> AsyncGenerator[tuple[Mapping[str, Any], asyncio.StreamReader, asyncio.StreamWriter]]:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):  # wait_for may lose a cancellation
            connection = await connect(self._run_directory)
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=limit)
        self._open.add(writer)
        try:
            try:
                async with asyncio.timeout(timeout):
                    writer.write(line)
                    answer = read_object(await reader.readuntil(b"\n"))
            except TimeoutError as error:
                raise OperationTimeoutError(
                    f"The guest did not answer {request['op']!r} within {timeout:g} s",
                    hint="The sandbox may be short of CPU or memory; restart it if that stays so.",
                    details={"operation": request["op"], "timeout": timeout},
                ) from error
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError) as error:
                raise gone() from error
            if answer.get("ok") is not True:
                raise refusal(answer)
            yield answer, reader, writer
        finally:
            self._open.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


def _env(env: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if env is None else dict(env)
