"""Starts that are instant: templates, prepared sandboxes, and kernels that wait for somebody to speak with them."""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from warmcell.sandbox import errors
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.guest.supervisor.template import read_at_start
from warmcell.sandbox.kernel import Frontend, KernelProcess
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import GpuDevice, SandboxId, SandboxSpec, SnapshotId, TemplateInfo, TemplateStatus
from warmcell.sandbox.pool import WarmPool, memory_bytes
from warmcell.sandbox.registry import POOL, SEE_LOG, Registry
from warmcell.sandbox.sharing import SharedTemplates
from warmcell.sandbox.starts import Starts
from warmcell.sandbox.templates import Templates

log = logging.getLogger(__name__)

END_TIMEOUT_S = 60.0
"""Whoever ends a kernel gives up long before."""

TEMPLATE_TIMEOUT_S = 600.0
"""A prepared sandbox whose imports take longer is given up."""

IDLE_S = 0.5
"""So long after the last start what nobody waits for is put off."""

SAVE_TIMEOUT_S, WARMUP_TIMEOUT_S = 180.0, 300.0
"""Saving a template that takes longer is given up: its kernel waits for what does not come. A warm-up comes before."""


class Preparing(Registry):
    """Sandboxes, and those that wait for a kernel to be asked for."""

    def __init__(self, *, prepared_per_template: int = 1, prepared_bytes: int = 2 * 2**30, **registry: Any) -> None:
        """As `Registry`, and the bounds of `WarmPool`."""
        super().__init__(**registry)
        self._starts = Starts()
        self._pool = WarmPool(
            self._prepare,
            per_template=prepared_per_template,
            cap_bytes=prepared_bytes,
            changed=self._publish,
            quiet=self._starts.quiet,
        )
        self.memory.twins.may = self._may_wait
        self._templates = Templates(self.memory, self._make_template)
        self.shared = SharedTemplates(self._can_save)
        self._expecting: set[LiveSandbox] = set()
        """Sandboxes whose template is being built elsewhere; what becomes of it is told as theirs."""
        self.template_front: Callable[[LiveSandbox], Frontend | None] = lambda box: None
        """Makes who has a template settle before it is saved."""
        self.rehearse: Callable[[LiveSandbox], Awaitable[None]] = _nothing
        """Has a kernel that is to wait do beforehand what every kernel does first."""

    async def templates(self) -> list[TemplateInfo]:
        """The templates in use, by name and interpreter."""
        prepared = self._pool.prepared()
        found: dict[tuple[object, ...], TemplateInfo] = {}
        for box in [*self._boxes.values(), *prepared]:
            if box.info.template is not None and box.info.state not in TERMINAL:
                found[_template(box.spec)] = self._template_info(box)
        used = await asyncio.to_thread(lambda: [memory_bytes(box.processes) for box in prepared])
        for box, size in zip(prepared, used, strict=True):
            if (info := found.get(_template(box.spec))) is not None:
                found[_template(box.spec)] = dataclasses.replace(info, prepared_bytes=info.prepared_bytes + size)
        return list(found.values())

    def restart_follows(self, sandbox_id: SandboxId) -> None:
        """Its kernel is about to end, and the next one will be asked for: have that come up as soon as it can."""
        box = self.live(sandbox_id)
        if box.kernel is not None:
            self._spawn(self._come_up(box, box.kernel))

    async def until_quiet(self, sandbox_id: SandboxId) -> None:
        """Wait for the time in which its first kernel can come up before anybody asks for it: no other start is under
        way, and its template is there, if there can be one that is saved.

        Raises:
            SandboxNotFoundError: It has gone meanwhile.
        """
        await self._starts.quiet()
        await self._ensure_template(self.live(sandbox_id))

    async def give_up_prepared(self) -> bool:
        """Stop all that wait, for starts and for resumes, as the machine lacks memory; whether there were any."""
        waiting = await self.memory.twins.shrink()
        return await self._pool.shrink() or waiting

    # For those who build on it

    async def _may_wait(self) -> bool:
        """Whether there is room for one more that waits for a resume, once no start is under way."""
        await self._starts.quiet()
        return await self._pool.room_beside(self.memory.twins.boxes)

    async def _nobody_waits(self) -> None:
        """Return when no start is under way, and what has been started had a while to be used in."""
        await self._starts.quiet()
        await asyncio.sleep(IDLE_S)

    async def _come_up(self, box: LiveSandbox, before: KernelProcess) -> None:
        template = await self._templates.find(box.spec)  # Both have the same numbers, so the rest waits for its end.
        if template is None and not self._may_give_way(box):
            await box.come_up(beside=before)
            return
        with contextlib.suppress(errors.ConflictError, TimeoutError):  # it is going away
            async with asyncio.timeout(END_TIMEOUT_S):
                await before.exited.wait()
            if box.info.state is State.RUNNING:
                await self._kernel_from_template(box, template=template)
                if template is None:
                    await box.come_up()  # Unless one has, in the prepared sandbox that took its place.

    async def _can_save(self, spec: SandboxSpec) -> bool:
        try:
            await self.memory.check(spec)
        except errors.UnsupportedOperationError:
            return False
        return True

    async def _maker(self, box: LiveSandbox, devices: tuple[GpuDevice, ...]) -> SandboxBackend:
        """The nest of its template, where that has a process that its kernels come from."""
        backend = await super()._maker(box, devices)
        if any(gpu.device_nodes for gpu in devices):  # What is imported may look for devices, and there would be none.
            return backend
        box.shared = await self.shared.of(box.spec, backend)
        if box.shared is None:
            return backend
        box.shared.follow(box)
        return box.shared.nest

    async def _kernel_from_template(
        self, box: LiveSandbox, *, template: SnapshotId | None = None
    ) -> KernelProcess | None:
        """A kernel that waits to be spoken with, and may have waited for long; None where there is none."""
        if box.kernel is not None and box.kernel.alive and box.kernel.token:
            return box.kernel
        template = template or await self._templates.find(box.spec)
        if template is None and box.kernel is None:
            return None
        try:
            if template is None:
                await self._exclusively(box, self._give_way(box))
                return None  # It is forked, or has come up already, and is told now what it is to be.
            return await self._exclusively(box, self._waiting_kernel(box, template))
        except errors.WarmcellError as error:
            log.warning("sandbox %s: no kernel from the template's snapshot: %s", box.info.id, error)
            return None

    async def _waiting_kernel(self, box: LiveSandbox, template: SnapshotId) -> KernelProcess:
        if box.kernel is not None and box.kernel.alive:
            if box.kernel.token:
                return box.kernel
            raise errors.ConflictError(f"Sandbox {box.info.id} has a kernel", hint="End it first.")
        return await self._kernel_of_prepared(box, template) or await self.memory.restore_into(box, template)

    async def _kernel_of_prepared(self, box: LiveSandbox, template: SnapshotId) -> KernelProcess | None:
        """The kernel of a prepared sandbox that takes this one's place; None where none does."""
        if not await self._replace(box, template):
            return None
        kernel = box.kernel
        assert kernel is not None
        kernel.generation = box.info.generation + 1
        box.tell(
            generation=kernel.generation,
            exit_code=None,
            started_from=None,
            started_ms=None,
            snapshot=template,
            phases_ms={"pool": 0.0},
        )
        return kernel

    def _may_give_way(self, box: LiveSandbox) -> bool:
        """Whether a kernel that was forked before it is asked for waits in a prepared sandbox, and may be had."""
        waiting = self._pool.next(box.shape)
        if waiting is None or waiting.shared is not box.shared or box.kernel is None or box.is_missed:
            return False
        if box.shared is None:  # Each has a fork server of its own, where one has come up as no kernel lives.
            return box.has_fork_server and waiting.has_fork_server
        return waiting.has_ahead and not box.has_ahead

    async def _give_way(self, box: LiveSandbox) -> None:
        """Have a prepared sandbox take its place, where the next kernel has come up already, if nothing is missed."""
        if box.kernel is not None and not box.kernel.alive and self._may_give_way(box):
            await self._replace(box, None)

    async def _replace(self, box: LiveSandbox, template: SnapshotId | None) -> bool:
        """Where a notebook's kernels have left nothing, what is prepared takes the place of what its sandbox was.

        Whether it did.
        """
        if box.info.kernel_id is None or box.gpus:
            return False
        waiting = self._pool.next(box.shape)
        if waiting is None or waiting.info.snapshot != template:
            return False
        if not await box.instance.can_be_replaced_by(waiting.instance, fork_server=box.has_fork_server):
            box.is_missed = True
            return False
        if self._pool.next(box.shape) is not waiting:  # Another start has it by now.
            return False
        prepared = self._pool.take(box.shape)
        assert prepared is waiting
        try:
            return await box.give_way(prepared)
        finally:
            self._pool.put_away(prepared)

    async def _take(self, spec: SandboxSpec, devices: tuple[GpuDevice, ...]) -> LiveSandbox | None:
        """A prepared sandbox, unless its environment has changed since."""
        while (prepared := self._pool.take(spec.shape(devices))) is not None:
            good = False
            try:
                good = prepared.info.snapshot == await self._templates.find(spec)
            finally:
                if not good:
                    self._pool.put_away(prepared)
            if good:
                return prepared
            log.info("prepared sandbox %s goes: its environment has changed", prepared.info.id)
        return None

    async def _prepare(self, spec: SandboxSpec) -> LiveSandbox:
        """A sandbox for the pool: up, and its template settled. One that is not from a template's snapshot, where there
        is one, would be of no use to a start.

        Raises:
            WarmcellError: It could not be made.
        """
        box = self._new(dataclasses.replace(spec, gpu=None, egress=None), owner=POOL)
        try:
            known = await self._templates.find(box.spec)
            if known is not None:
                await self._clone_template(box, known, ())
                await self.rehearse(box)
                return box
            await self._bring_up_prepared(box)
            await box.come_up()
            came_meanwhile = await self._templates.find(box.spec) is not None
        except BaseException:
            await box.stop()
            raise
        if came_meanwhile:
            await box.stop()
            return await self._prepare(spec)
        return box

    async def _from_template(self, box: LiveSandbox, devices: tuple[GpuDevice, ...]) -> bool:
        """Bring it up with a kernel from its template's snapshot; whether that could be done."""
        template = await self._templates.find(box.spec)
        if template is None:
            return False
        try:
            await self._clone_template(box, template, devices)
        except errors.WarmcellError as error:
            log.warning("sandbox %s does not come from its template's snapshot: %s", box.info.id, error)
            await box.discard()
            box.kernel = None
            return False
        return True

    async def _clone_template(self, box: LiveSandbox, template: SnapshotId, devices: tuple[GpuDevice, ...]) -> None:
        await self.memory.clone(box, template, devices)
        box.tell(template=self._templates.status(template))

    async def _make_template(self, spec: SandboxSpec, identity: Mapping[str, str]) -> SnapshotId:
        """A kernel that has imported what it is to import, saved before anybody uses it."""
        box = self._new(dataclasses.replace(spec, gpu=None, egress=None), owner=POOL)
        await self._bring_up_prepared(box, template=True)
        try:
            log.info("template %s has imported, and gets a kernel", spec.template)
            await box.start_kernel(env=read_at_start(spec.env), cwd="")
            box.frontend = self.template_front(box)
            try:
                made = await self._save_template(box, identity)
            except errors.WarmcellError as error:
                if box.kernel is None or not box.kernel.alive:
                    raise
                log.warning("template %s is tried once more: %s", spec.template, error)
                made = await self._save_template(box, identity)
        except BaseException:
            await box.stop()
            raise
        try:
            await box.stop()
        except errors.WarmcellError as error:  # What was saved is whole, whatever becomes of this one.
            log.warning("the sandbox of template %s does not end: %s", spec.template, error)
        return made

    async def _save_template(self, box: LiveSandbox, identity: Mapping[str, str]) -> SnapshotId:
        log.info("the kernel of template %s is saved", box.spec.template)
        try:
            async with asyncio.timeout(SAVE_TIMEOUT_S + (WARMUP_TIMEOUT_S if box.spec.warmup else 0)):
                return (await self.memory.save(box, kind="template", environment=identity)).id
        except TimeoutError as error:
            raise errors.OperationTimeoutError(
                f"Template {box.spec.template} was not saved within {SAVE_TIMEOUT_S:.0f} s",
                hint="Kernels start without it; the log says which step took so long.",
                details={"operation": "save", "timeout": SAVE_TIMEOUT_S},
            ) from error

    async def _bring_up_prepared(self, box: LiveSandbox, *, template: bool = False) -> None:
        """With a fork server that has imported what it is to import; one of its kernels may become a template."""
        try:
            await self._bring_up(box, ())
            if template:
                await self.memory.enroll(box, template=True)
            await box.prepare()
            async with asyncio.timeout(TEMPLATE_TIMEOUT_S):
                await box.wait_template()
        except TimeoutError as error:
            await box.stop()
            raise errors.OperationTimeoutError(
                f"Template {box.spec.template} was not imported within {TEMPLATE_TIMEOUT_S:.0f} s",
                hint="Take the module that hangs out of the kernelspec's preload list.",
                details={"operation": "prepare", "timeout": TEMPLATE_TIMEOUT_S},
            ) from error
        except Exception as error:
            await box.stop()
            if isinstance(error, errors.WarmcellError):
                raise
            log.exception("preparing sandbox %s failed", box.info.id)
            raise errors.SandboxStartError(f"{type(error).__name__}: {error}", hint=SEE_LOG) from error
        except BaseException:
            await box.stop()
            raise

    def _adopt(
        self, prepared: LiveSandbox, asked: LiveSandbox, devices: tuple[GpuDevice, ...], *, queue_ms: float
    ) -> LiveSandbox:
        """The prepared sandbox becomes the one that was asked for, under the id that is already known."""
        prepared.gpus = devices
        prepared.spec = asked.spec
        prepared.awaited = True
        self._boxes[asked.info.id] = prepared
        prepared.door, prepared.tally = asked.door, asked.tally
        prepared.serve_door()
        prepared.tell(
            id=asked.info.id,
            backend_why=asked.info.backend_why,
            owner=asked.info.owner,
            principal=asked.info.principal,
            terms=asked.info.terms,
            parent=asked.info.parent,
            egress=asked.spec.egress,
            kernel_id=asked.info.kernel_id,
            notebook=asked.info.notebook,
            gpu=asked.info.gpu,
            gpus=devices,
            created_at=asked.info.created_at,
            phases_ms={"queue": round(queue_ms, 1), "pool": 0.0},
        )
        return prepared

    async def _keep_warm(self, box: LiveSandbox) -> None:
        """Have the next start and the next sandbox of this shape be instant; imports happen one after another."""
        template: SnapshotId | None = None
        await self._starts.quiet()  # Its own client is about to connect.
        try:
            template = await self._ensure_template(box)
            if template is not None:
                known = {info.id for info in self.memory.store.infos(kind="template")}
                other = _template(box.spec)
                await self._pool.renew(
                    lambda one: (
                        one.info.snapshot in known or (one.info.snapshot is None and _template(one.spec) != other)
                    )
                )
            elif box.info.state not in TERMINAL:  # Else there may be another of its shape soon.
                if not box.imports:  # Until now it was told of the template that could not be made elsewhere.
                    await box.prepare()
                async with asyncio.timeout(TEMPLATE_TIMEOUT_S):
                    await box.wait_template()
        except errors.WarmcellError as error:  # it has ended meanwhile; there may be another of its shape soon
            log.debug("sandbox %s was not prepared for a restart: %s", box.info.id, error)
        except Exception:  # The next one of its shape is wanted all the same.
            log.exception("sandbox %s was not prepared for a restart", box.info.id)
        failed = box.info.template is not None and box.info.template.state == "failed"
        if not failed and not any(gpu.device_nodes for gpu in box.gpus):
            self._pool.want(
                dataclasses.replace(box.spec, gpu=None, egress=None),
                cheap=template is not None or box.shared is not None,
            )

    async def _ensure_template(self, box: LiveSandbox) -> SnapshotId | None:
        """Its template, if it can be saved."""
        self._expecting.add(box)
        try:
            template = await self._templates.ensure(box.spec)
        finally:
            self._expecting.discard(box)
        if template is not None:
            box.tell(template=self._templates.status(template))
        return template

    def _publish(self, box: LiveSandbox) -> None:
        if box.info.owner != POOL:
            super()._publish(box)
        elif box.info.template is not None:
            self._changes.publish(self._template_info(box))
            for other in self._expecting:
                if other.info.state is State.RUNNING and _template(other.spec) == _template(box.spec):
                    other.tell(template=_until_saved(box.info.template, told=other.info.template))

    def _template_info(self, box: LiveSandbox) -> TemplateInfo:
        """What is told of the template of this sandbox, the memory of prepared ones apart."""
        assert box.info.template is not None
        key = _template(box.spec)
        return TemplateInfo(
            name=box.spec.template,
            python=box.spec.python,
            preload=box.spec.preload,
            status=box.info.template,
            prepared=sum(_template(one.spec) == key for one in self._pool.prepared()),
            prepared_bytes=0,
        )


async def _nothing(box: LiveSandbox) -> None:
    """It waits as it is."""


def _template(spec: SandboxSpec) -> tuple[object, ...]:
    """What makes two templates the same."""
    return (spec.template, spec.image, spec.python, spec.preload, spec.warmup)


def _until_saved(status: TemplateStatus, *, told: TemplateStatus | None) -> TemplateStatus:
    """A template that others wait for is not ready before it is saved: until then its last module is on its way."""
    if status.importing or not status.imported or status.state not in ("importing", "ready"):
        return status
    last = status.imported[-1]
    since = told.since if told is not None and told.importing == last else status.since
    return dataclasses.replace(status, state="importing", importing=last, since=since)
