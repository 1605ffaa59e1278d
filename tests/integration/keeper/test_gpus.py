"""GPUs of a real keeper, made up ones: who waits is seen, can leave, and is served; what was used is told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.keeper.conftest import Configure, KernelBody
from tests.integration.snapshots.notebooks import Notebook, keeper, notebook
from tests.leaks import Places
from warmcell.extension.cli import main
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import ConflictError, InvalidRequestError, QueueCancelledError
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.usage import UsageRow, UsageStore

T4 = [{"name": "T4", "memory": "16GiB"}]


@contextlib.asynccontextmanager
async def changes(client: KeeperClient) -> AsyncIterator["asyncio.Queue[dict[str, Any]]"]:
    """What the keeper tells of sandboxes, from now on."""
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def listen() -> None:
        async for name, data in client.events():
            if name == "sandbox":
                told.put_nowait(data)
            elif name == "hello":
                told.put_nowait({})

    task = asyncio.create_task(listen())
    try:
        assert await asyncio.wait_for(told.get(), 60) == {}
        yield told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_queued(told: "asyncio.Queue[dict[str, Any]]", sandbox_id: str | None = None) -> dict[str, Any]:
    """The first change of a sandbox, or of this one, that stands in the queue."""
    async with asyncio.timeout(60):
        while True:
            change = await told.get()
            if change.get("queue") and sandbox_id in (None, change["id"]):
                return change


async def test_a_start_waits_in_sight_and_can_be_called_off(
    configure: Configure, keeper: KeeperClient, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its place is told by events, by `GET /gpus` and on the command line; cancelled it fails, else it is served."""
    mine = {"spec": {**spec, "gpu": "T4"}}
    first = await keeper.post("/sandboxes", mine)
    async with changes(keeper) as told:
        asking = asyncio.create_task(keeper.post("/sandboxes", mine, timeout=None))
        queued = await until_queued(told)
        assert (queued["state"], queued["phase"]["name"]) == ("creating", "lease")
        assert (queued["queue"]["place"], queued["queue"]["length"]) == (1, 1)
        assert queued["phase"]["detail"] == "place 1 of 1 in the queue for T4"
        assert first["id"] in queued["phase"]["hint"]
        answer = await keeper.get("/gpus")
        assert [(row["sandbox_id"], row["mine"]) for row in answer["queue"]] == [(queued["id"], True)]
        assert await asyncio.to_thread(main, ["gpus"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "T4 (simulated)" in lines[1]
        assert f"sandbox {first['id']}" in lines[1]
        assert lines[2].startswith(f"1. sandbox {queued['id']} waits for T4")
        await keeper.delete(f"/sandboxes/{queued['id']}/queue")
        with pytest.raises(QueueCancelledError):
            await asking
        with pytest.raises(ConflictError, match="waits for no GPU"):
            await keeper.delete(f"/sandboxes/{first['id']}/queue")
        asking = asyncio.create_task(keeper.post("/sandboxes", mine, timeout=None))
        await until_queued(told)
        await keeper.delete(f"/sandboxes/{first['id']}")
        served = await asking
        assert (served["queue"], served["phase"]) == (None, None)
        assert served["gpus"][0]["name"] == "T4"
        gone = asyncio.create_task(keeper.post("/sandboxes", mine, timeout=None))
        await keeper.delete(f"/sandboxes/{(await until_queued(told))['id']}")
        with pytest.raises(ConflictError, match="was stopped while it came up"):
            await gone
        assert (await keeper.get("/gpus"))["queue"] == []


async def test_what_was_used_is_told(
    configure: Configure, keeper: KeeperClient, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """By whom, of what, and from which day on; and kept on disk."""
    made = await keeper.post("/sandboxes", {"spec": {**spec, "gpu": "T4"}})
    await keeper.delete(f"/sandboxes/{made['id']}")
    answer = await keeper.get("/usage?by=sandbox&days=1")
    (row,) = answer["rows"]
    assert (row["sandbox_id"], row["owner"]) == (made["id"], "client")
    assert row["usage"]["gpu_idle_s"] > 0
    assert answer["total"] == row["usage"]
    for wrong in ("by=user", "days=x", "days=9999"):
        with pytest.raises(InvalidRequestError):
            await keeper.get(f"/usage?{wrong}")
    assert await asyncio.to_thread(main, ["usage", "--by", "owner"]) == 0
    assert "client" in capsys.readouterr().out
    kept = await asyncio.to_thread(UsageStore(Paths.default().usage).rows, by="sandbox")
    assert kept == [UsageRow.from_json(row)]


async def test_a_restart_into_another_shape_keeps_its_gpu(
    configure: Configure, keeper: KeeperClient, kernel_body: KernelBody, spec: dict[str, Any]
) -> None:
    """Although somebody waits for it; and one that asks for none any more gives it back."""
    body = kernel_body(spec={**spec, "gpu": "T4"})
    before = await keeper.post("/kernels", body, timeout=120)
    async with changes(keeper) as told:
        asking = asyncio.create_task(keeper.post("/sandboxes", {"spec": {**spec, "gpu": "any"}}, timeout=None))
        await until_queued(told)
        body["spec"] = {**body["spec"], "limits": {"pids": 1000}}
        after = await keeper.post("/kernels", body, timeout=120)
        assert after["id"] != before["id"]
        assert after["gpus"] == before["gpus"]
        assert not asking.done()
        lease = (await keeper.get("/gpus"))["gpus"][0]["lease"]
        assert lease["sandbox_id"] == after["id"]
        body["spec"] = {**body["spec"], "gpu": None}
        assert (await keeper.post("/kernels", body, timeout=120))["gpus"] == []
        assert (await asking)["gpus"] == before["gpus"]


@pytest.fixture
def configure(configure: Configure) -> Configure:
    configure(backend="process", keeper_idle_s=0.2, prepared=0, simulated_gpus=T4)
    return configure


async def asleep(book: Notebook) -> None:
    """Wait until it is suspended."""
    async with asyncio.timeout(60):
        while (await book.info())["state"] != "suspended":  # noqa: ASYNC110 - the keeper is polled as a page would
            await asyncio.sleep(0.02)


@pytest.mark.criu
async def test_an_idle_kernel_gives_its_gpu_to_whoever_waits(places: Places, tmp_path: Path) -> None:
    """It sleeps with all its variables. Its next cell waits in sight while the other one works, can be interrupted, and
    goes on with the GPU once the other one is idle; what was given back is told.
    """
    enough = tmp_path / "enough"
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(keeper(places, simulated_gpus=T4, gpu_yield_after=0.5, park_after=0))
        told = await stack.enter_async_context(changes(client))
        first = await stack.enter_async_context(notebook(client, tmp_path, gpu="T4"))
        await first.run("import os; x = 41")
        second = await stack.enter_async_context(notebook(client, tmp_path, gpu="T4"))
        await asleep(first)
        working = second.page.send(
            f"import pathlib, time\nwhile not pathlib.Path({str(enough)!r}).exists(): time.sleep(.05)"
        )
        asking = first.page.send("x += 1; os.environ['WARMCELL_GPUS'], x")
        queued = await until_queued(told, first.sandbox_id)
        assert (queued["state"], queued["queue"]["place"]) == ("suspended", 1)
        assert second.sandbox_id in queued["phase"]["hint"]
        client_of = first.page.client
        client_of.control_channel.send(client_of.session.msg("interrupt_request", {}))
        assert (await first.page.done(asking))["ename"] == "QueueCancelledError"
        assert "waited for no longer" in first.page.said(asking)
        assert (await first.info())["queue"] is None
        again = first.page.send("x += 1; os.environ['WARMCELL_GPUS'], x")
        await until_queued(told, first.sandbox_id)
        enough.touch()
        await second.page.done(working)
        await first.page.done(again)
        assert first.page.said(again) == "('T4', 42)"
        await asleep(second)
        rows = (await client.get("/usage?by=sandbox"))["rows"]
        used = {row["sandbox_id"]: row["usage"] for row in rows}
        assert used[first.sandbox_id]["gpu_given_back_s"] > 0
        assert used[second.sandbox_id]["gpu_active_s"] > 0
