"""Sandboxes whose init comes when somebody needs it."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import subject_of
from tests.leaks import Places
from warmcell.sandbox.backends.processes import descendants
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import ProtocolError, TransportError
from warmcell.sandbox.guest_files import BEGIN

pytestmark = pytest.mark.bubblewrap


def programs(pid: int) -> set[str]:
    """What runs in a sandbox."""
    return {Path(f"/proc/{one}/comm").read_text().strip() for one in (pid, *descendants(pid))}


async def test_init_comes_with_the_first_request(places: Places) -> None:
    """Until then a shell waits; what was restored meanwhile is taken on as soon as it is there."""
    subject = subject_of(places)
    instance = await subject.create(later=True)
    try:
        assert instance.waits
        channel = GuestChannel(instance.run_directory, waits=True)
        await channel.adopt(4_000_000)  # Of which nothing is left when it comes.
        assert "sh" in programs(instance.pid)
        assert os.listdir(instance.run_directory) == [BEGIN]
        assert not channel.came.is_set()
        assert (await channel.exec(["sh", "-c", "echo [$go]"])).stdout == "[]\n"
        assert channel.came.is_set()
        assert "init.sock" in os.listdir(instance.run_directory)
        assert BEGIN not in os.listdir(instance.run_directory)
        assert "sh" not in programs(instance.pid)
        await channel.close()
    finally:
        await instance.stop()


async def test_what_a_guest_puts_in_the_way_is_refused(places: Places, tmp_path: Path) -> None:
    """No link is followed, nothing but a FIFO written to, and the sandbox can be stopped."""
    subject = subject_of(places)
    instance = await subject.create(later=True)
    try:
        begin, outside = instance.run_directory / BEGIN, tmp_path / "outside"
        outside.write_text("")
        begin.unlink()
        begin.symlink_to(outside)
        with pytest.raises(ProtocolError):
            await GuestChannel(instance.run_directory, waits=True).hello()
        begin.unlink(missing_ok=True)
        begin.write_text("")
        with pytest.raises(ProtocolError, match="FIFO"):
            await GuestChannel(instance.run_directory, waits=True).hello()
        assert outside.read_text() == ""
    finally:
        await instance.stop()


async def test_who_asks_while_it_is_ended_is_told(tmp_path: Path) -> None:
    """That the guest is gone; their own task is not cancelled, before or after it was closed."""
    os.mkfifo(tmp_path / BEGIN)
    channel = GuestChannel(tmp_path, waits=True)
    asking = asyncio.create_task(channel.exec(["true"]))
    await asyncio.sleep(0)
    assert channel.idle  # It has asked for init to come, which nobody is there to be.
    await channel.close()
    for asked in (asking, asyncio.create_task(channel.exec(["true"]))):
        with pytest.raises(TransportError):
            await asked
