"""Processes that become sandboxes are forked by one that waits for that, and are as if they had been started."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import paths_of, subject_of
from tests.leaks import Places
from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
from warmcell.sandbox.backends.nursery import Forked, Nursery
from warmcell.sandbox.backends.processes import descendants


@contextlib.asynccontextmanager
async def nursery() -> AsyncIterator[Nursery]:
    """One that is closed."""
    made = Nursery()
    try:
        yield made
    finally:
        await made.close()


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


async def stage(forks: Nursery) -> tuple[Forked, socket.socket]:
    """A stage that waits for its plan, and our end of its control socket."""
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    try:
        forked = await forks.start(theirs, writing)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(reading)
        os.close(writing)
    assert isinstance(forked, Forked)
    return forked, ours


async def test_what_is_forked_is_our_own_child() -> None:
    """Its parent is this process, its end is seen, and nobody else holds its control socket."""
    async with nursery() as forks:
        first, ours = await stage(forks)
        second, theirs = await stage(forks)
        assert parent(first.pid) == parent(second.pid) == os.getpid()
        ours.close()
        assert await asyncio.wait_for(first.wait(), 60) == 1
        assert second.returncode is None
        second.send_signal(signal.SIGKILL)
        assert await asyncio.wait_for(second.wait(), 60) == -signal.SIGKILL
        theirs.close()
    assert not [pid for pid in descendants(os.getpid()) if pid in (first.pid, second.pid)]


@pytest.mark.bubblewrap
async def test_a_sandbox_outlives_what_forked_it(places: Places) -> None:
    """A nursery that is killed takes nothing along, and the next sandbox has another one."""
    async with nursery() as forks:
        subject = subject_of(places, backend=BubblewrapBackend(paths=paths_of(places), nursery=forks))
        async with subject.box() as first:
            before = {pid for pid in descendants(os.getpid()) if pid not in first.instance.processes()}
            (server,) = [pid for pid in before if b"nursery" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            os.kill(server, signal.SIGKILL)
            async with subject.box() as second:
                for one in (first, second):
                    assert await one.says("echo here") == "here"


async def test_a_start_that_is_given_up_leaves_no_process() -> None:
    """Whether it is cancelled before or after the fork."""
    async with nursery() as forks:
        _, ours = await stage(forks)
        ours.close()
        before = set(descendants(os.getpid()))
        for _ in range(5):
            work = asyncio.create_task(stage(forks))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                _, made = await work
                made.close()
        assert set(descendants(os.getpid())) <= before
