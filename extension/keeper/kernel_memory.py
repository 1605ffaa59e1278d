"""Suspend, resume, snapshot, restore and fork of the keeper's kernels, while their clients stay connected."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from warmcell.extension.keeper.front import Front
from warmcell.extension.keeper.kernel import Kernel, KernelRequest
from warmcell.extension.keeper.kernel_gpus import KernelGpus
from warmcell.extension.keeper.kernels import Kernels
from warmcell.extension.keeper.template_front import TemplateFront, rehearse
from warmcell.kernel_provisioner.transport import socket_prefix
from warmcell.sandbox import errors
from warmcell.sandbox.backends.threads import to_its_end
from warmcell.sandbox.choosing import AGENT
from warmcell.sandbox.coming import Coming
from warmcell.sandbox.kernel import Frontend
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxInfo, SnapshotId, SnapshotInfo
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

CLONE = "fork"
"""Owner of a sandbox that was cloned from another one."""

CLONES_MAX = 64
PAGE_WAIT_S = 5.0
"""A cell that was under way waits so long for its page, which would else miss what it says; then it goes on."""
SUSPENDED_AT_ONCE = 4
"""When the keeper goes: more would only wait for the disk and for each other."""


class KernelMemory(KernelGpus):
    """What can be done with the memory of kernels; of a sandbox without one the service does it alone."""

    def __init__(self, service: SandboxService, kernels: Kernels, paths: Paths) -> None:
        super().__init__(service, kernels)
        self._paths = paths
        kernels.front_of = self.front
        kernels.adopted = self._adopted
        service.template_front = TemplateFront
        service.rehearse = rehearse

    def front(self, kernel: Kernel, box: LiveSandbox) -> Frontend:
        """Who speaks with the kernel's process in this sandbox."""
        return Front(
            kernel,
            box,
            before=self._kernels.sandbox_renewed,
            followed=self._kernels.follow,
            wake=self._on_wake,
            looked_at=functools.partial(self._looked_at, kernel),
            interrupted=self._give_up_waiting,
        )

    async def suspend(self, sandbox_id: SandboxId, *, even_busy: bool = False) -> SandboxInfo:
        """Save it and end its processes; the first cell wakes it.

        Raises:
            ConflictError: It is busy, and that was not asked for.
            WarmcellError: As `SandboxService.suspend`.
        """
        kernel = self._of(sandbox_id)
        if kernel is None:
            return await self._service.suspend(sandbox_id)
        if kernel.waking:
            self._give_up_waiting(self._service.live(sandbox_id))
        async with kernel.lock:
            kernel.goes_on = False
            if kernel.proxy.busy and not even_busy:
                raise errors.ConflictError(
                    "The kernel is busy", hint="Wait until its cell has ended, or suspend it with busy=true."
                )
            if self._service.info(sandbox_id).state is State.SUSPENDED:  # somebody else was faster
                return self._service.info(sandbox_id)
            return await self._service.suspend(sandbox_id)

    async def resume(self, sandbox_id: SandboxId) -> SandboxInfo:
        """Have it go on, if it is suspended or parked; raises as `SandboxService.resume`."""
        kernel = self._of(sandbox_id)
        if kernel is None:
            return await self._service.resume(sandbox_id)
        async with kernel.lock:
            return await self._service.resume(sandbox_id)

    async def populate(self, sandbox_id: SandboxId, ref: str = "") -> None:
        """Begin to read from disk what it maps of a snapshot: of the one that it came from, or of `ref`.

        It runs with or without, so what fails is only logged.
        """
        try:
            box = self._service.live(sandbox_id)
            snapshot = box.info.snapshot
            if ref:
                snapshot = self._service.memory.store.get(ref, kernel_id=box.info.kernel_id).info.id
            if snapshot is not None:
                await (await self._service.memory.check(box.spec)).populate(snapshot)
        except errors.WarmcellError as error:
            log.warning("the memory of sandbox %s is not read in advance: %s", sandbox_id, error.message)

    async def snapshot(self, sandbox_id: SandboxId, *, name: str) -> SnapshotInfo:
        """Save it, when its clients' open cell has ended; raises as `SandboxService.snapshot`."""
        kernel = self._of(sandbox_id)
        if kernel is None:
            return await self._service.snapshot(sandbox_id, name=name)
        async with kernel.lock:
            return await self._service.snapshot(sandbox_id, name=name)

    async def restore(self, sandbox_id: SandboxId, ref: str) -> SandboxInfo:
        """Put it back to a snapshot of it; raises as `SandboxService.restore`."""
        kernel = self._of(sandbox_id)
        if kernel is None:
            return await self._service.restore(sandbox_id, ref)
        async with kernel.lock:
            if self._service.info(sandbox_id).state is not State.SUSPENDED:  # Parked, it has to have its GPUs again.
                await self._service.resume(sandbox_id)
            return await self._service.restore(sandbox_id, ref)

    async def fork(self, sandbox_id: SandboxId, count: int, *, ref: str = "") -> list[SandboxInfo]:
        """Clone it into `count` new sandboxes, each with a kernel of its own; the source goes on.

        Args:
            sandbox_id: What is cloned.
            count: How many clones.
            ref: A snapshot of it: the clones are what it was then. Empty: what it is now.

        Raises:
            InvalidRequestError: That is no number of clones.
            WarmcellError: There is no clone; the source goes on in any case.
        """
        if not 1 <= count <= CLONES_MAX:
            raise errors.InvalidRequestError(f"{count} clones", hint=f"Ask for 1 to {CLONES_MAX}.")
        kernel = self._of(sandbox_id)
        if kernel is None:
            raise errors.UnsupportedOperationError("It has no kernel", hint="Fork a notebook's sandbox.")
        if ref:
            return await self._fork_from(
                kernel, self._service.memory.store.get(ref, kernel_id=kernel.request.kernel_id).info.id, count
            )
        coming = Coming()
        work: list[asyncio.Task[SandboxInfo]] = []
        try:
            async with kernel.lock:
                await self._service.resume(sandbox_id)
                await self.check(sandbox_id)
                # Their sandboxes are made while the memory is still being written.
                work = [asyncio.create_task(self._clone(kernel, coming)) for _ in range(count)]
                saved = await self._service.snapshot(sandbox_id, kind="fork", coming=coming)
        except BaseException:
            made = coming.made  # Given up when it was saved already.
            await to_its_end(self._give_up(work))
            coming.close()
            if made is not None:
                await to_its_end(self._service.memory.store.discard(made))
            raise
        try:
            return await self._all_or_none(work)
        finally:
            coming.close()
            await self._service.memory.store.discard(saved.id)

    async def _fork_from(self, kernel: Kernel, snapshot: SnapshotId, count: int) -> list[SandboxInfo]:
        return await self._all_or_none([asyncio.create_task(self._clone(kernel, snapshot)) for _ in range(count)])

    async def _all_or_none(self, work: Sequence[asyncio.Task[SandboxInfo]]) -> list[SandboxInfo]:
        """The clones; as soon as one fails, or nobody waits for them any more, all go."""
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_EXCEPTION)
            for each in done:
                if not each.cancelled() and (error := each.exception()) is not None:
                    raise error
            return [each.result() for each in work]
        except BaseException:
            await to_its_end(self._give_up(work))
            raise

    async def _give_up(self, work: Sequence[asyncio.Task[SandboxInfo]]) -> None:
        """End these clones, those that are under way and those that are there."""
        for each in work:
            each.cancel()
        done = await asyncio.gather(*work, return_exceptions=True)
        ids = [each.kernel_id for each in done if isinstance(each, SandboxInfo) and each.kernel_id is not None]
        await asyncio.gather(*map(self._kernels.remove, ids))

    async def check(self, sandbox_id: SandboxId) -> None:
        """Whether memory of this sandbox can be saved; raises as `Memory.check_now`."""
        await self._service.memory.check_now(self._service.live(sandbox_id))

    def clone_of(self, sandbox_id: SandboxId) -> Kernel | None:
        """The kernel in this sandbox, if it is a clone that no Jupyter server has."""
        kernel = self._of(sandbox_id)
        if kernel is None or kernel.owned or self._service.info(sandbox_id).owner != CLONE:
            return None
        return kernel

    async def revive(self) -> None:
        """Take up the kernels that were suspended when another keeper went. What is too broken for it is logged."""
        store = self._service.memory.store
        for info in store.infos(kind="fork"):  # It has served; the keeper went before it did.
            await store.discard(info.id)
        await self._keep_outlived({info.kernel_id: info.id for info in store.infos(kind="suspended")})
        revived: list[LiveSandbox] = []
        for info in store.infos(kind="suspended"):
            try:
                revived.append(await self._revive(info.id))
            except Exception as error:  # One of which not everything is as it should be must not cost the others.
                log.error("suspended kernel %s cannot be taken up", info.kernel_id, exc_info=error)
                why = error.message if isinstance(error, errors.WarmcellError) else f"{type(error).__name__}: {error}"
                self._kernels.ledger.lose(info.kernel_id or "", why)
        for box in reversed(revived):  # The one that was suspended last is the likeliest.
            self._service.memory.twins.want(box)

    async def _revive(self, snapshot: SnapshotId) -> LiveSandbox:
        """One of them; whatever fails, its snapshot stays, and nothing else is left."""
        manifest = self._service.memory.store.get(snapshot)
        request = KernelRequest.from_json(manifest.kernel["request"])
        kernel = await self._kernels.add(request)
        box: LiveSandbox | None = None
        try:
            box = self._service.revive(manifest, functools.partial(self.front, kernel))
            kernel.process, kernel.started = box.kernel, True
            if request.terms is not None:
                box.tell(owner=AGENT, terms=dataclasses.replace(request.terms, ends_at=None, frozen=False))
            assert box.kernel is not None
            self._kernels.follow(kernel, box.kernel, box)
            assert box.frontend is not None
            await box.frontend.sleep(manifest.kernel)
            kernel.sandbox_id = box.info.id
            self._kernels.take_up(kernel)
        except BaseException:
            kernel.sandbox_id = None  # Its sandbox goes without its snapshot.
            if box is not None:
                self._service.forget_revived(box.info.id)
            await self._kernels.remove(request.kernel_id)
            raise
        log.info("kernel %s is suspended and can go on", request.kernel_id)
        return box

    async def _keep_outlived(self, suspended: Mapping[str | None, SnapshotId]) -> None:
        """Of kernels that are lost the last state that is left gets a name; that of all others goes."""
        store, ledger = self._service.memory.store, self._kernels.ledger
        for info in store.infos(kind="outlived"):
            try:
                request = store.get(info.id).kernel.get("request")
                of_code = isinstance(request, Mapping) and bool(request.get("terms"))
                if info.kernel_id in suspended:
                    self._kernels.spawn(self._supersede(info, suspended[info.kernel_id]))
                elif not (of_code or ledger.misses(info.kernel_id or "")):
                    await store.discard(info.id)
                else:
                    await self._keep(info)
            except errors.WarmcellError as error:
                log.warning("snapshot %s of a kernel that is lost is left as it is: %s", info.id, error)

    async def _supersede(self, outlived: SnapshotInfo, by: SnapshotId) -> None:
        """The one before goes, unless the machine lost its power before the next one was on its disk."""
        try:
            await self._service.memory.supersede(outlived.id, by, self._service.memory.store.get(by).spec)
        except errors.WarmcellError as error:
            log.error("kernel %s can only go back to what it was before: %s", outlived.kernel_id, error)
            await self._keep(outlived)

    async def _keep(self, outlived: SnapshotInfo) -> None:
        """What a kernel went on from outlives it, and is named when its loss is told."""
        store = self._service.memory.store
        await store.amend(outlived.id, kind="named")
        self._kernels.ledger.keep(outlived.kernel_id or "", outlived.id, outlived.created_at)
        with contextlib.suppress(errors.ConflictError):  # Lost twice within a minute.
            then = time.strftime("%Y-%m-%d %H.%M", time.localtime(outlived.created_at))
            await store.rename(outlived.id, f"before the loss {then}")

    async def suspend_all(self) -> None:
        """Save what a server would find again; what cannot be saved is left to be ended."""
        await self._service.memory.twins.close()
        at_once = asyncio.Semaphore(SUSPENDED_AT_ONCE)

        async def save(kernel: Kernel, sandbox_id: SandboxId) -> None:
            async with at_once:
                try:
                    if self._service.info(sandbox_id).state is State.RUNNING:
                        await self.suspend(sandbox_id, even_busy=True)
                except errors.WarmcellError as error:
                    log.error("kernel %s is lost: it could not be saved: %s", kernel.request.kernel_id, error)
                    self._kernels.ledger.lose(kernel.request.kernel_id, error.message)
                    with contextlib.suppress(errors.WarmcellError):
                        last = self._service.memory.store.get(self._service.info(sandbox_id).snapshot or "").info
                        if last.kind == "outlived":
                            await self._keep(last)

        kept = [kernel for kernel in self._kernels.all() if kernel.request.persistent and kernel.alive]
        await asyncio.gather(*(save(one, one.sandbox_id) for one in kept if one.sandbox_id is not None))

    async def _clone(self, source: Kernel, snapshot: Coming | SnapshotId) -> SandboxInfo:
        kernel_id = str(uuid.uuid4())
        request = dataclasses.replace(
            source.request,
            kernel_id=kernel_id,
            connection=self.connection(kernel_id),
            spec=_forked(source.request),
            notebook=None,
            persistent=source.request.terms is not None,
        )
        return await self.bring_up(request, snapshot, parent=source.sandbox_id)

    def connection(self, kernel_id: str) -> dict[str, Any]:
        """Where clients find a kernel that the keeper makes by itself, and its key."""
        return {
            "transport": "ipc",
            "ip": socket_prefix(kernel_id, self._paths),
            **{f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)},
            "key": secrets.token_hex(32),
            "signature_scheme": "hmac-sha256",
        }

    async def bring_up(
        self, request: KernelRequest, snapshot: Coming | SnapshotId, *, parent: SandboxId | None = None
    ) -> SandboxInfo:
        """A new kernel that goes on from a snapshot.

        Args:
            request: What it is; nothing of that id is there yet.
            snapshot: Where it goes on from.
            parent: The sandbox that it was cloned from. One that code has asked for does not end with that.

        Raises:
            WarmcellError: There is none; nothing is left of it.
        """
        kernel_id, ours = request.kernel_id, request.terms is not None
        kernel = await self._kernels.add(request)
        try:
            info = await self._service.create(
                request.spec,
                owner=AGENT if ours else CLONE,
                principal=request.principal,
                terms=request.terms,
                parent=None if ours else parent,
                kernel_id=kernel_id,
                snapshot=snapshot,
                frontend=lambda box: self.front(kernel, box),
            )
        except BaseException:
            await to_its_end(self._kernels.remove(kernel_id))  # The fork may be given up while one clone already goes.
            raise
        kernel.sandbox_id, kernel.started = info.id, True
        self._kernels.note(kernel)
        return info

    def _adopted(self, kernel: Kernel) -> None:
        """What it was in the middle of when its server or keeper stopped goes on; its page had better be there."""
        box = None if kernel.sandbox_id is None else self._service.live(kernel.sandbox_id)
        if box is None or box.info.state is not State.SUSPENDED or box.info.snapshot is None:
            return
        with contextlib.suppress(errors.WarmcellError):  # Whoever has it resumed will be told.
            if self._service.memory.store.get(box.info.snapshot).kernel.get("inherited"):
                kernel.goes_on = True
                asyncio.get_running_loop().call_later(PAGE_WAIT_S, self._go_on_with_cell, kernel)

    def _go_on_with_cell(self, kernel: Kernel) -> None:
        if kernel.goes_on:
            kernel.goes_on = False
            self._on_wake(kernel)

    def _looked_at(self, kernel: Kernel, box: LiveSandbox) -> None:
        if kernel.goes_on:
            self._go_on_with_cell(kernel)
        else:
            self._service.memory.twins.want(box)

    def _give_up_waiting(self, box: LiveSandbox) -> None:
        """The cell that waits for a GPU is answered with an error; the kernel stays suspended."""
        with contextlib.suppress(errors.ConflictError, errors.SandboxNotFoundError):
            self._service.leave_queue(box.info.id)

    def _on_wake(self, kernel: Kernel) -> None:
        if not kernel.waking:  # What fails sleeps again, and is woken by what still waits until that is answered.
            kernel.waking = True
            self._kernels.spawn(self._wake(kernel))

    async def _wake(self, kernel: Kernel) -> None:
        began = time.perf_counter()
        failed: errors.WarmcellError | None = None
        try:
            if kernel.sandbox_id is not None and not self._kernels.closed:
                await self.resume(kernel.sandbox_id)
                log.info("kernel %s goes on after %.3f s", kernel.request.kernel_id, time.perf_counter() - began)
        except errors.WarmcellError as error:
            log.error("kernel %s could not go on: %s", kernel.request.kernel_id, error)
            failed = error
        except Exception as error:
            log.exception("kernel %s could not go on", kernel.request.kernel_id)
            failed = errors.SnapshotError(
                f"The kernel could not go on: {type(error).__name__}: {error}",
                hint="Run the cell again. keeper.log in the state directory says more.",
            )
        finally:
            kernel.waking = False  # Before what waits is answered: what comes after that may wake it again.
        if failed is not None:
            await kernel.proxy.refuse(failed)


def _forked(request: KernelRequest) -> Any:
    """The folder stays the source's own: a clone sees it, and what it changes there is its own."""
    spec = request.spec
    if spec.workspace is None or spec.workspace.mode != "rw":
        return spec
    return dataclasses.replace(spec, workspace=dataclasses.replace(spec.workspace, mode="cow"))
