"""Commands that go on by themselves in a sandbox, as handles for an event loop."""

import signal

from warmcell.sandbox.client.core import Core, Telling
from warmcell.sandbox.client.results import CommandInfo
from warmcell.sandbox.models import ExecResult


class AsyncCommand:
    """`Command` for an event loop. Callbacks may be coroutine functions."""

    def __init__(self, core: Core, info: CommandInfo) -> None:
        self._core = core
        self._info = info

    @property
    def id(self) -> str:
        """As `Command.id`."""
        return self._info.id

    @property
    def pid(self) -> int:
        """As `Command.pid`."""
        return self._info.pid

    async def info(self) -> CommandInfo:
        """As `Command.info`."""
        self._info = await self._core.command(self.id)
        return self._info

    async def wait(self, *, on_stdout: Telling | None = None, on_stderr: Telling | None = None) -> ExecResult:
        """As `Command.wait`."""
        return await self._core.wait(self.id, on_stdout, on_stderr)

    async def write(self, data: bytes | str) -> None:
        """As `Command.write`."""
        await self._core.write(self.id, data)

    async def close_stdin(self) -> None:
        """As `Command.close_stdin`."""
        await self._core.write(self.id, b"", close=True)

    async def resize(self, rows: int, columns: int) -> None:
        """As `Command.resize`."""
        await self._core.resize(self.id, rows, columns)

    async def send_signal(self, signum: int) -> None:
        """As `Command.send_signal`."""
        await self._core.signal(self.id, signum)

    async def terminate(self) -> None:
        """As `Command.terminate`."""
        await self.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """As `Command.kill`."""
        await self._core.kill_command(self.id)

    def __repr__(self) -> str:
        return f"<AsyncCommand {self.id} {' '.join(self._info.argv)!r}>"
