"""Kernels of a real keeper that are parked, on GPUs that are made up: the leases are real."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.integration.keeper.test_gpus import changes, until_queued
from tests.integration.snapshots.notebooks import Notebook, keeper, notebook
from tests.leaks import Places
from tests.unit.sandbox.gpus.made_cuda import COMPILER, managed
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import (
    CapacityError,
    ConflictError,
    InvalidRequestError,
    NoGpuAvailableError,
    UnknownGpuKindError,
    UnsupportedOperationError,
)
from warmcell.sandbox.models import GIB

A100S = [{"name": "A100", "memory": "80GiB", "count": 1, "used": "1GiB"}]
HERE: dict[str, Any] = {"simulated_gpus": A100S, "backend": "process"}
PLAIN = {"network": "host"}


async def parked(told: "asyncio.Queue[dict[str, Any]]", book: Notebook) -> dict[str, Any]:
    """Wait until it is told that a kernel is parked."""
    async with asyncio.timeout(60):
        while True:
            change = await told.get()
            if change.get("id") == book.sandbox_id and change["parked"] is not None:
                return change


async def gpu(client: KeeperClient) -> tuple[str | None, int | None]:
    """Who has the only GPU, and what is used of its memory."""
    (row,) = (await client.get("/gpus"))["gpus"]
    return row["lease"] and row["lease"]["sandbox_id"], row["memory_used_bytes"]


async def test_a_parked_kernel_lives_on_without_its_gpu(places: Places, tmp_path: Path) -> None:
    """Its process stays and its GPU is free. A page that is opened wakes nothing; a cell does, and waits in sight
    where somebody else has the GPU. Interrupted it stays parked; restarted it has a GPU again.
    """
    enough = tmp_path / "enough"
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            keeper(places, **HERE, park_after=0, gpu_yield_after=0, park_memory=1.5)
        )
        told = await stack.enter_async_context(changes(client))
        first = await stack.enter_async_context(notebook(client, tmp_path, gpu="A100", **PLAIN))
        pid = await first.run("import os, threading, time; x = 41; print(os.getpid())")
        assert await gpu(client) == (first.sandbox_id, GIB)
        await first.until_idle()
        info = await first.do("park")
        assert (info["state"], info["gpus"], info["parked"]["vram_bytes"]) == ("running", [], GIB)
        assert await gpu(client) == (None, 0)
        for what in ("kernel_info", "comm_info", "history"):
            await first.page.ask(what)
        assert (await first.info())["parked"] is not None
        assert (await first.do("park"))["parked"] == info["parked"]  # It is, already.

        second = await stack.enter_async_context(notebook(client, tmp_path, gpu="A100", **PLAIN))
        working = second.page.send(
            f"import pathlib, time\nwhile not pathlib.Path({str(enough)!r}).exists(): time.sleep(.05)"
        )
        with pytest.raises(ConflictError, match="busy"):
            await second.do("park")
        asking = first.page.send("x += 1; x")
        queued = await until_queued(told, first.sandbox_id)
        assert (queued["state"], queued["queue"]["place"]) == ("running", 1)
        assert second.sandbox_id in queued["phase"]["hint"]
        client_of = first.page.client
        client_of.control_channel.send(client_of.session.msg("interrupt_request", {}))
        assert (await first.page.done(asking))["ename"] == "QueueCancelledError"
        assert (await first.info())["parked"] is not None
        again = first.page.send("x += 1; os.getpid(), x")
        await until_queued(told, first.sandbox_id)
        enough.touch()
        await second.page.done(working)
        await second.until_idle()
        with pytest.raises(CapacityError, match=r"0\.5 GiB of the host's") as caught:  # The first has 1 of the 1.5.
            await second.do("park")
        assert "park_memory" in caught.value.hint
        await client.delete(f"/sandboxes/{second.sandbox_id}")
        await first.page.done(again)
        assert first.page.said(again) == f"({pid}, 42)"
        info = await first.info()
        assert (info["parked"], info["gpus"][0]["name"], info["queue"]) == (None, "A100", None)
        assert set(info["phases_ms"]) == {"queue", "unpark", "ready"}
        await first.until_idle()
        await first.do("park")
        restarted = await client.post("/kernels", first.body, timeout=120)
        assert (restarted["id"], restarted["parked"]) == (first.sandbox_id, None)
        assert await gpu(client) == (first.sandbox_id, GIB)


async def test_two_kernels_share_a_gpu_by_turns(places: Places, tmp_path: Path) -> None:
    """The idle one is parked for whoever waits for its GPU; what was given back is told."""
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(keeper(places, **HERE, park_after=3600, gpu_yield_after=0.3))
        told = await stack.enter_async_context(changes(client))
        first = await stack.enter_async_context(notebook(client, tmp_path, gpu="A100", **PLAIN))
        await first.run("x = 0")
        second = await stack.enter_async_context(notebook(client, tmp_path, gpu="A100", **PLAIN))
        await parked(told, first)
        await second.run("x = 100")
        for turn in range(1, 3):
            assert await first.run("x += 1; x") == str(turn)
            assert await second.run("x += 1; x") == str(100 + turn)
        rows = (await client.get("/usage?by=sandbox"))["rows"]
        used = {row["sandbox_id"]: row["usage"] for row in rows}
        assert used[first.sandbox_id]["gpu_given_back_s"] > 0
        assert used[first.sandbox_id]["suspended_s"] == 0


async def test_a_kernel_is_parked_after_a_while(places: Places, tmp_path: Path) -> None:
    """Though nobody waits for its GPU; its next cell goes on with its variables."""
    async with (
        keeper(places, **HERE, park_after=0.3, gpu_yield_after=0) as client,
        changes(client) as told,
        notebook(client, tmp_path, gpu="A100", **PLAIN) as book,
    ):
        await book.run("x = 1")
        await parked(told, book)
        assert await book.run("x + 1") == "2"


async def test_a_kernel_goes_on_before_its_cell_is_there(places: Places, tmp_path: Path) -> None:
    """At a sign that a cell will come, if a GPU is free; unused it is given back after as long as ever, and not taken
    again before a cell has run. Whoever comes back takes it each time, and may then write.
    """
    async with (
        keeper(places, **HERE, park_after=1.0, gpu_yield_after=0) as client,
        changes(client) as told,
        notebook(client, tmp_path, gpu="A100", **PLAIN) as book,
    ):

        async def until_parked() -> None:
            async with asyncio.timeout(60):
                while (await book.info())["parked"] is None:
                    await told.get()

        await book.run("x = 1")
        await until_parked()
        other = await client.post("/sandboxes", {"spec": {**book.body["spec"], "gpu": "A100"}})
        refused = await book.do("wake")
        assert (refused["parked"] is not None, refused["phase"], refused["queue"]) == (True, None, None)
        assert (await client.get("/gpus"))["queue"] == []
        await client.delete(f"/sandboxes/{other['id']}")
        woken = await book.do("wake")
        assert (woken["parked"], len(woken["gpus"])) == (None, 1)
        assert (await book.do("wake"))["parked"] is None
        await until_parked()
        assert await gpu(client) == (None, 0)
        assert (await book.do("wake"))["parked"] is not None
        assert (await book.do("wake", returned=True))["parked"] is None
        await until_parked()
        assert await book.run("x + 1") == "2"
        await until_parked()
        assert (await book.do("wake", returned=True))["parked"] is None
        await until_parked()
        assert (await book.do("wake"))["parked"] is None


async def test_only_a_cell_takes_back_what_was_given_back_by_hand(places: Places, tmp_path: Path) -> None:
    """However much is typed."""
    async with (
        keeper(places, **HERE, park_after=0, gpu_yield_after=0) as client,
        notebook(client, tmp_path, gpu="A100", **PLAIN) as book,
    ):
        await book.run("x = 1")
        await book.until_idle()
        await book.do("park")
        assert (await book.do("wake"))["parked"] is not None
        assert (await book.do("wake", returned=True))["parked"] is not None
        assert await book.run("x + 1") == "2"


async def test_kernels_wait_for_their_cell_where_the_operator_wants_it(places: Places, tmp_path: Path) -> None:
    """`c.Warmcell.wake_on_typing = False`."""
    async with (
        keeper(places, **HERE, park_after=0.3, gpu_yield_after=0, wake_on_typing=False) as client,
        changes(client) as told,
        notebook(client, tmp_path, gpu="A100", **PLAIN) as book,
    ):
        await book.run("x = 1")
        await parked(told, book)
        assert (await book.do("wake"))["parked"] is not None
        assert await gpu(client) == (None, 0)


TRAINING = """
import hashlib, torch
torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters())
views = [each.t() for each in model.parameters()]
def train(steps):
    for _ in range(steps):
        x = torch.randn(32, 64)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
