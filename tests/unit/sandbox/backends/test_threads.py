"""Removals that are not given up halfway, and what waits for an engine for long without holding up anybody."""

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import Places
from warmcell.sandbox.backends.docker import DockerBackend
from warmcell.sandbox.backends.threads import in_thread, to_its_end
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.ids import new_sandbox_id
from warmcell.sandbox.images.base import PackageIndex
from warmcell.sandbox.images.containers import ContainerImageBuilder
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths

MANY = 10


async def test_what_is_done_to_its_end_is_done_though_who_waits_is_cancelled() -> None:
    """And whoever waits is cancelled only when it is done."""
    began, go_on = asyncio.Event(), asyncio.Event()
    done: list[bool] = []

    async def work() -> None:
        began.set()
        await go_on.wait()
        done.append(True)

    waiting = asyncio.create_task(to_its_end(work()))
    await began.wait()
    waiting.cancel()
    await asyncio.wait({waiting}, timeout=0.01)
    assert not waiting.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert done == [True]


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[socket.socket]:
    """An engine that takes requests and answers none, as one that is stopped."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "sock"))
        made.listen(100)
        yield made


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # docker-py leaves them to the collector.
@pytest.mark.parametrize("what", ["starts", "builds"])
async def test_an_engine_that_does_not_answer_holds_up_nothing_else(
    silent: socket.socket, places: Places, what: str
) -> None:
    """Ten starts of containers, or ten builds, wait for it; the two threads that all others share are free."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    paths = Paths(places.runtime, places.state, places.leases).make()
    backend = DockerBackend(paths=paths, host=f"unix://{silent.getsockname()}", image="any")
    builder = ContainerImageBuilder(engine=backend.engine, index=PackageIndex())
    asked: list[asyncio.Task[Any]]
    if what == "starts":
        asked = [
            asyncio.create_task(
                backend.create(SandboxSpec(python=""), sandbox_id=new_sandbox_id(), directory=places.root)
            )
            for _ in range(MANY)
        ]
    else:
        asked = [
            asyncio.create_task(builder.build(Image.from_registry(f"x{n}").run("true"), tell=lambda line: None))
            for n in range(MANY)
        ]
    silent.setblocking(False)
    async with asyncio.timeout(60):  # Each looks whether the engine is there, then asks it.
        taken = [(await asyncio.get_running_loop().sock_accept(silent))[0] for _ in range(2 * MANY)]
    assert await asyncio.wait_for(in_thread(lambda: "served"), 60) == "served"
    assert not any(task.done() for task in asked)
    silent.close()
    for one in taken:
        one.close()
    for ended in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(ended, WarmcellError)
