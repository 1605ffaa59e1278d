"""Far more sandboxes asked for at once than can come up: they wait, leave with who asked, and are in nobody's way."""

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.keeper.conftest import Configure, until
from warmcell import AsyncSandbox
from warmcell.extension.keeper.agents.once import GIVEN_UP_S
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.paths import Paths

pytestmark = pytest.mark.bubblewrap

SPARE = 20
"""How many more than are asked for at first."""
EACH_MAX_BYTES = 256 * 1024
"""What one that waits may take in the keeper."""

BOX = {"spec": {"preload": []}}
GPUS = [{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 1}]


@pytest.fixture
def count() -> int:
    """Sandboxes for which there is room."""
    return 10


@pytest.fixture
def configure(configure: Configure, count: int) -> Configure:
    """The cheapest sandboxes, room for so many of them and a few more, and one GPU."""
    configure(backend="bubblewrap", keeper_idle_s=0.2, prepared=0, max_sandboxes=count + SPARE, simulated_gpus=GPUS)
    return configure


@contextlib.asynccontextmanager
async def client(keeper: KeeperClient, name: str) -> AsyncIterator[httpx.AsyncClient]:
    """One with a token, and as many connections as it likes."""
    token = (await keeper.post("/tokens", {"principal": name}))["token"]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket), limits=limits),
        base_url="http://keeper/warmcell/api/v1",
        headers={"Authorization": f"Bearer {token}"},
        timeout=300,
    ) as http:
        yield http


def resident_bytes(pid: int) -> int:
    """What a process has in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


async def states(keeper: KeeperClient) -> Counter[str]:
    """How many sandboxes are in which state."""
    return Counter(one["state"] for one in (await keeper.get("/sandboxes"))["sandboxes"])


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
async def test_many_at_once_wait_and_nobody_waits_for_them(keeper: KeeperClient, count: int) -> None:
    """In bounded memory; what is too many is refused at once; others come up meanwhile; whoever hangs up leaves the
    queue; and one call removes all that is left of them, with an answer to each.
    """
    pid = (await keeper.get("/status"))["pid"]
    async with client(keeper, "ann") as ann, client(keeper, "bob") as bob:
        before = resident_bytes(pid)
        asked = [asyncio.create_task(ann.post("/sandboxes", json=BOX)) for _ in range(count)]

        async def hers() -> int:
            return int((await keeper.get("/principals/ann"))["used"]["sandboxes"])

        async def all_there() -> bool:
            return await hers() == count

        await until(all_there)
        assert (resident_bytes(pid) - before) / count < EACH_MAX_BYTES
        up = sum(one.done() for one in asked)
        assert up < count / 2
        assert (await bob.post("/sandboxes", json=BOX)).status_code == 201
        assert sum(one.done() for one in asked) - up < count / 10, "they are served in rotation"
        slowest = 0.0
        for _ in range(20):
            began = time.monotonic()
            await keeper.get("/status")
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 5
        more = await asyncio.gather(*(bob.post("/check", json=BOX) for _ in range(3)))
        assert [one.status_code for one in more] == [200] * 3
        beyond = [asyncio.create_task(ann.post("/sandboxes", json=BOX)) for _ in range(2 * SPARE)]
        done, _ = await asyncio.wait(beyond, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        assert (refused.status_code, refused.json()["code"]) == (503, "capacity")
        assert "c.Warmcell.max_sandboxes" in refused.json()["hint"]

        gone, stay = asked[count // 2 :], asked[: count // 2] + beyond
        for one in gone:
            one.cancel()
        await asyncio.gather(*gone, return_exceptions=True)

        async def left() -> bool:
            return await hers() < count

        await until(left)
        everything: dict[str, Any] = await keeper.delete("/principals/ann", timeout=None)
        assert len(everything["sandboxes"]) > count / 10
        ends = Counter(answer.status_code for answer in await asyncio.gather(*stay))
        assert set(ends) <= {201, 401, 409, 503}, ends
        assert ends[401] + ends[409] > count / 10, ends
        assert "ann" not in {one["principal"] for one in (await keeper.get("/sandboxes"))["sandboxes"]}


async def test_who_goes_away_while_waiting_for_a_gpu_leaves_the_queue(keeper: KeeperClient) -> None:
    """Also with an SDK that would ask again: after a while in which it has not, and the next one moves up."""
    async with AsyncSandbox(gpu="A100", preload=()) as box:
        waiting = [asyncio.create_task(AsyncSandbox.create(gpu="A100", preload=())) for _ in range(3)]

        async def queued(count: int) -> bool:
            return len((await keeper.get("/gpus"))["queue"]) == count

        await until(lambda: queued(3))
        for one in waiting[:2]:
            one.cancel()
        await asyncio.gather(*waiting[:2], return_exceptions=True)
        assert await queued(3), "a connection may have broken"
        await until(lambda: queued(1), timeout=GIVEN_UP_S + 60)
        assert (await states(keeper))["creating"] == 1
        await box.suspend()
        async with await waiting[2] as later:  # What is suspended has given its GPU back.
            assert (await later.run("1 + 1")).text == "2"
