"""Which helper saves memory where there may be two: the machine's, and an agent of the keeper's own."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from warmcell.sandbox.errors import CapacityError
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.snapshots import agent
from warmcell.sandbox.snapshots.agent import FirstOf
from warmcell.sandbox.snapshots.criu import SystemHelper, connected

pytestmark = pytest.mark.asyncio


class Says:
    """A helper on a socket of its own, which says its name and whether it is ready."""

    def __init__(self, path: Path, *, ready: bool = True) -> None:
        self.path, self.ready, self.asked = path, ready, 0
        self.refuses = False

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        async with await asyncio.start_unix_server(self._answer, self.path):
            yield

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline():
            self.asked += 1
            said = {"ok": True, "ready": self.ready, "name": self.path.name}
            if self.refuses:
                said = {"ok": False, **HelperError("capacity", "You have too many requests under way").to_json()}
            writer.write(json.dumps(said).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def connect(self) -> socket.socket:
        return await connected(self.path)

    async def close(self) -> None:
        """There is nothing to wait for."""


async def whose(helper: FirstOf) -> str:
    """The name of the one that is connected to."""
    connection = await helper.connect()
    connection.send(b"{}\n")
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    said = json.loads(await reader.readline())
    writer.close()
    return str(said["name"])


async def test_a_helper_that_is_not_ready_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, but has no CRIU of use: the agent does the work, until a while later the helper is ready."""
    machine, own = Says(tmp_path / "machine", ready=False), Says(tmp_path / "agent")
    first = FirstOf(SystemHelper(machine.path), own)
    async with own.listening():
        assert await whose(first) == "agent"  # There is none.
        async with machine.listening():
            assert [await whose(first) for _ in range(3)] == ["agent"] * 3
            assert machine.asked == 1
            machine.ready = True
            monkeypatch.setattr(agent, "TRY_AGAIN_S", 0.0)
            assert await whose(first) == "machine"
        machine.path.unlink(missing_ok=True)
        assert await whose(first) == "agent"


async def test_a_helper_that_is_busy_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for something is told so; nothing is started beside it. Of one that was ready it is not asked."""
    monkeypatch.setattr(agent, "TRY_AGAIN_S", 0.0)
    machine, own = Says(tmp_path / "machine"), Says(tmp_path / "agent")
    first = FirstOf(SystemHelper(machine.path), own)
    async with own.listening(), machine.listening():
        machine.refuses = True
        with pytest.raises(CapacityError, match="too many requests"):
            await first.connect()
        machine.refuses = False
        assert await whose(first) == "machine"
        asked = machine.asked
        machine.refuses = True
        (await first.connect()).close()
        assert (machine.asked, own.asked) == (asked, 0)
