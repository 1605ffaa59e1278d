"""What torch has on a device goes to the host's memory and comes back: here on the CPU, by the same steps."""

import asyncio
import contextlib
import hashlib
import io
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.lib.backgroundjobs import BackgroundJobManager
from traitlets.config import Config

from warmcell.sandbox.guest.kernel import offloading
from warmcell.sandbox.guest.kernel.offloading import Kept, Offload
from warmcell.sandbox.guest.kernel.refused import CapacityError, ConflictError, UnsupportedOperationError

Result = TypeVar("Result")


class Loop(threading.Thread):
    """Stands for the thread in which cells run."""

    __module__ = "ipykernel.tests"

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def add_callback(self, what: Callable[[], None] | None) -> None:
        self._work.put(what)

    def run(self) -> None:
        while (what := self._work.get()) is not None:
            what()


@pytest.fixture(autouse=True)
def of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plugins have threads."""
    monkeypatch.setattr(offloading, "HARMLESS", (*offloading.HARMLESS, "pytest_rerunfailures", "xdist", "execnet"))


def away(look: Callable[[Offload, int], Result]) -> Result:
    """What `look` finds while everything is away."""
    loop = Loop()
    loop.start()
    offload = Offload(loop)
    try:
        moved = offload.take("cpu")
        try:
            return look(offload, moved)
        finally:
            offload.bring_back()
    finally:
        loop.add_callback(None)
        loop.join(10)
        assert not loop.is_alive(), "it is held for ever"


class Training:
    """A model with tied weights, its optimizer, and views of what they have."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        self.model[2].weight = self.model[0].weight
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.turned = self.model[0].weight.detach().t()[3:9, ::2]

    def step(self, count: int) -> None:
        for _ in range(count):
            x = torch.randn(32, 64)
            self.optimizer.zero_grad()
            (self.model(x) - x).square().mean().backward()
            self.optimizer.step()

    def tensors(self) -> list[torch.Tensor]:
        states = [value for each in self.optimizer.state.values() for value in each.values()]
        grads = [each.grad for each in self.model.parameters() if each.grad is not None]
        return [*(each.detach() for each in self.model.parameters()), *states, *grads, self.turned]

    def digest(self) -> str:
        parts = [each.contiguous().numpy().tobytes() for each in [*self.tensors(), torch.get_rng_state()]]
        return hashlib.sha256(b"".join(parts)).hexdigest()


def test_training_goes_on_bit_equal() -> None:
    """Six steps are six steps, with all of it away after three; what is a view of what stays so."""
    straight = Training()
    straight.step(6)
    expected = straight.digest()
    here = Training()
    here.step(3)
    tensors = here.tensors()
    moved, sizes = away(lambda offload, moved: (moved, {each.untyped_storage().nbytes() for each in tensors}))
    assert sizes == {0}
    assert moved >= sum(each.nbytes for each in tensors[:2])
    here.step(3)
    assert here.digest() == expected
    assert here.model[2].weight is here.model[0].weight
    assert torch.equal(here.turned, here.model[0].weight.detach().t()[3:9, ::2])


def test_tensors_graphs_and_strides_are_what_they_were() -> None:
    """A loss that has not gone backward yet, expanded, sparse and complex ones, and an empty one."""
    torch.manual_seed(1)
    leaf = torch.randn(100, requires_grad=True)
    loss = (leaf * leaf).sin().sum()
    wide = torch.arange(6.0).view(3, 2).t().expand(4, 2, 3)
    sparse = torch.eye(5).to_sparse()
    others = [torch.empty(0), torch.randn(4, dtype=torch.complex64).conj(), torch.ones(3, dtype=torch.bool)]
    parameter = torch.nn.Parameter(torch.ones(2))
    wanted = [wide.clone(), sparse.to_dense(), *(each.clone() for each in others)]
    known = [id(leaf), wide.stride(), leaf._version]
    away(lambda offload, moved: None)
    assert [id(leaf), wide.stride(), leaf._version] == known
    assert all(torch.equal(a, b) for a, b in zip([wide, sparse.to_dense(), *others], wanted, strict=True))
    loss.backward()
    grad, value = leaf.grad, leaf.detach()
    assert grad is not None
    assert torch.equal(grad, 2 * value * (value * value).cos())
    assert isinstance(parameter, torch.nn.Parameter)
    assert parameter.requires_grad


def test_memory_that_others_have_an_address_of_stays() -> None:
    """numpy's, and what is shared with other processes, is where it was all the while."""
    array = torch.arange(1000.0).numpy()
    borrowed = torch.from_numpy(array)
    shared = torch.ones(10).share_memory_()
    sizes = away(lambda offload, moved: [each.untyped_storage().nbytes() for each in (borrowed, shared)])
    assert sizes == [4000, 40]
    assert array[999] == 999.0


