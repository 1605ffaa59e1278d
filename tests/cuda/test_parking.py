"""Parking on a real GPU, by `scripts/cuda-lane`: what is promised in docs/howto/gpus.md. Skipped with its reason."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cuda import gpu
from tests.cuda.gpu import machine, parked
from tests.integration.snapshots import notebooks
from tests.integration.snapshots.notebooks import Notebook
from tests.lanes import absence
from tests.leaks import Places
from warmcell.sandbox.errors import UnsupportedOperationError
from warmcell.sandbox.models import GIB, MIB

needs_gpu = pytest.mark.skipif(bool(gpu.absence()), reason=gpu.absence() or "there is one")

TRAINING = """
import hashlib, os, torch
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
torch.use_deterministic_algorithms(True)
torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
def train(steps):
    for _ in range(steps):
        x = torch.randn(256, 512, device="cuda")
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
def state():
    parts = [p for p in model.parameters()] + [v for s in optimizer.state.values() for v in s.values()]
    whole = b"".join(p.detach().cpu().numpy().tobytes() for p in parts) + torch.cuda.get_rng_state().numpy().tobytes()
    return hashlib.sha256(whole).hexdigest()
"""

SLACK_BYTES = 64 * MIB
"""What the driver itself keeps more or less of on a device."""


async def trained(book: Notebook) -> str:
    """What six steps without a break end in."""
    assert await book.run(TRAINING) == ""
    state = await book.run("train(6); print(state())")
    assert re.fullmatch("[0-9a-f]{64}", state), state
    return state


@pytest.mark.skipif("WARMCELL_CUDA_LANE" not in os.environ, reason="for scripts/cuda-lane: tests/integration has it")
async def test_the_lane_itself_works_here(places: Places, tmp_path: Path) -> None:
    """A kernel with a GPU that is made up is parked and goes on: keeper, kernel and client are whole."""
    simulated = [{"name": "A100", "memory": "80GiB", "used": "1MiB"}]
    async with machine(places, tmp_path, simulated_gpus=simulated) as here, here.notebook("A100") as book:
        await book.run("x = 41")
        assert (await parked(book))["parked"]["vram_bytes"] == MIB
        assert await book.run("x + 1") == "42"


@needs_gpu
async def test_training_continues_bit_equal(places: Places, tmp_path: Path) -> None:
    """Six steps with parking in the middle are six steps without; meanwhile the GPU's memory is as before."""
    async with machine(places, tmp_path) as here:
        device = (await here.whole())[0]
        before = await here.on(device)
        assert before[0] == 0, "somebody else computes there"
        async with here.notebook(device.uuid) as straight:
            expected = await trained(straight)
        async with here.notebook(device.uuid) as book:
            assert await book.run(TRAINING) == ""
            assert await book.run("train(3)") == ""
            assert (await here.on(device))[0] == 1
            info = await parked(book)
            assert info["parked"]["vram_bytes"] > 0
            processes, used = await here.on(device)
            assert processes == 0
            assert used <= before[1] + SLACK_BYTES
            assert await book.run("train(3); print(state())") == expected


@needs_gpu
async def test_two_kernels_share_one_gpu_by_turns(places: Places, tmp_path: Path) -> None:
    """Each finds what it has there as it was; while one works the other one is parked."""
    async with machine(places, tmp_path, park_after=3600, gpu_yield_after=0.5) as here:
        device = (await here.whole())[0]
        async with here.notebook(device.uuid) as first, contextlib.AsyncExitStack() as stack:
            await first.run("import torch; x = torch.arange(10**7, device='cuda')")
            second = await stack.enter_async_context(here.notebook(device.uuid))
            await second.run("import torch; x = torch.ones(10**7, device='cuda', dtype=torch.int64)")
            for turn in range(3):
                assert await first.run("x += 1; print((x - torch.arange(10**7, device='cuda')).unique().tolist())") == (
                    f"[{turn + 1}]"
                )
                assert await second.run("x += 1; print(x.unique().tolist())") == f"[{turn + 2}]"
            assert (await here.on(device))[0] == 1


@needs_gpu
async def test_a_restart_gives_all_memory_back(places: Places, tmp_path: Path) -> None:
    """Of a kernel that works with CUDA, and of one that is parked, which gets a GPU again."""
    async with machine(places, tmp_path) as here:
        device = (await here.whole())[0]
        _, before = await here.on(device)
        async with here.notebook(device.uuid) as book:
            for park in (False, True):
                await book.run("import torch; x = torch.ones(2**28, device='cuda')")
                if park:
                    await parked(book)
                await here.client.post("/kernels", book.body, timeout=120)
                processes, used = await here.on(device)
                assert processes == 0
                assert used <= before + SLACK_BYTES
                assert await book.run("import torch; print(float(torch.ones(3, device='cuda').sum()))") == "3.0"


