"""A keeper that is being replaced: whoever needs the next one waits as long as it wants to, and no longer."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.server import end_keeper
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import TransportError
from warmcell.sandbox.paths import Paths

WAITERS = 20
UP_S = 60.0

HOLDER = """\
import fcntl, json, os, sys
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write(json.dumps({"pid": os.getpid(), "saving": True}))
lock.flush()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def saving_keeper(paths: Paths) -> Iterator[subprocess.Popen[str]]:
    """A process that is, as far as others can tell, a keeper that listens no more and saves its kernels."""
    paths.make()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(paths.keeper_lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        try:
            yield holder
        finally:
            holder.kill()


async def test_nobody_waits_longer_than_they_want_for_a_keeper_that_saves(places: Places) -> None:
    """Many ask meanwhile: each hears in time that it is not there yet, and once it is, all are served by one."""
    paths = Paths.default()
    with saving_keeper(paths) as holder:
        began = time.monotonic()
        asked = [KeeperClient.connect(patience_s=0.5) for _ in range(WAITERS)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert time.monotonic() - began < UP_S / 2
        for answer in answers:
            assert isinstance(answer, TransportError)
            assert answer.details == {"coming": True}
            assert "still saving" in answer.message
        waiting = [asyncio.create_task(KeeperClient.connect()) for _ in range(WAITERS)]
        await asyncio.wait(waiting, timeout=0.2)
        assert not any(one.done() for one in waiting)
        holder.kill()
        async with asyncio.timeout(UP_S):
            clients = await asyncio.gather(*waiting)
    pids = {(await client.get("/status"))["pid"] for client in clients}
    assert pids == {json.loads(paths.keeper_lock.read_text())["pid"]}
    await asyncio.gather(*(client.close() for client in clients))
    await asyncio.to_thread(end_keeper, places)


async def test_a_keeper_that_says_nothing_is_given_up_sooner(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that holds the lock and neither listens nor saves hangs: that is said with the cure."""
    from warmcell.extension.keeper import process

    monkeypatch.setattr(process, "PREDECESSOR_TIMEOUT_S", 0.2)
    paths = Paths.default()
    with saving_keeper(paths) as holder:
        paths.keeper_lock.write_text(json.dumps({"pid": holder.pid}))
        assert await asyncio.to_thread(process._predecessor_ends, paths.keeper_lock, time.monotonic()) is False
        paths.keeper_lock.write_text(json.dumps({"pid": holder.pid, "saving": True}))
        asked = asyncio.to_thread(process._predecessor_ends, paths.keeper_lock, time.monotonic())
        waiting = asyncio.create_task(asked)
        await asyncio.wait({waiting}, timeout=0.5)
        assert not waiting.done()
        holder.kill()
        assert await waiting is True
