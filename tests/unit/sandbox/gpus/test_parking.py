"""Parking: the real parker, above a driver of the tests' own, and the rules of what can be parked."""

import dataclasses
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.unit.sandbox.gpus.made_cuda import MadeCuda
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    CapacityError,
    SnapshotError,
    UnsupportedOperationError,
)
from warmcell.sandbox.gpus.cuda_parking import CudaParking
from warmcell.sandbox.gpus.parking import SimulatedParking
from warmcell.sandbox.gpus.requests import parse
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.models import GIB, Parked


@pytest.fixture
def cuda(tmp_path: Path) -> Iterator[MadeCuda]:
    made = MadeCuda(tmp_path)
    yield made
    made.close()


@pytest.fixture
async def engine(cuda: MadeCuda) -> AsyncIterator[CudaParking]:
    made = CudaParking(cuda, environment=cuda.environment)
    yield made
    await made.close()


async def test_all_processes_of_a_kernel_are_parked_and_go_on(cuda: MadeCuda, engine: CudaParking) -> None:
    """All are locked before one is emptied, and all are back before one may go on; those without CUDA are let be."""
    device = cuda.all[0]
    pids = [cuda.process(), cuda.process()]
    await engine.check([device], pids)
    parked = await engine.park([device], [os.getpid(), *pids])
    assert (parked.vram_bytes, parked.bound, parked.gpus) == (6 * GIB, True, (device,))
    assert [cuda.state(pid) for pid in pids] == ["checkpointed"] * 2
    await engine.unpark(parked, [device], [os.getpid(), *pids])
    assert [cuda.state(pid) for pid in pids] == ["running"] * 2
    assert cuda.log == ["lock", "lock", "checkpoint", "checkpoint", "restore", "restore", "unlock", "unlock"]
    assert (cuda.states / "mapping").read_text() == "None"


async def test_a_kernel_that_has_used_no_gpu_is_bound_to_none(cuda: MadeCuda, engine: CudaParking) -> None:
    """It may go on on any, and the driver is not asked."""
    parked = await engine.park([cuda.all[0]], [os.getpid()])
    assert (parked.vram_bytes, parked.bound) == (0, False)
    other = dataclasses.replace(cuda.all[1], name="T4")
    await engine.unpark(parked, [other], [os.getpid()])
    assert not (cuda.states / "log").exists()


async def test_moved_it_has_a_place_for_each_device_of_the_machine(cuda: MadeCuda, engine: CudaParking) -> None:
    """The driver wants them all, divided ones too; the two that change places, change them. Another kind is refused."""
    pid = cuda.process()
    parked = await engine.park([cuda.all[0]], [pid])
    assert parse(engine.comes_back_on(parked)).alternatives[0].matches(cuda.all[1])
    with pytest.raises(UnsupportedOperationError, match="cannot go on on T4"):
        await engine.unpark(parked, [dataclasses.replace(cuda.all[1], name="T4")], [pid])
    await engine.unpark(parked, [cuda.all[1]], [pid])
    first, second, divided = (uuid.removeprefix("GPU-") for uuid in await cuda.board_uuids())
    assert (cuda.states / "mapping").read_text() == repr({first: second, second: first, divided: divided})


async def test_before_580_it_comes_back_where_it_was(tmp_path: Path) -> None:
    """The request names the one device, which is in the grammar of requests; another one is refused."""
    made = MadeCuda(tmp_path, driver_version="575.57.08")
    engine = CudaParking(made)
    with pytest.raises(UnsupportedOperationError, match="cannot move"):
        await engine.unpark(Parked(gpus=(made.all[0],), since=0.0), [made.all[1]], [])
    for parts in (1, 2):
        device = dataclasses.replace(made.all[0], parts=parts)
        request = parse(engine.comes_back_on(Parked(gpus=(device,), since=0.0)))
        assert [request.alternatives[0].matches(each) for each in made.all] == [True, False]
        assert request.alternatives[0].parts == parts


