"""What kernels themselves wish in the middle of a cell: snapshots, restores and forks of their memory, other GPUs."""

import asyncio
import logging
import os
import re
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from warmcell.extension.keeper.front import answer, lose_answer
from warmcell.extension.keeper.kernel import Kernel
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.extension.keeper.ranks import Rank, environment, free_port
from warmcell.sandbox import errors, guest_files
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.models import SandboxId, SandboxInfo, SnapshotInfo
from warmcell.sandbox.moving import GpuWish
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

RESULT = re.compile(r"result-[0-9a-f]{16}")
RESULT_MAX_BYTES = 64 * 2**20


async def nothing() -> None:
    """There is nothing to be undone."""


class Wishes:
    """Acknowledged at once and done afterwards; a kernel that waits for the outcome looks for it in its directory."""

    def __init__(self, service: SandboxService, kernels: Kernels, memory: KernelMemory) -> None:
        self._service = service
        self._kernels = kernels
        self._memory = memory

    def snapshots_of(self, sandbox_id: SandboxId) -> list[SnapshotInfo]:
        """Those that its kernel may be restored from, the newest first."""
        infos = self._service.memory.store.infos(kernel_id=self._service.info(sandbox_id).kernel_id)
        return [info for info in infos if info.kind == "named"]

    def has_kernel(self, sandbox_id: SandboxId) -> bool:
        """Whether a kernel of it lives."""
        kernel = self._kernels.of(sandbox_id)
        return kernel is not None and kernel.alive

    async def result(self, sandbox_id: SandboxId) -> bytes | None:
        """What a clone has handed over, which only kernels look into; None while it has not.

        Raises:
            ProtocolError: The guest has put something else there.
            CapacityError: It is too large.
        """
        return await asyncio.to_thread(_result, self._service.live(sandbox_id).run_directory)

    def snapshot_from_inside(self, sandbox_id: SandboxId, token: str, name: str) -> None:
        """Save it under a name at the end of its cell, which waits for the answer; so will it when it is restored.

        Raises:
            ConflictError: There is a snapshot of this name.
        """
        if any(info.name == name for info in self.snapshots_of(sandbox_id)):
            raise errors.ConflictError(
                f"This kernel has a snapshot {name!r} already", hint="Use another name, or remove that snapshot first."
            )
        kernel = self._kernel(sandbox_id)

        async def work() -> Mapping[str, Any]:
            kernel.asks = token
            try:
                return {"snapshot": (await self._memory.snapshot(sandbox_id, name=name)).to_json()}
            finally:
                kernel.asks = ""

        self._kernels.spawn(self._answering(kernel, sandbox_id, token, work(), "was not saved"))

    def restore_from_inside(self, sandbox_id: SandboxId, ref: str, *, asked_by: str) -> None:
        """Put it back to a snapshot, and answer the cell that asks in its place.

        Raises:
            SnapshotNotFoundError: There is none of that name.
        """
        kernel = self._kernel(sandbox_id)
        self._service.memory.store.get(ref, kernel_id=kernel.request.kernel_id)

        async def work() -> None:
            kernel.restore_asked_by = asked_by
            try:
                await self._memory.restore(sandbox_id, ref)
            finally:
                kernel.restore_asked_by = ""

        self._kernels.spawn(self._telling(kernel, f"Snapshot {ref!r} was not restored", work()))

    def fork_from_inside(self, sandbox_id: SandboxId, token: str, count: int, *, ranks: bool = False) -> None:
        """Fork it in the middle of its cell, and leave the answers where original and clones look for them.

        Args:
            sandbox_id: Which.
            token: Of the answers.
            count: How many clones.
            ranks: They are the ranks of that cell, and end with it.

        Raises:
            UnsupportedOperationError: They would need GPUs, which nobody has asked for.
        """
        source, kernel = self._service.live(sandbox_id), self._kernel(sandbox_id)
        if ranks and source.gpus:
            raise errors.UnsupportedOperationError(
                "This kernel has a GPU, and each clone would need another one",
                hint="Leave out fork: with gpu= each rank has its own, and is sent what it reads.",
            )

        clones: list[SandboxInfo] = []

        async def work() -> Mapping[str, Any]:
            process = kernel.process
            clones.extend(await self._memory.fork(sandbox_id, count))
            if ranks and process is not None:
                self._kernels.spawn(self._end_with(process, clones))
            port = free_port() if source.spec.network == "host" else None
            for rank, info in enumerate(clones):
                box, told = self._service.live(info.id), {"ok": True, "rank": rank}
                env = {"env": environment(box, Rank(rank, count), port=port)} if ranks else {}
                await answer(box, token, {**told, **env})
            return {"rank": None, "clones": [info.id for info in clones]}

        async def undo() -> None:
            gone = [clones.pop() for _ in range(len(clones))]
            ends = await asyncio.gather(
                *(self._kernels.forget_sandbox(info.id) for info in gone), return_exceptions=True
            )
            for end in ends:
                if isinstance(end, BaseException):
                    log.error("a clone is left of a fork that failed", exc_info=end)

        self._kernels.spawn(self._answering(kernel, sandbox_id, token, work(), "was not forked", undo=undo))

    def change_gpu_from_inside(self, sandbox_id: SandboxId, token: str, gpu: GpuWish) -> None:
        """Give it other GPUs in the middle of its cell, which waits for the answer; see `KernelMemory.change_gpu`."""
        kernel = self._kernel(sandbox_id)

        async def work() -> Mapping[str, Any]:
            info = await self._memory.change_gpu(sandbox_id, gpu, even_busy=True)
            return {"gpus": [device.to_json() for device in info.gpus]}

        self._kernels.spawn(self._answering(kernel, sandbox_id, token, work(), "keeps its GPU"))

    async def _answering(
        self,
        kernel: Kernel,
        sandbox_id: SandboxId,
        token: str,
        work: Coroutine[Any, Any, Mapping[str, Any]],
        failed: str,
        *,
        undo: Callable[[], Awaitable[None]] = nothing,
    ) -> None:
        """Do what a cell has wished, and leave the outcome where it waits for it, whatever that is.

        Args:
            kernel: Whose cell it is.
            sandbox_id: Where that kernel is.
            token: Of the answer.
            work: Gives what is told of its success.
            failed: What is logged of the sandbox otherwise.
            undo: Nothing of what was done is to stay, as it failed, or the cell cannot know of it.
        """
        try:
            said = {"ok": True, **await work}
        except errors.WarmcellError as error:
            log.warning("sandbox %s %s: %s", sandbox_id, failed, error)
            said = {"ok": False, **error.to_json()}
        except Exception as error:
            log.exception("sandbox %s %s", sandbox_id, failed)
            why = errors.BackendError(
                f"The keeper stumbled: {type(error).__name__}: {error}",
                hint="keeper.log in the state directory says more.",
            )
            said = {"ok": False, **why.to_json()}
        if not said["ok"]:
            await undo()
        try:
            await answer(self._service.live(sandbox_id), token, said)
        except Exception:  # What a guest may do to its own run directory, fill it up for one.
            log.exception("the cell of sandbox %s cannot be answered", sandbox_id)
            await undo()
            try:
                await lose_answer(self._service.live(sandbox_id), token)
            except Exception:
                log.exception("sandbox %s: its cell is interrupted", sandbox_id)
                await self._kernels.signal(kernel.request.kernel_id, signal.SIGINT)

    async def _end_with(self, source: KernelProcess, clones: Sequence[SandboxInfo]) -> None:
        """The ranks of a cell go with its kernel, which removes them itself when the cell has ended."""
        kernels = [self._kernels.of(info.id) for info in clones]
        processes = [kernel.process for kernel in kernels if kernel is not None and kernel.process is not None]

        async def all_gone() -> None:
            for process in processes:
                await process.exited.wait()

        waits = [asyncio.create_task(source.exited.wait()), asyncio.create_task(all_gone())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
        if source.exited.is_set():
            await asyncio.gather(*(self._kernels.remove(one.request.kernel_id) for one in kernels if one is not None))

    async def _telling(self, kernel: Kernel, what: str, work: Coroutine[Any, Any, None]) -> None:
        """Do what a cell has wished; if it fails its notebook is told, for nobody waits for it."""
        try:
            await work
        except errors.WarmcellError as error:
            log.warning("kernel %s: %s: %s", kernel.request.kernel_id, what, error)
            await kernel.proxy.tell(f"{what}: {error}\n")

    def _kernel(self, sandbox_id: SandboxId) -> Kernel:
        kernel = self._kernels.of(sandbox_id)
        if kernel is None:
            raise errors.UnsupportedOperationError("It is no notebook's kernel", hint="Use it in a notebook.")
        return kernel


def _result(run_directory: Path) -> bytes | None:
    for name in sorted(os.listdir(run_directory)):
        if RESULT.fullmatch(name):
            file = guest_files.open_existing(run_directory / name)
            if file is None:
                continue
            with file:
                told = file.read(RESULT_MAX_BYTES + 1)
            if len(told) > RESULT_MAX_BYTES:
                raise errors.CapacityError(
                    f"The clone's result is larger than {RESULT_MAX_BYTES} bytes", hint="Write it to a file instead."
                )
            return told
    return None
