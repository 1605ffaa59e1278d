"""Kernels in containers, started and used as any other by jupyter_client."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.server import end_keeper
from tests.engines import IMAGE, Dockerd
from tests.jupyter.warmcell_kernels import TIMEOUT_S, configure, connected, kernelspec, said, started
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import WarmcellError

pytestmark = pytest.mark.docker


@pytest.fixture(autouse=True)
def keeper(places: Places, docker: Dockerd) -> Iterator[None]:
    """A keeper that uses the engine of the tests."""
    configure(places, docker_host=docker.host)
    yield
    end_keeper(places)


async def test_a_kernel_runs_in_a_container_is_interrupted_and_restarted(places: Places, docker: Dockerd) -> None:
    """The image's Python, with no network and not as root; interrupt and restart do what they do elsewhere."""
    kernelspec(places, backend="docker", image=IMAGE)
    folder = places.root / "work"
    folder.mkdir()
    async with started(cwd=str(folder)) as manager, connected(manager) as client:
        (running,) = docker.docker("ps", "--quiet").splitlines()
        assert await said(client, "import os; print(os.getcwd())") == str(folder)
        assert await said(client, "import os, sys; x = 1; print(os.getuid() != 0, sys.executable)") == (
            "True /usr/bin/python3"
        )
        assert await said(client, "import socket; socket.create_connection(('1.1.1.1', 53), 1)") == "OSError"

        asleep, heard = asyncio.Event(), list[dict[str, Any]]()

        def hear(message: dict[str, Any]) -> None:
            heard.append(message["content"])
            if message["msg_type"] == "stream":
                asleep.set()

        code = "print('asleep', flush=True); import time; time.sleep(600)"
        sleeping = asyncio.ensure_future(client.execute_interactive(code, output_hook=hear, timeout=TIMEOUT_S))
        await asyncio.wait_for(asleep.wait(), TIMEOUT_S)
        await manager.interrupt_kernel()
        await sleeping
        assert [content["ename"] for content in heard if "ename" in content] == ["KeyboardInterrupt"]
        assert await said(client, "print(x)") == "1"

        await manager.restart_kernel()
        await client.wait_for_ready(timeout=TIMEOUT_S)
        assert await said(client, "print(x)") == "NameError"
        assert docker.docker("ps", "--quiet").splitlines() == [running]


async def test_the_image_of_the_configuration_is_for_those_who_name_none(places: Places, docker: Dockerd) -> None:
    """With docker as the usual backend an ordinary kernelspec's kernels are containers."""
    configure(places, docker_host=docker.host, backend="docker", docker_image=IMAGE)
    kernelspec(places)
    folder = places.root / "work"
    folder.mkdir()
    async with started(cwd=str(folder)) as manager, connected(manager) as client:
        assert await said(client, "import sys; print(sys.executable)") == "/usr/bin/python3"
        async with await KeeperClient.connect(start=False) as keeper:
            (told,) = (await keeper.get("/sandboxes"))["sandboxes"]
        assert (told["backend"], told["isolated"]) == ("docker", True)


async def test_an_image_that_the_engine_has_not_is_told_by_name(places: Places) -> None:
    """A start fails with the image's name and how it is to be had, and leaves nothing."""
    kernelspec(places, backend="docker", image="warmcell-test:missing")
    with pytest.raises(WarmcellError, match="warmcell-test:missing") as failed:
        async with started():
            pass
    assert "docker pull warmcell-test:missing" in failed.value.hint