@pytest.fixture
def shell() -> Iterator[Any]:
    """IPython's, without a history."""
    config = Config()
    config.HistoryManager.enabled = False
    yield InteractiveShell.instance(config=config)
    InteractiveShell.clear_instance()


def test_what_bash_cells_leave_running_is_in_nobodys_way(shell: Any) -> None:
    """IPython keeps a loop for them in a thread, for good; another loop in a thread may be the notebook's."""
    tensor = torch.ones(3)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            shell.run_cell_magic("bash", "", "true")
        assert any("run_forever" in one.name for one in threading.enumerate())
        assert away(lambda offload, moved: tensor.untyped_storage().nbytes()) == 0
        other = asyncio.new_event_loop()
        thread = threading.Thread(target=other.run_forever, name="its own loop")
        thread.start()
        with pytest.raises(UnsupportedOperationError, match="its own loop"):
            away(lambda offload, moved: None)
        other.call_soon_threadsafe(other.stop)
        thread.join()
        other.close()
    finally:
        scripts = shell.magics_manager.registry["ScriptMagics"].event_loop
        scripts.call_soon_threadsafe(scripts.stop)


def test_what_computes_in_the_background_is_a_thread_of_the_notebooks(shell: Any) -> None:
    """Though its class is IPython's."""
    end = threading.Event()
    job = BackgroundJobManager().new(end.wait)
    with pytest.raises(UnsupportedOperationError, match="runs"):
        away(lambda offload, moved: None)
    end.set()
    job.join()


def test_with_a_thread_of_the_notebooks_nothing_is_moved() -> None:
    """It may want its tensors at any time. A pool's worker without work may not."""
    pool = ThreadPoolExecutor(1)
    pool.submit(lambda: None).result()
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="feeder")
    thread.start()
    tensor = torch.ones(3)
    with pytest.raises(UnsupportedOperationError, match="feeder"):
        away(lambda offload, moved: None)
    end.set()
    thread.join()
    assert away(lambda offload, moved: tensor.untyped_storage().nbytes()) == 0
    pool.shutdown()


class Full:
    """A storage on a device that has no room for it any more."""

    full = True

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def resize_(self, size: int) -> None:
        if size and self.full:
            raise RuntimeError("CUDA out of memory. Tried to allocate 400 bytes\nand more")
        self._storage.resize_(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def test_without_room_it_is_kept_until_there_is_some() -> None:
    """What had come back before goes away again; the next try has all of it."""
    tensors = [torch.full((100,), float(n)) for n in range(3)]

    def look(offload: Offload, moved: int) -> list[int]:
        whole = list(offload._kept)
        offload._kept[-1] = Kept(Full(whole[-1].storage), whole[-1].content)
        with pytest.raises(CapacityError, match=r"out of memory\. Tried to allocate 400 bytes$"):
            offload.bring_back()
        sizes = [each.untyped_storage().nbytes() for each in tensors]
        offload._kept = whole
        return sizes

    assert away(look) == [0, 0, 0]
    assert [each.sum().item() for each in tensors] == [0.0, 100.0, 200.0]


def test_what_can_neither_be_let_go_of_nor_come_back_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step fails, and others have the room by then: it is as if nothing had failed, and comes back later."""
    tensor = torch.arange(100.0)
    wrapped: list[Full] = []
    storages, fails = offloading._storages, [RuntimeError("CUDA error: unspecified")]

    def found(torch: Any, kind: str) -> list[Any]:
        wrapped.extend(map(Full, storages(torch, kind)))
        return wrapped

    def give_back(torch: Any, kind: str) -> None:
        raise fails[0]

    monkeypatch.setattr(offloading, "_storages", found)
    monkeypatch.setattr(offloading, "_give_back", give_back)
    monkeypatch.setattr(offloading, "_bytes", lambda torch, one: _whole(one))

    def look(offload: Offload, moved: int) -> tuple[int, int]:
        with pytest.raises(CapacityError):
            offload.bring_back()
        monkeypatch.setattr(Full, "full", False)
        return moved, tensor.untyped_storage().nbytes()

    moved, size = away(look)
    assert (moved >= 400, size) == (True, 0)
    assert torch.equal(tensor, torch.arange(100.0))


def _whole(storage: Any) -> torch.Tensor:
    real = getattr(storage, "_storage", storage)
    return torch.empty(0, dtype=torch.uint8).set_(real)


def test_a_main_thread_that_works_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is moved, and it is not held later either."""
    monkeypatch.setattr(offloading, "HELD_TIMEOUT_S", 0.05)
    waiting: list[Callable[[], None]] = []

    class Busy:
        def add_callback(self, what: Callable[[], None]) -> None:
            waiting.append(what)

    tensor = torch.ones(3)
    with pytest.raises(ConflictError, match="main thread works"):
        Offload(Busy()).take("cpu")
    waiting[0]()
    assert tensor.untyped_storage().nbytes() == 12