@pytest.mark.parametrize("step", ["lock", "checkpoint"])
async def test_what_the_driver_refuses_runs_on(cuda: MadeCuda, engine: CudaParking, step: str) -> None:
    """The error says which step, and what cannot be parked; both processes are as they were."""
    pids = [cuda.process(), cuda.process()]
    cuda.fail(f"{step} {pids[1]}")
    with pytest.raises(UnsupportedOperationError, match=f"cannot {step} process {pids[1]}") as caught:
        await engine.park([cuda.all[0]], pids)
    assert "CUDA IPC" in caught.value.hint
    assert [cuda.state(pid) for pid in pids] == ["running"] * 2


async def test_what_cannot_come_back_stays_parked(cuda: MadeCuda, engine: CudaParking) -> None:
    """Also the one that was back already; later it works."""
    pids = [cuda.process(), cuda.process()]
    parked = await engine.park([cuda.all[0]], pids)
    cuda.fail(f"restore {pids[1]}")
    with pytest.raises(UnsupportedOperationError, match="cannot restore"):
        await engine.unpark(parked, [cuda.all[0]], pids)
    assert [cuda.state(pid) for pid in pids] == ["checkpointed"] * 2
    await engine.unpark(parked, [cuda.all[0]], pids)
    assert [cuda.state(pid) for pid in pids] == ["running"] * 2


async def test_what_is_lost_is_said_to_be(cuda: MadeCuda, engine: CudaParking) -> None:
    """One that neither comes back nor can be parked again, and one of which nothing is there any more. What has come
    back when nobody waited for it is not lost.
    """
    pids = [cuda.process(), cuda.process()]
    parked = await engine.park([cuda.all[0]], pids)
    cuda.fail(f"restore {pids[1]}")
    (cuda.states / str(pids[1])).unlink()
    (cuda.states / str(pids[1])).write_text("failed")
    await engine.unpark(parked, [cuda.all[0]], pids)
    await engine.unpark(parked, [cuda.all[0]], pids)
    (cuda.states / str(pids[0])).write_text("failed")
    with pytest.raises(SnapshotError, match="is parked any more"):
        await engine.unpark(parked, [cuda.all[0]], pids)


async def test_no_room_on_the_device_is_found_before_anything_is_done(cuda: MadeCuda, engine: CudaParking) -> None:
    """Somebody else has taken the memory: the kernel stays parked, and the driver is not asked."""
    pid = cuda.process()
    parked = await engine.park([cuda.all[0]], [pid])
    cuda.all = (dataclasses.replace(cuda.all[0], memory_used_bytes=78 * GIB), cuda.all[1])
    with pytest.raises(CapacityError, match=r"2\.0 GiB free"):
        await engine.unpark(parked, [cuda.all[0]], [pid])
    assert cuda.state(pid) == "checkpointed"
    assert "restore" not in cuda.log


async def test_room_that_was_made_just_now_is_seen(cuda: MadeCuda, engine: CudaParking) -> None:
    """By somebody who was parked for this one, or by itself: what the list of devices says may be a second old, and
    the driver may need a moment.
    """
    pid = cuda.process()
    parked = await engine.park([cuda.all[0]], [pid])
    cuda.all = (dataclasses.replace(cuda.all[0], memory_used_bytes=78 * GIB), cuda.all[1])
    cuda.free = [2 * GIB, 80 * GIB]
    await engine.unpark(parked, [cuda.all[0]], [pid])
    assert (cuda.state(pid), cuda.free) == ("running", [])


async def test_a_parker_that_dies_is_replaced(cuda: MadeCuda, engine: CudaParking) -> None:
    """Whoever waits for it is told; a new one undoes what it had begun, and can park."""
    pid = cuda.process()
    cuda.fail("die at checkpoint")
    with pytest.raises(BackendUnavailableError, match="exit code 3"):
        await engine.park([cuda.all[0]], [pid])
    assert cuda.state(pid) == "running"
    (cuda.states / "faults").unlink()
    parked = await engine.park([cuda.all[0]], [pid])
    await engine.unpark(parked, [cuda.all[0]], [pid])
    assert cuda.state(pid) == "running"


