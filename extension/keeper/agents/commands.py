"""Processes in sandboxes that outlive whoever has started them, found again by their id."""

import asyncio
import base64
import binascii
import hashlib
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from warmcell.extension.keeper.agents import checks
from warmcell.extension.keeper.agents.output import Output, forget_oldest
from warmcell.sandbox import errors
from warmcell.sandbox.gpus.environment import environment as gpu_environment
from warmcell.sandbox.guest_process import FRAME_MAX_BYTES, GuestProcess
from warmcell.sandbox.live import LiveSandbox

RUNNING_MAX = 64
INPUT_MAX_BYTES = 8 * 2**20
INPUTS_KNOWN = 64
"""Pieces of input, the last ones, of which a repeat is known: who has not heard of one asks again within seconds."""

TERMINAL_SIDE_MAX = 10_000
PATH_MAX = 4096
TAG_MAX = 1024

SHOWN_MAX = 4096
"""Characters of the arguments of a command that has ended: they may be megabytes."""

AGAIN = "Start it again if it is still wanted."


class Command:
    """One process: what it was asked for, what it says, and how it ended."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """Nothing runs yet.

        Raises:
            InvalidRequestError: Something in the body is not of its form.
        """
        argv = body.get("argv")
        if not isinstance(argv, list) or not argv or not all(isinstance(one, str) and "\0" not in one for one in argv):
            raise errors.InvalidRequestError("`argv` must be a list of texts", hint='As in {"argv": ["ls", "-l"]}.')
        self.id = checks.new_id(body)
        self.argv: tuple[str, ...] = tuple(argv)
        self.cwd = checks.text(body, "cwd", "", most=PATH_MAX)
        self.env = checks.environment(body)
        self.tag = checks.text(body, "tag", "", most=TAG_MAX)
        self.timeout_s = checks.seconds(body, "timeout_s")
        self.keeps_stdin = checks.flag(body, "stdin")
        self.size = _size(body["pty"]) if body.get("pty") is not None else None
        self.input = _input(body)
        self.asked = checks.fingerprint(body)
        self.output = Output()
        self.pid = 0
        self.started_at = time.time()
        self.ended_at: float | None = None
        self.exit_code: int | None = None
        self.error: errors.WarmcellError | None = None
        self.received = 0
        """Bytes of input so far."""
        self._taken: dict[str, tuple[bytes, int]] = {}
        """By its key, what each piece of input is known by, and how much of it has been taken."""
        self._process: GuestProcess | None = None
        self._closed = False
        self._writing = asyncio.Lock()
        self._work: asyncio.Task[None] | None = None

    def info(self) -> dict[str, Any]:
        """CommandInfo."""
        return {
            "id": self.id,
            "argv": list(self.argv),
            "cwd": self.cwd,
            "tag": self.tag,
            "pid": self.pid,
            "pty": self.size is not None,
            "state": "running" if self.ended_at is None else "ended",
            "exit_code": self.exit_code,
            "error": None if self.error is None else self.error.to_json(),
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "output": self.output.next,
        }

    async def start(self, box: LiveSandbox, *, ended: Callable[[], None]) -> None:
        """Start it; returns when it has a pid, or did not get one. `ended` is called when it is over.

        Raises:
            WarmcellError: It was not started.
        """
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._work = asyncio.create_task(self._run(box, started))
        self._work.add_done_callback(lambda done: ended())
        await started

    async def write(self, data: bytes, *, key: str | None, close: bool) -> int:
        """Give it input at the pace at which it reads. How much it has had by then.

        Args:
            data: After all that has come before, whoever has sent that.
            key: What was taken already of the piece with this key is passed over. None: it is sent once.
            close: It is the end of its input.

        Raises:
            ConflictError: It has ended, takes no input, or the key was used for another piece.
        """
        said = hashlib.sha256(data).digest()
        async with self._writing:
            known, taken = (said, 0) if key is None else self._taken.get(key, (said, 0))
            if known != said:
                raise errors.ConflictError("This Idempotency-Key was used for other input", hint="Take a new one.")
            if taken >= len(data) and (self._closed or not close):  # All of it has come before.
                return self.received
            process = self._taking_input()
            if self._closed:
                raise errors.ConflictError(f"The input of command {self.id} has been ended", hint=AGAIN)
            for start in range(taken, len(data), FRAME_MAX_BYTES):
                piece = data[start : start + FRAME_MAX_BYTES]
                self.received += len(piece)
                if key is not None:
                    self._note_taken(key, said, start + len(piece))
                await process.write(piece)
            if close:
                self._closed = True
                await process.close_stdin()
            return self.received

    async def signal(self, signum: int) -> None:
        """Send a signal to its process group. Nothing happens when it has ended."""
        if self._process is not None and self.ended_at is None:
            await self._process.send_signal(signum)

    async def resize(self, rows: int, columns: int) -> None:
        """Tell it the size of its terminal.

        Raises:
            ConflictError: It has none, or has ended.
        """
        if self.size is None or self._process is None or self.ended_at is not None:
            raise errors.ConflictError("It has no terminal", hint='Start it with {"pty": {"rows": 24, "columns": 80}}.')
        await self._process.resize(rows, columns)

    async def close(self) -> None:
        """Kill it and wait for its end. Idempotent."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    def _note_taken(self, key: str, said: bytes, count: int) -> None:
        self._taken.pop(key, None)
        self._taken[key] = said, count
        if len(self._taken) > INPUTS_KNOWN:
            del self._taken[next(iter(self._taken))]

    def _taking_input(self) -> GuestProcess:
        if self._process is None or self.ended_at is not None:
            raise errors.ConflictError(f"Command {self.id} has ended", hint=AGAIN)
        if not self.keeps_stdin and self.size is None:
            raise errors.ConflictError(f"Command {self.id} takes no input", hint='Start it with {"stdin": true}.')
        return self._process

    async def _run(self, box: LiveSandbox, started: "asyncio.Future[None]") -> None:
        try:
            env = {**await box.network_environment(), **box.spec.env, **gpu_environment(box.gpus), **self.env}
            async with box.exec_stream(self.argv, env=env, cwd=self.cwd, pty=self.size) as process:
                self._process, self.pid = process, process.pid
                if not started.done():
                    started.set_result(None)
                await self._follow(process)
        except asyncio.CancelledError:
            self.exit_code = 128 + signal.SIGKILL
            raise
        except TimeoutError:
            self.exit_code = 128 + signal.SIGKILL
            self.error = errors.OperationTimeoutError(
                f"{self.argv[0]} did not end within {self.timeout_s:g} s and was killed",
                hint="Give it a longer timeout.",
                details={"operation": "command", "timeout": self.timeout_s},
            )
        except errors.WarmcellError as error:
            self.error = _gone(box, error)
        finally:
            self.ended_at = time.time()
            self.argv, self.env = _shown(self.argv), {}
            self.output.end()
            if not started.done():
                started.set_exception(self.error or errors.ConflictError("The sandbox has ended", hint=AGAIN))

    async def _follow(self, process: GuestProcess) -> None:
        feeding = asyncio.create_task(self._feed(process))
        try:
            async with asyncio.timeout(self.timeout_s):
                async for name, content in process.output():
                    await self.output.put({name: base64.b64encode(content).decode()})
            self.exit_code = process.exit_code
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _feed(self, process: GuestProcess) -> None:
        if self.input:
            await process.write(self.input)
            self.input = b""  # It may be many megabytes, and what has ended is remembered.
        if not self.keeps_stdin and self.size is None:
            await process.close_stdin()


