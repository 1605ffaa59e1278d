"""Commands that go on by themselves in a sandbox, as handles."""

import signal

from warmcell.sandbox.client.core import Core, Telling
from warmcell.sandbox.client.results import CommandInfo
from warmcell.sandbox.client.transport import now
from warmcell.sandbox.models import ExecResult


class Command:
    """A process in a sandbox. Its id finds it again, from other programs too, for as long as its sandbox runs."""

    def __init__(self, core: Core, info: CommandInfo) -> None:
        self._core = core
        self._info = info

    @property
    def id(self) -> str:
        """By which `Sandbox.command` finds it."""
        return self._info.id

    @property
    def pid(self) -> int:
        """As it is in the sandbox."""
        return self._info.pid

    def info(self) -> CommandInfo:
        """What is told of it now."""
        self._info = now(self._core.command(self.id))
        return self._info

    def wait(self, *, on_stdout: Telling | None = None, on_stderr: Telling | None = None) -> ExecResult:
        """All that it has said since its start, and how it ended; waits for that.

        The last 8 MiB of what it says while nobody listens are kept; a line on stderr says if there was more.

        Args:
            on_stdout: Told what it wrote and writes, as it comes.
            on_stderr: Told what it wrote there.

        Raises:
            OperationTimeoutError: It was killed for its time; `details` has the `stdout` and `stderr` until then.
            ConflictError: Its sandbox was suspended or has ended, and it with that; likewise.
        """
        return now(self._core.wait(self.id, on_stdout, on_stderr))

    def write(self, data: bytes | str) -> None:
        """Give it input, at the pace at which it reads, after all that was written before, here or by others."""
        now(self._core.write(self.id, data))

    def close_stdin(self) -> None:
        """End its input."""
        now(self._core.write(self.id, b"", close=True))

    def resize(self, rows: int, columns: int) -> None:
        """Its terminal has another size."""
        now(self._core.resize(self.id, rows, columns))

    def send_signal(self, signum: int) -> None:
        """Signal it and its process group. Nothing happens when it has ended."""
        now(self._core.signal(self.id, signum))

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it and its process group. Idempotent."""
        now(self._core.kill_command(self.id))

    def __repr__(self) -> str:
        return f"<Command {self.id} {' '.join(self._info.argv)!r}>"
