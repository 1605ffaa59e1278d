"""What the real `cuda.core.checkpoint` makes of what the parker asks, above a driver of the tests' own.

On machines with a C compiler and no GPU: names, arguments and errors fit before the one run that has one.
"""

import importlib.util
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.unit.sandbox.gpus.made_cuda import COMPILER, MadeCuda, driver_library
from warmcell.sandbox.errors import UnsupportedOperationError
from warmcell.sandbox.gpus.cuda_parking import CudaParking

MISSING = [
    *([] if COMPILER else ["cc"]),
    *([] if importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.core") else ["cuda-core"]),
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}")


@pytest.fixture
def cuda(tmp_path: Path) -> Iterator[MadeCuda]:
    """Processes that have a driver loaded, whose states both drivers of the tests keep in the same files."""
    made = MadeCuda(tmp_path)
    yield made
    made.close()


@pytest.fixture
async def engine(cuda: MadeCuda, tmp_path: Path) -> AsyncIterator[CudaParking]:
    """Above the one in C, which is found as the machine's own would be."""
    library = driver_library(tmp_path / "lib")
    own = {"MADE_CUDA": str(cuda.states), "LD_LIBRARY_PATH": str(library.parent)}
    made = CudaParking(cuda, environment={**os.environ, **own})
    yield made
    await made.close()


def asked(cuda: MadeCuda) -> list[str]:
    """Of the driver, in order."""
    return (cuda.states / "log").read_text().splitlines()


async def test_it_is_parked_and_goes_on_where_it_was_and_elsewhere(cuda: MadeCuda, engine: CudaParking) -> None:
    """Locked for a bounded time, then emptied; moved with both places of each device, as bytes of their UUIDs."""
    pid, (first, second) = cuda.process(), cuda.all
    await engine.check([first], [pid])
    parked = await engine.park([first], [os.getpid(), pid])
    assert (parked.bound, cuda.state(pid)) == (True, "checkpointed")
    await engine.unpark(parked, [first], [os.getpid(), pid])
    assert cuda.state(pid) == "running"
    assert asked(cuda) == ["lock within 10000 ms", "checkpoint", "restore", "unlock"]
    (cuda.states / "log").unlink()
    parked = await engine.park([first], [pid])
    await engine.unpark(parked, [second], [pid])
    a, b, divided = (uuid.removeprefix("GPU-").replace("-", "") for uuid in await cuda.board_uuids())
    assert asked(cuda) == ["lock within 10000 ms", "checkpoint", a + b, b + a, divided * 2, "restore", "unlock"]
    assert cuda.state(pid) == "running"


async def test_what_the_driver_does_not_support_runs_on(cuda: MadeCuda, engine: CudaParking) -> None:
    """As of managed memory: the words are the library's, the cure is ours."""
    pid = cuda.process()
    (cuda.states / f"{pid}.managed").touch()
    with pytest.raises(UnsupportedOperationError, match=f"cannot checkpoint process {pid}: .*not supported") as caught:
        await engine.park([cuda.all[0]], [pid])
    assert "Managed memory" in caught.value.hint
    assert cuda.state(pid) == "running"


async def test_one_that_the_driver_does_not_know_is_let_be(cuda: MadeCuda, engine: CudaParking) -> None:
    """It has the library loaded and has not begun to use it."""
    known, unknown = cuda.process(), cuda.process()
    (cuda.states / str(unknown)).write_text("nothing")
    cuda._children, children = cuda._children[:1], cuda._children
    parked = await engine.park([cuda.all[0]], [known, unknown])
    await engine.unpark(parked, [cuda.all[0]], [known, unknown])
    cuda._children = children
    assert (cuda.state(known), cuda.state(unknown)) == ("running", "nothing")