class Commands:
    """Those of one sandbox: what runs, and what has ended."""

    def __init__(self) -> None:
        self._known: dict[str, Command] = {}
        self._starting: dict[str, asyncio.Future[None]] = {}
        self._ended_at = -math.inf

    @property
    def idle_s(self) -> float:
        """Seconds since one has ended; 0 while one runs, infinite where none ever did."""
        return 0.0 if self.running else time.monotonic() - self._ended_at

    @property
    def running(self) -> int:
        """How many have not ended."""
        return sum(one.ended_at is None for one in self._known.values())

    def all(self) -> list[Command]:
        """Those that run, and those whose output is kept, the oldest first."""
        return [one for one in self._known.values() if not one.output.forgotten]

    def get(self, command_id: str) -> Command:
        """One of them.

        Raises:
            NotFoundError: There is none of that id.
        """
        found = self._known.get(command_id)
        if found is None:
            raise errors.NotFoundError(f"There is no command {command_id}", hint="It ended long ago, or never began.")
        return found

    def known(self, body: Mapping[str, Any]) -> Command | None:
        """The one that the same request has started already.

        Raises:
            ConflictError: Another request has, under this id.
        """
        found = self._known.get(str(body.get("id"))) if body.get("id") is not None else None
        if found is not None and found.asked != checks.fingerprint(body):
            raise errors.ConflictError(f"Command {found.id} is another one", hint="Take a new id for a new command.")
        return found

    async def start(self, box: LiveSandbox, body: Mapping[str, Any]) -> Command:
        """Start one, unless this very request has started it already.

        Raises:
            WarmcellError: It was not started; nothing is left of it.
        """
        command = self.known(body)
        if command is None:
            command = Command(body)
            if self.running >= RUNNING_MAX:
                raise errors.CapacityError(
                    f"{RUNNING_MAX} commands run in this sandbox", hint="Wait until one has ended, or kill it."
                )
            self._known[command.id] = command
            begun = self._starting[command.id] = asyncio.ensure_future(command.start(box, ended=self._ended))
            begun.add_done_callback(lambda done: self._begun(command, done))
        if command.id in self._starting:
            await asyncio.shield(self._starting[command.id])
        return command

    async def close(self) -> None:
        """Kill all that run."""
        await asyncio.gather(*(one.close() for one in self._known.values()))

    def _ended(self) -> None:
        self._ended_at = time.monotonic()
        forget_oldest(self._known)

    def _begun(self, command: Command, done: "asyncio.Future[None]") -> None:
        self._starting.pop(command.id, None)
        if done.cancelled() or done.exception() is not None:
            self._known.pop(command.id, None)