async def test_a_process_that_stays_on_the_device_keeps_it(cuda: MadeCuda, engine: CudaParking) -> None:
    """The driver was not allowed to look into it, so it answers as for one without CUDA; the lease must stay."""
    pid = cuda.process()
    (cuda.states / str(pid)).rename(cuda.states / "hidden")
    cuda.commands[pid] = "python"
    cuda._children, children = [], cuda._children
    with pytest.raises(UnsupportedOperationError, match=f"does not take process {pid}"):
        await engine.park([cuda.all[0]], [pid])
    cuda._children = children


async def test_what_the_driver_cannot_do_is_refused_before_anything_is_done(
    cuda: MadeCuda, engine: CudaParking
) -> None:
    """MIG, several GPUs, an old driver and an MPS server, each with its cure."""
    device, pid = cuda.all[0], cuda.process()
    await CudaParking(cuda, command=[]).check([dataclasses.replace(device, mig=True)], [os.getpid()])
    for devices, words, cure in (
        ([dataclasses.replace(device, mig=True)], "MIG instance", "whole GPU"),
        (list(cuda.all), "2 GPUs", "one GPU"),
        ([dataclasses.replace(device, driver_version="570.158.01")], "570.158.01", "575.57.08"),
        ([dataclasses.replace(device, driver_version=None)], "unknown version", "575.57.08"),
    ):
        with pytest.raises(UnsupportedOperationError, match=words) as caught:
            await engine.check(devices, [pid])
        assert cure in caught.value.hint
    cuda.commands[1] = "nvidia-cuda-mps-server"
    with pytest.raises(UnsupportedOperationError, match="MPS server") as caught:
        await engine.check([device], [cuda.process()])
    assert "nvidia-cuda-mps-control" in caught.value.hint


async def test_a_machine_that_lacks_the_driver_or_its_package_says_so(cuda: MadeCuda) -> None:
    """And which package, or which driver, is the cure."""
    without = CudaParking(cuda, environment={**cuda.environment, "PYTHONPATH": ""})
    with pytest.raises(UnsupportedOperationError) as caught:
        await without.check([cuda.all[0]], [cuda.process()])
    assert "warmcell[nvidia]" in caught.value.hint or "575.57.08" in caught.value.hint
    silent = CudaParking(cuda, command=[sys.executable, "-c", "pass"])
    with pytest.raises(BackendUnavailableError, match="does not come up"):
        await silent.check([cuda.all[0]], [cuda.process()])
    (Path(cuda.environment["PYTHONPATH"]) / "cuda/bindings/driver.py").write_text(
        "import enum\nclass CUresult(enum.Enum):\n    CUDA_SUCCESS = 0\n    CUDA_ERROR_NO_DEVICE = 100\n"
        "def cuInit(flags): return (CUresult.CUDA_ERROR_NO_DEVICE,)\n"
    )
    with pytest.raises(UnsupportedOperationError, match="CUDA_ERROR_NO_DEVICE"):
        await CudaParking(cuda, environment=cuda.environment).check([cuda.all[0]], [cuda.process()])


async def test_made_up_devices_are_parked_by_their_configured_amount() -> None:
    """They come back on any of their kind, and on no other."""
    kinds = [{"name": "A100", "memory": "80GiB", "count": 2, "used": "10GiB"}, {"name": "T4", "memory": "16GiB"}]
    first, second, other = await SimulatedInventory(kinds).devices()
    engine = SimulatedParking()
    parked = await engine.park([first], [])
    assert parked.vram_bytes == 10 * GIB
    assert [parse(engine.comes_back_on(parked)).alternatives[0].matches(each) for each in (first, second, other)] == [
        True,
        True,
        False,
    ]
    await engine.unpark(parked, [second], [])
    with pytest.raises(UnsupportedOperationError, match="cannot go on on T4"):
        await engine.unpark(parked, [other], [])
