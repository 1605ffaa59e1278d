"""The server's managers of single kernels: how soon a start is over, and whose."""

import asyncio
from collections.abc import Iterator

import pytest
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager, ServerKernelManager

from benchmarks.server import end_keeper
from tests.jupyter.warmcell_kernels import NAME, configure, connected, kernelspec, said
from tests.leaks import Places
from warmcell.extension.server.managers import PromptKernelManager, use_prompt_managers

pytestmark = pytest.mark.bubblewrap

PAUSE_S = 0.01
"""What jupyter_client sleeps after each start and each end."""


@pytest.fixture(autouse=True)
def keeper(places: Places) -> Iterator[None]:
    configure(places)
    kernelspec(places)
    yield
    end_keeper(places)


class OneOfTheirOwn(ServerKernelManager):
    """What somebody has configured."""


@pytest.mark.parametrize(("kernel", "pauses"), [(NAME, [0, 0, 0]), ("python3", [1, 3, 4])])
async def test_a_change_of_ours_is_over_when_it_is_done(
    kernel: str, pauses: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jupyter's own wait after starts and ends is left out for our kernels alone; they are ready, and restart."""
    sleep, slept = asyncio.sleep, []

    async def noted(delay: float, result: object = None) -> object:
        slept.append(delay)
        return await sleep(delay, result)

    manager = PromptKernelManager(kernel_name=kernel)
    monkeypatch.setattr(asyncio, "sleep", noted)
    took = []
    await manager.start_kernel()
    try:
        took.append(slept.count(PAUSE_S))
        assert manager.ready.done()
        await manager.restart_kernel(now=True)
        took.append(slept.count(PAUSE_S))
        assert manager.ready.done()
        async with connected(manager) as client:
            assert await said(client, "print('there')") == "there"
    finally:
        await manager.shutdown_kernel(now=True)
    took.append(slept.count(PAUSE_S))
    assert took == pauses
    assert manager.ready.done()


async def test_a_start_of_ours_that_fails_says_why_to_whoever_waits(places: Places) -> None:
    """As with Jupyter's own: the error is raised, and is that of `ready`."""
    kernelspec(places, name="nowhere", python="/no/such/python")
    manager = PromptKernelManager(kernel_name="nowhere")
    with pytest.raises(Exception, match="/no/such/python") as raised:
        await manager.start_kernel()
    assert manager.ready.exception() is raised.value


def test_a_class_that_was_configured_stays() -> None:
    """Only Jupyter's own is replaced."""
    plain = AsyncMappingKernelManager()
    use_prompt_managers(plain)
    assert isinstance(plain.kernel_manager_factory(), PromptKernelManager)
    theirs = AsyncMappingKernelManager(kernel_manager_class=f"{__name__}.OneOfTheirOwn")
    use_prompt_managers(theirs)
    assert type(theirs.kernel_manager_factory()) is OneOfTheirOwn
