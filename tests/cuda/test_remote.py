"""Ranks on real GPUs, by `scripts/cuda-lane`: tensors there and back, and what NCCL finds between them."""

from pathlib import Path

import pytest

from tests.cuda import gpu
from tests.cuda.gpu import machine
from tests.leaks import Places

needs_gpu = pytest.mark.skipif(bool(gpu.absence()), reason=gpu.absence() or "there is one")

RANKS = 2

REDUCE = f"""\
%%remote gpu=any n={RANKS} get=total,seen,said
import os
log = f"nccl-{{os.environ['RANK']}}"
os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,P2P,SHM", NCCL_DEBUG_FILE=log)
import torch, torch.distributed as dist
seen = torch.cuda.device_count()
torch.cuda.set_device(0)
dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
x = torch.full((1 << 20,), float(dist.get_rank() + 1), device="cuda")
dist.all_reduce(x)
torch.cuda.synchronize()
total = float(x[0])
dist.destroy_process_group()
said = open(log).read()
"""


@needs_gpu
async def test_a_tensor_of_a_gpu_goes_there_and_back(places: Places, tmp_path: Path) -> None:
    """What was on a GPU here is on the rank's there; what comes back from that is on one here, if there is one."""
    async with machine(places, tmp_path) as here:
        devices = await here.whole()
        if len(devices) < RANKS:
            pytest.skip(f"{len(devices)} GPU: the notebook and its rank need one each")
        async with here.notebook("any") as book:
            await book.run("import torch\nsent = torch.arange(100_000, device='cuda', dtype=torch.float32)")
            await book.run("%%remote gpu=any get=back,where\nback = sent * 2\nwhere = str(sent.device)")
            assert await book.run("print(where, back.device, bool((back == sent * 2).all()))") == "cuda:0 cuda:0 True"


@needs_gpu
async def test_ranks_reach_each_other_without_the_network(places: Places, tmp_path: Path) -> None:
    """NCCL's own log names peer access or shared memory for its channels, and no socket."""
    async with machine(places, tmp_path) as here:
        devices = await here.whole()
        if len(devices) < RANKS:
            pytest.skip(f"{len(devices)} GPU: NCCL takes no two ranks on one")
        async with here.notebook(None) as book:
            await book.run(REDUCE)
            assert await book.run("print(total, seen)") == f"{[3.0] * RANKS} {[1] * RANKS}"
            await book.run("lines = [line for text in said for line in text.splitlines() if ' via ' in line]")
            ways = (await book.run("print(*{line.rpartition(' via ')[2].split('/')[0] for line in lines})")).split()
            assert ways
            assert set(ways) <= {"P2P", "SHM"}
