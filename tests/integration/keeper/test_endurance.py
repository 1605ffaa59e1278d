"""The keeper over many generations of a kernel: nothing grows."""

import os

import pytest

from tests.integration.keeper.conftest import KernelBody
from warmcell.sandbox.client.keeper import KeeperClient


async def restarts_leave_nothing(keeper: KeeperClient, kernel_body: KernelBody, generations: int) -> None:
    body = kernel_body()
    info = await keeper.post("/kernels", body)
    descriptors = f"/proc/{(await keeper.get('/status'))['pid']}/fd"
    before = len(os.listdir(descriptors))
    for _ in range(generations):
        await keeper.post(f"/kernels/{body['kernel_id']}/end", {"grace_s": 0})
        again = await keeper.post("/kernels", body)
    assert (again["id"], again["generation"]) == (info["id"], generations + 1)
    assert len(os.listdir(descriptors)) <= before + 2


async def test_restarts_leave_no_descriptor_open(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """Five restarts: the same sandbox, the next generation, no more descriptors in the keeper."""
    await restarts_leave_nothing(keeper, kernel_body, 5)


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_many_restarts_leave_no_descriptor_open(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """The same over a hundred."""
    await restarts_leave_nothing(keeper, kernel_body, 100)