@needs_gpu
async def test_what_cannot_be_parked_is_refused_and_runs_on(places: Places, tmp_path: Path) -> None:
    """A MIG instance, where there is one; managed memory, which a driver may learn to park, loses nothing."""
    async with machine(places, tmp_path) as here:
        for device in await here.inventory.devices():
            if device.mig:
                async with here.notebook(device.uuid) as book:
                    await book.run("import torch; x = torch.ones(3, device='cuda')")
                    with pytest.raises(UnsupportedOperationError, match="MIG instance"):
                        await parked(book)
                    assert await book.run("print(float(x.sum()))") == "3.0"
    managed = (
        "import ctypes; cuda = ctypes.CDLL('libcuda.so.1'); import torch; torch.ones(1, device='cuda')\n"
        "p = ctypes.c_uint64(); assert cuda.cuMemAllocManaged(ctypes.byref(p), ctypes.c_size_t(2**20), 1) == 0\n"
        "ctypes.memset(p.value, 7, 2**20)"
    )
    async with machine(places, tmp_path) as here, here.notebook((await here.whole())[0].uuid) as book:
        await book.run(managed)
        with contextlib.suppress(UnsupportedOperationError):
            await parked(book)
        assert await book.run("print(ctypes.string_at(p.value, 2**20) == bytes([7]) * 2**20)") == "True"
        assert await book.run("print(float(torch.ones(3, device='cuda').sum()))") == "3.0"


MANAGED = (
    "import ctypes; cuda = ctypes.CDLL('libcuda.so.1'); import torch; torch.ones(1, device='cuda')\n"
    "p = ctypes.c_uint64(); assert cuda.cuMemAllocManaged(ctypes.byref(p), ctypes.c_size_t(2**20), 1) == 0"
)


@needs_gpu
async def test_torch_moves_what_the_driver_cannot(places: Places, tmp_path: Path) -> None:
    """On each MIG instance, and beside managed memory: what stays is told, another kernel has the device meanwhile, and
    training goes on bit by bit. Where the driver has learnt to park managed memory it does so.
    """
    async with machine(places, tmp_path, park_with_torch=True, gpu_wait=0) as here:
        for device in [each for each in await here.inventory.devices() if each.mig] or [(await here.whole())[0]]:
            async with here.notebook(device.uuid) as straight:
                expected = await trained(straight)
            async with here.notebook(device.uuid) as book:
                assert await book.run(MANAGED) == ""
                assert await book.run(TRAINING) == ""
                assert await book.run("train(3); big = torch.ones(2**28, device='cuda'); view = big[::2]") == ""
                told = (await parked(book))["parked"]
                assert told["vram_bytes"] > 2**30
                if told["by"] == "driver":
                    assert not device.mig
                else:
                    assert (await here.on(device))[0] == 1
                    assert 0 < told["stays_bytes"] < 2**30
                async with here.notebook(device.uuid) as other:
                    assert await other.run("import torch; print(float(torch.ones(3, device='cuda').sum()))") == "3.0"
                assert await book.run("train(3); print(state())") == expected
                assert await book.run("view += 1; print(int(big.sum(dtype=torch.float64)))") == str(3 * 2**27)


