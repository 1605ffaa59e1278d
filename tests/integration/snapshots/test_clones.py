"""Clones of one image come from one process of the helper, which is kept for a moment; none of them harms another."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.snapshots.boxes import Boxes, boxes_of
from tests.leaks import Places
from warmcell.sandbox.errors import (
    ConflictError,
    SandboxNotFoundError,
    SnapshotCorruptError,
    SnapshotError,
    SnapshotNotFoundError,
)
from warmcell.sandbox.helper.clones import AT_ONCE
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots import restorers

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

FIRST, SECOND = SnapshotId("a" * 12), SnapshotId("b" * 12)


@pytest.fixture
async def boxes(places: Places) -> AsyncIterator[Boxes]:
    async with boxes_of(places) as made:
        yield made


@pytest.fixture
async def image(boxes: Boxes) -> SnapshotId:
    """Of a program that counts, which goes on; nobody works for it any more."""
    await boxes.dump(await boxes.running(), FIRST)
    await until(lambda: workers(boxes) == [])
    return FIRST


@pytest.fixture(autouse=True)
def for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process waits for its next clone until it is told otherwise, however busy the machine is."""
    monkeypatch.setattr(restorers, "KEPT_S", 600.0)


async def until(what: Callable[[], bool]) -> None:
    """Wait until that is so."""
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def workers(boxes: Boxes) -> list[int]:
    """Processes in which the helper serves requests."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                arguments, name = (process / "cmdline").read_bytes(), (process / "comm").read_text()
            except OSError:
                continue
            if name == "warmcell-work\n" and os.fsencode(boxes.paths.images) in arguments:
                found.append(int(process.name))
    return sorted(found)


async def test_clones_have_one_process(boxes: Boxes, image: SnapshotId, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that begin together and those that follow soon; then it goes."""
    clones = await asyncio.gather(*(boxes.restored(image) for _ in range(4)))
    kept = workers(boxes)
    assert len(kept) == 1
    clones.append(await boxes.restored(image))
    assert workers(boxes) == kept
    monkeypatch.setattr(restorers, "KEPT_S", 0.0)
    clones.append(await boxes.restored(image))
    for clone in clones:
        await clone.goes_on(past=await clone.goes_on())
    await until(lambda: workers(boxes) == [])


async def test_an_image_goes_though_a_process_is_kept(boxes: Boxes, image: SnapshotId) -> None:
    """Nobody waits for who might ask again, and that process goes as well."""
    clone = await boxes.restored(image)
    assert len(workers(boxes)) == 1
    await boxes.engine.drop(image)
    await until(lambda: workers(boxes) == [])
    await clone.goes_on()
    with pytest.raises(SnapshotNotFoundError):
        await boxes.restored(image)


async def test_more_than_one_process_looks_after(boxes: Boxes, image: SnapshotId) -> None:
    """Each of them comes, from two processes."""
    places = await asyncio.gather(*(boxes.fresh() for _ in range(AT_ONCE + 2)))
    restored = await asyncio.gather(*(boxes.engine.restore(place, image=image) for place in places))
    assert len(workers(boxes)) == 2
    assert {one.pid for one in restored} == {restored[0].pid}
    for place in places:
        assert str(restored[0].pid) in (await place.sh("cd /proc; echo [0-9]*")).split()


