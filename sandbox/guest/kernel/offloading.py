"""What torch has on a device, kept in the host's memory for a while: for GPUs whose memory the driver cannot take out.

The bytes below each tensor are copied and let go of, and come back before anything of the notebook's runs. Tensors,
views, parameters, the state of optimizers and the graph of gradients refer to the same storages all the while, and are
as they were. The device's context, what other libraries have there, and what no tensor of Python's refers to, stays.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from . import gpu_memory
from .refused import CapacityError, ConflictError, UnsupportedOperationError

HELD_TIMEOUT_S = 5.0
"""How long the main thread may take to come to rest. That of an idle kernel is at rest."""

OTHERS = ("cupy", "jaxlib", "tensorflow", "rmm", "pycuda", "numba.cuda.cudadrv.driver")
"""Libraries that may hold addresses of torch's memory, which will be others afterwards."""

HARMLESS = (
    *("ipykernel", "IPython.core", "zmq", "tornado", "debugpy", "_pydevd_bundle", "tqdm", "warmcell", "warmcell_guest"),
    *("asyncio.unix_events", "torch._inductor"),
)
"""Packages whose threads use no tensors by themselves. Not those that run the notebook's code, as `%bg` does."""


class Kept(NamedTuple):
    """One storage, and what is to be in it."""

    storage: Any
    content: Any


class Offload:
    """That of one kernel. Called in the control thread only."""

    def __init__(self, main: Any) -> None:
        """Nothing is kept; `main` is the loop of the thread in which cells run."""
        self._main = main
        self._kept: list[Kept] = []
        self._go_on: threading.Event | None = None

    def check(self, kind: str) -> None:
        """Whether what torch has on devices of this kind can be kept elsewhere; touches nothing.

        Raises:
            UnsupportedOperationError: There is something that addresses its memory and would not learn where it is.
        """
        torch: Any = sys.modules.get("torch")
        if torch is None:
            raise UnsupportedOperationError(
                "What this kernel has on the GPU is not torch's", "Only torch can move it without the driver."
            )
        there = [name for name in OTHERS if name in sys.modules]
        if there and kind == "cuda":
            raise UnsupportedOperationError(f"{there[0]} uses the GPU beside torch", "Restart the kernel without it.")
        if threads := _others():
            raise UnsupportedOperationError(
                f"A thread of the notebook's runs ({threads[0]}), and may want what is on the GPU", "End it first."
            )
        if kind == "cuda" and torch.cuda.is_initialized():
            _check_cuda(torch)

    def take(self, kind: str) -> int:
        """Keep all of it in the host's memory, with the main thread held until `bring_back`; how many bytes.

        A step that fails is undone. Where even that fails, as others have taken the room on the device meanwhile, all
        of it is kept, which is what was asked for.

        Raises:
            ConflictError: The main thread works.
            CapacityError: The host has no room for it. All is as it was.
            UnsupportedOperationError: As `check`.
        """
        if self._go_on is not None:
            raise ConflictError("What torch has on the GPU is kept elsewhere already")
        self._hold()
        try:
            self.check(kind)
            torch: Any = sys.modules["torch"]
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                _settle(torch, kind)
                self._kept = _copied(torch, _storages(torch, kind))
                for one in self._kept:
                    one.storage.resize_(0)
                _give_back(torch, kind)
        except BaseException:
            try:
                self.bring_back()
            except CapacityError:
                return self._kept_bytes()
            raise
        return self._kept_bytes()

    def _kept_bytes(self) -> int:
        return sum(one.content.numel() for one in self._kept)

    def bring_back(self) -> None:
        """Have it where it was, and let the main thread go on. Idempotent.

        Raises:
            CapacityError: The device has no room for it. It is kept, and the main thread held, as before.
        """
        if self._kept:
            torch: Any = sys.modules["torch"]
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                self._restore(torch)
        self._kept = []
        go_on, self._go_on = self._go_on, None
        if go_on is not None:
            go_on.set()

    def _restore(self, torch: Any) -> None:
        kind = self._kept[0].storage.device.type
        try:
            for one in self._kept:
                one.storage.resize_(one.content.numel())
                _bytes(torch, one.storage).copy_(one.content)
            _settle(torch, kind)
        except (RuntimeError, MemoryError) as error:
            for one in self._kept:
                one.storage.resize_(0)
            with contextlib.suppress(RuntimeError):  # What stays torch's own there is not the notebook's.
                _give_back(torch, kind)
            words = str(error).partition("\n")[0]
            raise CapacityError(
                f"What torch had on the GPU does not fit there now: {words}",
                "Free memory on that GPU, then run the cell again. Nothing is lost.",
            ) from error

    def _hold(self) -> None:
        """Have the main thread wait: callbacks and tasks of the notebook's would find tensors without memory."""
        resting, go_on = threading.Event(), threading.Event()

        def rest() -> None:
            resting.set()
            while not go_on.is_set():
                with contextlib.suppress(KeyboardInterrupt):  # What could be interrupted is over.
                    go_on.wait()

        self._main.add_callback(rest)
        if not resting.wait(HELD_TIMEOUT_S):
            go_on.set()
            raise ConflictError("The kernel's main thread works", "Park it when that has ended.")
        self._go_on = go_on


