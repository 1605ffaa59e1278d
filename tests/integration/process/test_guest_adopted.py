"""A kernel that init did not start, as a restored one is: looked after like its own."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from tests.integration.process.guest import Guest, running_guest
from tests.leaks import Places
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError


@pytest.fixture
async def guest(places: Places) -> AsyncIterator[Guest]:
    async with running_guest(places.root) as running:
        yield running


@pytest.fixture
def stranger() -> subprocess.Popen[bytes]:
    """A process that leads a group of its own and is no child of init's; its parent reaps it at the end."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)


@pytest.mark.parametrize("reaped", [False, True], ids=["not reaped yet", "reaped at once"])
async def test_its_end_is_told_with_the_signal(guest: Guest, stranger: subprocess.Popen[bytes], reaped: bool) -> None:
    """A signal reaches it, and its end is told once, as of a kernel that init has started."""
    await guest.channel.adopt(stranger.pid)
    await guest.event(event="kernel", pid=stranger.pid, state="running")
    waiting = asyncio.create_task(asyncio.to_thread(stranger.wait)) if reaped else None
    await guest.channel.signal(stranger.pid, signal.SIGKILL, group=True)
    ended = await guest.event(event="kernel", pid=stranger.pid, state="exited")
    assert ended["exit_code"] in (137, -1) if reaped else ended["exit_code"] == 137
    await (waiting or asyncio.to_thread(stranger.wait))
    with pytest.raises(NotFoundError):
        await guest.channel.signal(stranger.pid, signal.SIGTERM)
    assert len([event for event in guest.events if event.get("pid") == stranger.pid]) == 2


async def test_its_exit_code_is_told(guest: Guest) -> None:
    """One that ends by itself is told with its own code."""
    ending = subprocess.Popen([sys.executable, "-c", "input(); exit(7)"], stdin=subprocess.PIPE)
    await guest.channel.adopt(ending.pid)
    assert ending.stdin is not None
    ending.stdin.write(b"\n")
    ending.stdin.close()
    assert (await guest.event(event="kernel", pid=ending.pid, state="exited"))["exit_code"] == 7
    assert await asyncio.to_thread(ending.wait) == 7


async def test_a_process_that_is_not_there_is_refused(guest: Guest) -> None:
    """So is what can be no kernel; init serves on."""
    gone = subprocess.Popen(["true"])
    await asyncio.to_thread(gone.wait)
    with pytest.raises(NotFoundError):
        await guest.channel.adopt(gone.pid)
    for pid in (0, 1, -5, guest.process.pid):
        with pytest.raises(InvalidRequestError):
            await guest.channel.adopt(pid)
    await guest.channel.adopt(os.getpid())
    await guest.channel.adopt(os.getpid())
    assert len([event for event in guest.events if event.get("pid") == os.getpid()]) <= 1
