"""What users are told of their kernels when the engine of containers, a container or an image goes away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager

from benchmarks.server import end_keeper
from tests.engines import IMAGE, Dockerd
from tests.jupyter.warmcell_kernels import (
    TIMEOUT_S,
    configure,
    connected,
    kernelspec,
    provisioner_of,
    said,
    started,
    until,
)
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import BackendUnavailableError, InvalidRequestError

pytestmark = pytest.mark.docker

DOOMED = "warmcell-test:doomed"


@pytest.fixture(autouse=True)
def keeper(places: Places, docker: Dockerd) -> Iterator[None]:
    """A keeper that uses the engine of the tests."""
    configure(places, docker_host=docker.host)
    kernelspec(places, backend="docker", image=IMAGE)
    yield
    end_keeper(places)


@pytest.fixture
async def doomed(docker: Dockerd) -> AsyncIterator[str]:
    """An image of its own, which a test may remove."""
    await asyncio.to_thread(docker.docker, "create", "--name", "origin", IMAGE, "true")
    await asyncio.to_thread(docker.docker, "commit", "--change", "LABEL doomed=yes", "origin", DOOMED)
    await asyncio.to_thread(docker.docker, "rm", "origin")
    yield DOOMED
    for image in (await asyncio.to_thread(docker.docker, "images", "--quiet", "--filter", "label=doomed")).split():
        await asyncio.to_thread(docker.docker, "rmi", "--force", image)


async def told(manager: AsyncKernelManager) -> dict[str, Any]:
    """What the keeper tells of a kernel's sandbox."""
    async with await KeeperClient.connect(start=False) as keeper:
        found: list[dict[str, Any]] = (await keeper.get("/sandboxes"))["sandboxes"]
    (one,) = (one for one in found if one["kernel_id"] == provisioner_of(manager).kernel_id)
    return one


async def lost(manager: AsyncKernelManager) -> dict[str, Any]:
    """What is told of a sandbox that ends by itself, which Jupyter sees as well."""

    async def failed() -> bool:
        return str((await told(manager))["state"]) == "failed"

    async def seen() -> bool:
        return not await manager.is_alive()

    await until(failed)
    await until(seen)
    error: dict[str, Any] = (await told(manager))["error"]
    return error


@pytest.mark.parametrize("live_restore", [False, True])
async def test_kernels_run_on_while_their_engine_is_gone(
    places: Places, mortal: Dockerd, docker: Dockerd, live_restore: bool
) -> None:
    """They answer and restart without it, a new one fails with the cure; once it is back they live or are told dead."""
    if live_restore:
        await asyncio.to_thread(mortal.kill)
        await asyncio.to_thread(mortal.start, live_restore=True)
    async with started() as manager:
        async with connected(manager) as client:
            await said(client, "x = 1")
            await asyncio.to_thread(mortal.kill)
            assert await said(client, "print(x)") == "1"
            await manager.restart_kernel()
            await client.wait_for_ready(timeout=TIMEOUT_S)
            assert await said(client, "x = 2; print(x)") == "2"
            with pytest.raises(BackendUnavailableError) as refused:
                async with started():
                    pass
            assert "systemctl start docker" in refused.value.hint
            assert (await told(manager))["state"] == "running"
            await asyncio.to_thread(mortal.start, live_restore=live_restore)
            if live_restore:
                assert await said(client, "print(x)") == "2"
                assert (await told(manager))["state"] == "running"
            else:
                error = await lost(manager)
                assert (error["code"], error["hint"]) == ("sandbox_died", "Restart the kernel.")
        if not live_restore:
            await manager.restart_kernel()
        async with connected(manager) as client:
            assert await said(client, "print(x)") == ("2" if live_restore else "NameError")


async def test_nobody_waits_for_an_engine_that_does_not_answer(places: Places, docker: Dockerd) -> None:
    """While a start waits for it, the keeper answers and other kernels run; the start goes on once the engine does."""
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(connected(await stack.enter_async_context(started())))
        with docker.paused():
            start = asyncio.ensure_future(stack.enter_async_context(started()))
            async with await KeeperClient.connect(start=False) as keeper:

                async def waits() -> bool:
                    phases = [one["phase"] or {} for one in (await keeper.get("/sandboxes"))["sandboxes"]]
                    return any(phase.get("name") == "sandbox" for phase in phases)

                await until(waits)
            assert await said(client, "print(42)") == "42"
            assert not start.done()
        other = await stack.enter_async_context(connected(await start))
        assert await said(other, "print(43)") == "43"


async def test_a_container_that_somebody_removes_is_told_and_the_kernel_starts_again(
    places: Places, docker: Dockerd
) -> None:
    """Its sandbox has failed for that reason, and a restart makes another one."""
    async with started() as manager:
        (running,) = docker.docker("ps", "--quiet").split()
        await asyncio.to_thread(docker.docker, "rm", "--force", running)
        assert "removed by somebody" in (await lost(manager))["message"]
        await manager.restart_kernel()
        async with connected(manager) as client:
            assert await said(client, "print(42)") == "42"
        (other,) = docker.docker("ps", "--quiet").split()
        assert other != running


@pytest.mark.parametrize("snapshots", ["none", pytest.param("auto", marks=pytest.mark.criu)])
async def test_an_image_that_is_removed_below_what_is_prepared_of_it(
    places: Places, docker: Dockerd, doomed: str, snapshots: str
) -> None:
    """What runs goes on and restarts, what was prepared serves one more kernel, and then the error names the image.
    It comes at once where templates are saved: which one is right is told by the image.
    """
    configure(places, docker_host=docker.host, prepared=1, snapshots=snapshots)
    kernelspec(places, name="prepared", backend="docker", image=doomed, preload=["json"], template="t")

    async def prepared() -> bool:
        async with await KeeperClient.connect(start=False) as keeper:
            return any(one["prepared"] for one in (await keeper.get("/templates"))["templates"])

    async with started(name="prepared") as manager, connected(manager) as client:
        await said(client, "x = 1")
        await until(prepared)
        await asyncio.to_thread(docker.docker, "rmi", "--force", doomed)
        if snapshots == "none":
            async with started(name="prepared") as second, connected(second) as other:
                assert (await told(second))["started_from"] == "template"
                assert await said(other, "print(42)") == "42"
        with pytest.raises(InvalidRequestError, match=doomed) as missed:
            async with started(name="prepared"):
                pass
        assert f"docker pull {doomed}" in missed.value.hint
        assert await said(client, "print(x)") == "1"
        await manager.restart_kernel()
        await client.wait_for_ready(timeout=TIMEOUT_S)
        assert await said(client, "print(x)") == "NameError"