def _check_cuda(torch: Any) -> None:
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError as error:
        raise UnsupportedOperationError(
            f"torch does not allocate the GPU's memory itself: {error}", "Restart the kernel without that allocator."
        ) from error
    if any(tuple(one.get("segment_pool_id", (0, 0))) != (0, 0) for one in segments):
        raise UnsupportedOperationError(
            "It has CUDA graphs or a memory pool of its own, which know addresses on the GPU", "Delete them first."
        )
    if gpu_memory.shares(torch, "cuda"):
        raise UnsupportedOperationError(
            "Tensors are shared with other processes (CUDA IPC)", "End these processes, or delete what is shared."
        )
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        raise UnsupportedOperationError(
            "torch.distributed is in use, and knows addresses on the GPU", "Call destroy_process_group() first."
        )


def _others() -> list[str]:
    """Names of threads of which nobody knows what they will do."""
    frames = sys._current_frames()
    mine = (threading.main_thread(), threading.current_thread())
    return [
        one.name
        for one in threading.enumerate()
        if one not in mine and not _harmless(one) and not _waits_for_work(frames.get(one.ident or 0))
    ]


def _harmless(thread: threading.Thread) -> bool:
    target = getattr(thread, "_target", None)
    scripts = _script_loop()
    if scripts is not None and getattr(target, "__self__", None) is scripts:
        return True
    modules = (type(thread).__module__, getattr(target, "__module__", None) or "")
    return any(f"{module}.".startswith(f"{one}.") for module in modules for one in HARMLESS)


def _script_loop() -> Any:
    """The loop of the thread that `%%bash` and its like leave for good; it only passes on what scripts print."""
    shells: Any = sys.modules.get("IPython.core.interactiveshell")
    if shells is None or not shells.InteractiveShell.initialized():
        return None
    magics = shells.InteractiveShell.instance().magics_manager.registry.get("ScriptMagics")
    return getattr(magics, "event_loop", None)


def _waits_for_work(frame: Any) -> bool:
    """A worker of a pool that only does what the main thread gives it, which is held."""
    code = getattr(frame, "f_code", None)
    return code is not None and code.co_name == "_worker" and code.co_filename.endswith("concurrent/futures/thread.py")


def _storages(torch: Any, kind: str) -> list[Any]:
    """Each storage on such devices once, whatever views it; without those whose memory is not torch's own to move."""
    left = _of_other_streams(torch) if kind == "cuda" and torch.cuda.is_initialized() else ()
    found: dict[int, Any] = {}
    for tensor in _tensors(torch):
        with contextlib.suppress(RuntimeError, NotImplementedError):  # It has no storage, or none with memory.
            if tensor.device.type != kind:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in found or not storage.nbytes() or not storage.resizable():
                continue
            if kind == "cpu" and (storage.is_shared() or storage.is_pinned()):
                continue
            address = storage.data_ptr()
            if address and not any(start <= address < end for start, end in left):
                found[storage._cdata] = storage
    return list(found.values())


def _tensors(torch: Any) -> Iterator[Any]:
    """All that Python knows of, with their gradients and the parts of sparse ones."""
    parts = ("_indices", "_values", "crow_indices", "col_indices", "ccol_indices", "row_indices", "values")
    for one in gc.get_objects():
        if not issubclass(type(one), torch.Tensor):
            continue
        yield one
        with contextlib.suppress(RuntimeError, NotImplementedError):
            if one.is_leaf and one.grad is not None:
                yield one.grad
            if one.layout is torch.strided:
                continue
        for name in parts:
            with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
                yield getattr(one, name)()


def _of_other_streams(torch: Any) -> Sequence[tuple[int, int]]:
    """Memory that was allocated for a stream of the notebook's own: it would come back as another stream's."""
    return [
        (one["address"], one["address"] + one["total_size"]) for one in torch.cuda.memory_snapshot() if one["stream"]
    ]


def _copied(torch: Any, storages: Sequence[Any]) -> list[Kept]:
    try:
        kept = []
        for storage in storages:
            # Not pinned: what is parked may wait for long, and pinned memory can neither be swapped nor moved.
            content = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")
            content.copy_(_bytes(torch, storage))
            kept.append(Kept(storage, content))
    except (RuntimeError, MemoryError) as error:
        raise CapacityError(
            f"The host has no room for what torch has on the GPU: {str(error).partition(chr(10))[0]}",
            "Give the notebook more memory. It keeps its GPU.",
        ) from error
    return kept


def _bytes(torch: Any, storage: Any) -> Any:
    """A view of all of it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _settle(torch: Any, kind: str) -> None:
    """Wait until all that was begun on such devices has ended."""
    if kind == "cuda" and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


def _give_back(torch: Any, kind: str) -> None:
    """What torch holds of such devices and does not use goes back to the driver."""
    if kind == "cuda" and torch.cuda.is_initialized():
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()