@needs_gpu
def test_torch_lets_go_of_all_that_it_has_allocated() -> None:
    """In this process, as a kernel does it: nothing is left in torch's allocator, also of tied and sparse tensors; a
    CUDA graph, or another stream's memory, is not touched.
    """
    done = subprocess.run([sys.executable, "-c", OFFLOADING], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


OFFLOADING = """
import queue, threading, torch
from warmcell.sandbox.guest.kernel.offloading import Offload
from warmcell.sandbox.guest.kernel.refused import UnsupportedOperationError
class Loop(threading.Thread):
    __module__ = "ipykernel.tests"
    work = queue.SimpleQueue()
    add_callback = work.put
    def run(self):
        while True: self.work.get()()
loop = Loop(daemon=True); loop.start()
offload = Offload(loop)
big = torch.ones(2**26, device="cuda"); view = big[1::3]
sparse = torch.eye(512, device="cuda").to_sparse()
layer = torch.nn.Linear(512, 512, device="cuda"); layer(torch.ones(2, 512, device="cuda")).sum().backward()
total = float(big.sum())
moved = offload.take("cuda")
assert moved >= big.nbytes + sparse._values().nbytes + 2 * layer.weight.nbytes, moved
assert torch.cuda.memory_allocated() == 0, torch.cuda.memory_summary()
offload.bring_back()
assert float(big.sum()) == total and int(sparse.to_dense().sum()) == 512
view.add_(1); assert float(big.sum()) == total + view.numel()
side = torch.cuda.Stream()
with torch.cuda.stream(side): other = torch.ones(2**24, device="cuda")
torch.cuda.synchronize()
at = other.data_ptr()
offload.take("cuda"); assert other.data_ptr() == at; offload.bring_back()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph): result = big * 2
try: offload.take("cuda")
except UnsupportedOperationError as error: assert "CUDA graphs" in str(error), error
else: raise AssertionError("it was moved")
graph.replay(); torch.cuda.synchronize()
"""


@needs_gpu
async def test_torch_keeps_to_its_share(places: Places, tmp_path: Path) -> None:
    """A kernel with a half of a GPU gets no more than that of its memory."""
    async with machine(places, tmp_path, gpu_shares=2) as here:
        device = (await here.whole())[0]
        async with here.notebook(f"{device.uuid}/2") as book:
            said = await book.run(f"import torch\nx = torch.empty({device.memory_total_bytes * 6 // 10}, "
                                  "dtype=torch.uint8, device='cuda')")  # fmt: skip
            assert "OutOfMemoryError" in said
            assert await book.run("x = torch.ones(2**20, device='cuda'); print(int(x.sum()))") == str(2**20)


@needs_gpu
async def test_it_moves_to_another_gpu_of_its_kind(places: Places, tmp_path: Path) -> None:
    """With what it has there; from driver 580 on, and where there is another one."""
    async with machine(places, tmp_path) as here:
        first = (await here.whole())[0]
        others = [each for each in await here.whole() if each.name == first.name and each != first]
        if not others:
            pytest.skip("one GPU of this kind only")
        async with here.notebook(first.uuid) as book:
            await book.run("import torch; x = torch.arange(10**7, device='cuda')")
            await book.until_idle()
            await book.do("gpu", gpu=others[0].uuid)
            assert (await here.on(first))[0] == 0
            assert await book.run("print(int(x.sum()))") == str(sum(range(10**7)))


@needs_gpu
@pytest.mark.skipif(gpu.BACKEND != "bubblewrap", reason="WARMCELL_CUDA_BACKEND is not bubblewrap")
async def test_it_is_forked_and_suspended_with_what_it_has_there(places: Places, tmp_path: Path) -> None:
    """A clone on the other half of the GPU has its own copy; suspended, both processes and memory are gone."""
    if missing := absence("criu"):
        pytest.skip(missing.why)
    async with machine(places, tmp_path, gpu_shares=2) as here:
        device = (await here.whole())[0]
        async with here.notebook(f"{device.uuid}/2") as book:
            await book.run("import torch; x = torch.ones(10**6, device='cuda')")
            async with notebooks.clones(book, 1) as (clone,):
                assert await clone.run("x += 1; print(int(x.sum()))") == str(2 * 10**6)
                assert await book.run("print(int(x.sum()))") == str(10**6)
            await parked(book)
            await book.do("suspend")
            assert (await here.on(device))[0] == 0
            assert await book.run("x += 2; print(int(x.sum()))") == str(3 * 10**6)


BARE = """
import sys, time
from cuda.bindings import driver
from cuda.core import checkpoint
driver.cuInit(0)
process = checkpoint.Process(int(sys.argv[1]))
for _ in range(3):
    at = time.perf_counter()
    process.lock(10000); process.checkpoint()
    parked = time.perf_counter() - at
    at = time.perf_counter()
    process.restore(); process.unlock()
    print(parked + time.perf_counter() - at, flush=True)
"""


@needs_gpu
@pytest.mark.alone
async def test_parking_costs_what_the_driver_takes(places: Places, tmp_path: Path) -> None:
    """P10: 16 GB of VRAM to the host and back, at most 1.05 times the bare driver calls on the same process."""
    async with machine(places, tmp_path) as here:
        device = (await here.whole())[0]
        size = min(16 * GIB, device.memory_total_bytes * 6 // 10)
        async with here.notebook(device.uuid) as book:
            await book.run(f"import os, torch; x = torch.empty({size}, dtype=torch.uint8, device='cuda').random_()")
            pinned = await book.run(
                "host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True); torch.cuda.synchronize()\n"
                "import time; at = time.perf_counter(); host.copy_(x[:2**30]); torch.cuda.synchronize()\n"
                "print(1 / (time.perf_counter() - at)); del host"
            )
            pid = (await here.inventory.processes(device))[0].pid
            await book.until_idle()
            bare = subprocess.run(
                [sys.executable, "-c", BARE, str(pid)], capture_output=True, text=True, timeout=500, check=True
            )
            driver = min(float(line) for line in bare.stdout.splitlines())
            took = []
            for _ in range(3):
                await book.until_idle()
                at = time.perf_counter()
                await book.do("park")
                await book.do("resume")
                took.append(time.perf_counter() - at)
            ratio, speed = min(took) / driver, 2 * size / GIB / min(took)
            sys.stdout.write(
                f"P10: {size / GIB:.1f} GiB parked and back in {min(took):.2f} s, bare driver calls {driver:.2f} s: "
                f"{ratio:.3f}x; {speed:.1f} GiB/s, a pinned copy {float(pinned):.1f} GiB/s\n"
            )
            assert ratio <= 1.05