async def test_what_fails_is_its_own(boxes: Boxes, image: SnapshotId) -> None:
    """A number that is taken, a sandbox that has ended, a caller who leaves: their clones fail, and no other."""
    good, taken, ended, left = [await boxes.fresh() for _ in range(4)]
    number = (await boxes.restored(image)).kernel
    await taken.sh(f"echo {number - 1} >/proc/sys/kernel/ns_last_pid; sleep 600 </dev/null >/dev/null 2>&1 &")
    await boxes.engine.restore(taken, image=image)
    pid = ended.pid
    await ended.channel.close()
    await ended.instance.stop()

    async def leaves() -> None:
        async with asyncio.timeout(0.01):
            await boxes.engine.restore(left, image=image)

    results: list[Any] = await asyncio.gather(
        boxes.engine.restore(taken, image=image),
        boxes.engine.restore(ended, image=image),
        leaves(),
        boxes.engine.restore(good, image=image),
        return_exceptions=True,
    )
    assert [type(one) for one in results[:3]] == [ConflictError, SandboxNotFoundError, TimeoutError], results
    assert not Path(f"/proc/{pid}").exists()
    assert results[3].pid == number
    good.kernel = number
    await good.goes_on(past=await good.goes_on())
    await boxes.restored(image)  # Answered after the one who left was noticed.
    assert number not in await left.numbers()
    left.kernel = (await boxes.engine.restore(left, image=image)).pid
    await left.goes_on()


async def test_an_image_is_looked_at_again(boxes: Boxes, image: SnapshotId) -> None:
    """What was whole for one clone, and is not any more, is refused to the next, by the very same process."""
    await boxes.restored(image)
    path = boxes.paths.images / "0" / image / "inventory.img"
    was = path.read_bytes()
    for content, error in ((was[:-1] + bytes([was[-1] ^ 1]), SnapshotCorruptError), (was, None)):
        path.write_bytes(content)
        kept = workers(boxes)
        place = await boxes.fresh()
        if error is None:
            await boxes.engine.restore(place, image=image)
        else:
            with pytest.raises(error):
                await boxes.engine.restore(place, image=image)
        assert workers(boxes) == kept
        assert len(kept) == 1


async def test_a_process_that_is_killed(boxes: Boxes, image: SnapshotId) -> None:
    """Its clones are said to have failed; the next ones, in other sandboxes, have another process."""
    places = [await boxes.fresh() for _ in range(3)]
    await boxes.restored(image)
    (kept,) = workers(boxes)
    os.kill(kept, signal.SIGSTOP)
    doing = [asyncio.create_task(boxes.engine.restore(place, image=image)) for place in places]
    await boxes.engine.images()  # Asked after those.
    os.kill(kept, signal.SIGKILL)
    for one in await asyncio.gather(*doing, return_exceptions=True):
        assert isinstance(one, SnapshotError), one
        assert one.hint
    for clone in [await boxes.restored(image) for _ in range(2)]:
        await clone.goes_on(past=await clone.goes_on())


def handed(connection: socket.socket, request: dict[str, object], place: int, *more: int) -> dict[str, Any]:
    """What is answered to a request on a socket that goes with it; nothing if that hangs up."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pidfd = os.pidfd_open(place)
        try:
            socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [pidfd, theirs.fileno(), *more])
        finally:
            os.close(pidfd)
        theirs.close()
        ours.settimeout(60)
        answer: dict[str, Any] = json.loads(ours.makefile().readline() or "{}")
        return answer


async def test_requests_that_are_none(boxes: Boxes, image: SnapshotId) -> None:
    """Another image, another operation, a place that is no sandbox: refused, and the one that is right is served."""
    place = await boxes.fresh()
    right: dict[str, object] = {"op": "restore", "image": image}
    wrong = [({**right, "image": SECOND}, place.pid), ({**right, "op": "drop"}, place.pid), (right, os.getpid())]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(boxes.paths.helper_socket))
        assert (await asyncio.to_thread(handed, connection, right, os.getpid()))["code"] == "sandbox_not_found"
        for request, pid in wrong:
            assert (await asyncio.to_thread(handed, connection, request, pid)).get("ok") is False, request
        assert (await asyncio.to_thread(handed, connection, right, place.pid))["ok"] is True
        assert await asyncio.to_thread(handed, connection, right, place.pid, 1) == {}  # One descriptor too many.
        connection.settimeout(60)
        assert json.loads(connection.makefile().readline())["code"] == "protocol"
    await until(lambda: workers(boxes) == [])
