"""Two servers of one folder at the same time: kernels change hands when one lets go, and never have two owners."""

import asyncio
import signal

import pytest

from benchmarks.server import JupyterServer
from tests.jupyter.test_survive import end_process, execute, is_state, keeper_pid, open_session, sessions, until
from tests.leaks import Places

pytestmark = [pytest.mark.bubblewrap, pytest.mark.criu]

HOLD = """
import os, time, warmcell
def hold():
    open("saving", "w").close()
    while not os.path.exists("go"):
        time.sleep(0.02)
warmcell.before_snapshot(hold)
kept = 1
"""
STOP_S = 120.0
"""It ends when the second one has come up, which takes long on a busy machine."""

WAITS = "waiting for 1 kernels of a server that is ending"


def server_of(places: Places) -> JupyterServer:
    return JupyterServer(places, settings={"prepared": 0})


async def kernels(server: JupyterServer) -> set[str]:
    return {str(one["id"]) for one in (await server.http.get("/api/kernels")).json()}


async def test_a_server_that_starts_while_another_ends_waits_for_its_kernels(places: Places) -> None:
    """It serves as soon as the kernel is saved, and from then on has it under the same ids, with its variables."""
    first, second = server_of(places), server_of(places)
    async with first:
        kernel_id = (await open_session(first, "work.ipynb"))["kernel"]["id"]
        await execute(first, kernel_id, HOLD)
        before = await sessions(first)
        ended = asyncio.create_task(first.stop(timeout=STOP_S))
        await until(lambda: exists(first, "saving"))
        started = asyncio.create_task(second.__aenter__())
        try:
            # A machine so slow that the first server has given up by then shows the same.
            await until(lambda: done_or_says(started, second, WAITS))
            (first.root / "go").touch()
            await started
            assert await sessions(second) == before
            await execute(second, kernel_id, "kept += 1; assert kept == 2")
            await ended
            assert await kernels(second) == {kernel_id}
            await second.delete_kernel(kernel_id)
        finally:
            (first.root / "go").touch()
            await asyncio.gather(started, ended, return_exceptions=True)
            await second.__aexit__()


async def test_a_kernel_changes_hands_only_when_its_server_has_ended(places: Places) -> None:
    """A server beside another has none of its kernels, and all of them a moment after that one is killed."""
    async with server_of(places) as first:
        kernel_id = (await open_session(first, "work.ipynb"))["kernel"]["id"]
        await execute(first, kernel_id, "kept = 1")
        before = await sessions(first)
        async with server_of(places) as second:
            assert await kernels(second) == set()
            await first.kill()
            await until(lambda: has(second, before))
            await execute(second, kernel_id, "kept += 1; assert kept == 2")
            await second.delete_kernel(kernel_id)


async def test_a_new_keeper_knows_whose_its_kernels_are(places: Places) -> None:
    """After the keeper was replaced a second server still gets none of the first one's, which goes on with its own."""
    async with server_of(places) as first:
        kernel_id = (await open_session(first, "work.ipynb"))["kernel"]["id"]
        await execute(first, kernel_id, "kept = 1")
        await end_process(keeper_pid(places), signal.SIGTERM)
        await until(lambda: is_state(first, kernel_id, "suspended"))
        async with server_of(places) as second:
            assert await kernels(second) == set()
            await execute(first, kernel_id, "kept += 1; assert kept == 2")
            await first.delete_kernel(kernel_id)


async def exists(server: JupyterServer, name: str) -> bool:
    return (server.root / name).exists()


async def has(server: JupyterServer, wanted: set[tuple[str, str, str, str]]) -> bool:
    return await sessions(server) == wanted


async def done_or_says(started: "asyncio.Task[JupyterServer]", server: JupyterServer, what: str) -> bool:
    """Whether it serves, or its log has this."""
    return started.done() or any(what in line for line in getattr(server, "_said", ()))