def state():
    parts = [*views, *(v for s in optimizer.state.values() for v in s.values()), torch.get_rng_state()]
    return hashlib.sha256(b"".join(bytes(p.detach().clone().contiguous().numpy()) for p in parts)).hexdigest()
"""


async def test_torch_moves_what_the_driver_cannot(places: Places, tmp_path: Path) -> None:
    """An instance of a divided GPU is given back where the operator allows it; meanwhile somebody else has it, the cell
    that wants it back waits in the queue, and training goes on bit by bit as if nothing had been.
    """
    kinds = [{"name": "A100 MIG 3g.40gb", "memory": "40GiB", "mig": True}]
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            keeper(places, simulated_gpus=kinds, backend="process", park_after=0, park_with_torch=True)
        )
        told = await stack.enter_async_context(changes(client))
        first = await stack.enter_async_context(notebook(client, tmp_path, gpu="3g.40gb", **PLAIN))
        await first.run(TRAINING)
        expected = await first.run("train(4); print(state())")
        await first.run(TRAINING)
        await first.run("train(2)")
        await first.until_idle()
        await first.run(
            "import threading; over = threading.Event()\nthread = threading.Thread(target=over.wait); thread.start()"
        )
        await first.until_idle()
        with pytest.raises(UnsupportedOperationError, match="A thread of the notebook's runs"):
            await first.do("park")
        await first.run("over.set(); thread.join()")
        await first.until_idle()
        info = await first.do("park")
        assert (info["parked"]["by"], info["gpus"]) == ("torch", [])
        assert info["parked"]["vram_bytes"] > 3 * 4 * 64 * 64
        second = await stack.enter_async_context(notebook(client, tmp_path, gpu="3g.40gb", **PLAIN))
        asking = first.page.send("train(2); print(state())")
        queued = await until_queued(told, first.sandbox_id)
        assert second.sandbox_id in queued["phase"]["hint"]
        await client.delete(f"/sandboxes/{second.sandbox_id}")
        await first.page.done(asking)
        assert first.page.said(asking).strip() == expected


@pytest.mark.skipif(COMPILER is None, reason="not here: cc")
@pytest.mark.parametrize("by_torch", [False, True], ids=["by the driver", "by torch"])
async def test_managed_memory_is_found_before_the_driver_is_asked(
    places: Places, tmp_path: Path, *, by_torch: bool
) -> None:
    """The kernel has all it had, and says what is in the way; torch moves its own beside it."""
    async with (
        keeper(places, **HERE, park_after=0, park_with_torch=by_torch) as client,
        notebook(client, tmp_path, gpu="A100", **PLAIN) as book,
    ):
        assert await book.run(f"import torch; x = torch.ones(3)\n{managed(tmp_path)}") == ""
        await book.until_idle()
        if by_torch:
            assert (await book.do("park"))["parked"]["by"] == "torch"
        else:
            with pytest.raises(UnsupportedOperationError, match="managed memory") as caught:
                await book.do("park")
            assert "restart the kernel" in caught.value.hint
            assert (await book.info())["parked"] is None
        assert await book.run("print(int(x.sum()), mapped[3 * 2**16 :][:7])") == "3 b'managed'"


@pytest.mark.bubblewrap
async def test_a_sandbox_of_code_is_parked_while_nothing_runs_in_it(places: Places, tmp_path: Path) -> None:
    """Its files are looked at without a GPU; a command takes one and keeps it while it runs, and so does code, which
    finds its variables.
    """
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            keeper(places, simulated_gpus=A100S, backend="bubblewrap", park_after=0.3, gpu_yield_after=0)
        )
        told = await stack.enter_async_context(changes(client))
        spec = {"preload": [], "gpu": "A100"}
        box = (await client.post("/sandboxes", {"spec": spec, "terms": {"timeout_s": None}}, timeout=120))["id"]

        async def ran(code: str) -> Any:
            run = await client.post(f"/sandboxes/{box}/runs", {"code": code})
            return await client.get(f"/sandboxes/{box}/runs/{run['id']}?wait=60")

        async def until(is_parked: bool) -> None:
            async with asyncio.timeout(60):
                while ((await client.get(f"/sandboxes/{box}"))["parked"] is not None) is not is_parked:
                    await told.get()

        await ran("x = 41")
        await until(True)
        assert await gpu(client) == (None, 0)
        command = await client.post(f"/sandboxes/{box}/commands", {"argv": ["sleep", "1000"]})
        assert await gpu(client) == (box, GIB)
        with pytest.raises(ConflictError, match="command runs"):
            await client.post(f"/sandboxes/{box}/park", {})
        await ran("x += 1")
        await asyncio.sleep(1.0)  # It would have been parked three times.
        assert (await client.get(f"/sandboxes/{box}"))["parked"] is None
        await client.delete(f"/sandboxes/{box}/commands/{command['id']}")
        await until(True)
        assert (await ran("assert x == 42"))["error"] is None
        assert (await client.post(f"/sandboxes/{box}/park", {}))["gpus"] == []
        assert len((await client.post(f"/sandboxes/{box}/resume", {}))["gpus"]) == 1


@pytest.mark.criu
async def test_a_parked_kernel_is_suspended_and_comes_back_whole(places: Places, tmp_path: Path) -> None:
    """Longer idle it goes to disk, with what it had on the GPU, and its next cell has it go on with a GPU."""
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(keeper(places, simulated_gpus=A100S, park_after=0))
        book = await stack.enter_async_context(notebook(client, tmp_path, gpu="A100"))
        await book.run("x = 41")
        await book.until_idle()
        await book.do("park")
        named = await book.do("snapshot", name="parked")
        assert (await book.info())["parked"] is not None
        suspended = await book.do("suspend")
        assert (suspended["state"], suspended["parked"]) == ("suspended", None)
        assert await book.run("x += 1; x") == "42"
        assert (await book.info())["gpus"][0]["name"] == "A100"
        await book.do("restore", snapshot=named["id"])
        assert await book.run("x") == "41"


async def test_a_kernel_gets_another_gpu_and_keeps_its_variables(places: Places, tmp_path: Path) -> None:
    """From a cell or by REST, in the same process: any before it has used one, then those of that kind. What cannot be
    is refused, and it keeps what it has.
    """
    kinds = [{"name": "A100", "memory": "80GiB", "count": 2, "used": "1GiB"}, {"name": "T4", "memory": "16GiB"}]
    async with (
        keeper(places, simulated_gpus=kinds, backend="process", park_after=0) as client,
        notebook(client, tmp_path, **PLAIN) as book,
    ):
        pid = await book.run("import os; x = 41; print(os.getpid())")
        first, second, _ = (await client.get("/gpus"))["gpus"]

        async def held() -> list[str | None]:
            rows = (await client.get("/gpus"))["gpus"]
            return [row["lease"] and row["lease"]["sandbox_id"] for row in rows]

        assert await book.run("%gpu A100") == "GPU: A100 (simulated)"
        assert await held() == [book.sandbox_id, None, None]
        assert await book.run("os.getpid(), os.environ['WARMCELL_GPUS'], x") == f"({pid}, 'A100', 41)"
        assert first["uuid"] in await book.run("%gpu")
        await book.until_idle()
        info = await book.do("gpu", gpu=second["uuid"])
        assert [gpu["uuid"] for gpu in info["gpus"]] == [second["uuid"]]
        assert await held() == [None, book.sandbox_id, None]
        assert await book.run("os.getpid(), x") == f"({pid}, 41)"

        other = await client.post("/sandboxes", {"spec": {**book.body["spec"], "gpu": first["uuid"]}})
        for wanted, kind, words in (
            ("T4", UnsupportedOperationError, "cannot go on on T4"),
            (None, UnsupportedOperationError, "cannot go on on none"),
            (first["uuid"], NoGpuAvailableError, other["id"]),
            ("H100", UnknownGpuKindError, "has no H100"),
            (7, InvalidRequestError, "must be a request"),
        ):
            with pytest.raises(kind, match=words):
                await book.do("gpu", gpu=wanted)
            assert await held() == [other["id"], book.sandbox_id, None]
        assert "cannot go on on T4" in await book.run("%gpu T4")
        assert await book.run("x") == "41"
        await book.until_idle()
        await book.do("park")
        assert await book.do("gpu", gpu="A100:1")
        assert await held() == [other["id"], book.sandbox_id, None]
        assert await book.run("os.getpid(), x") == f"({pid}, 41)"