def _shown(argv: Sequence[str]) -> tuple[str, ...]:
    """As much of the arguments as still says what it was."""
    shown: list[str] = []
    room = SHOWN_MAX
    for one in argv:
        if len(one) >= room:
            return (*shown, f"{one[:room]}…")
        shown.append(one)
        room -= len(one) + 1
    return tuple(shown)


def _size(value: Any) -> tuple[int, int]:
    body = value if isinstance(value, dict) else {}
    rows = checks.whole(body, "rows", 24, least=1, most=TERMINAL_SIDE_MAX)
    return rows, checks.whole(body, "columns", 80, least=1, most=TERMINAL_SIDE_MAX)


def _input(body: Mapping[str, Any]) -> bytes:
    try:
        data = base64.b64decode(checks.text(body, "input", ""), validate=True)
    except (binascii.Error, ValueError) as error:
        if isinstance(error, errors.WarmcellError):
            raise
        raise errors.InvalidRequestError("`input` must be base64", hint="Or send it to …/stdin.") from error
    if len(data) > INPUT_MAX_BYTES:
        raise errors.InvalidRequestError(
            f"The input is larger than {INPUT_MAX_BYTES} bytes", hint="Send it to …/stdin, or write it to a file first."
        )
    return data


def _gone(box: LiveSandbox, error: errors.WarmcellError) -> errors.WarmcellError:
    """Why a command's stream broke, in terms of its sandbox where that is the reason."""
    if isinstance(error, errors.TransportError):
        sleeps = box.info.state in ("suspended", "suspending", "resuming")
        why = "was suspended or restored" if sleeps else "was killed or reached its end of life"
        return errors.ConflictError(f"The sandbox {why}, which ends its commands", hint=AGAIN)
    return error


def size_of(body: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a terminal, from a request.

    Raises:
        InvalidRequestError: They are none.
    """
    return _size(dict(body))
