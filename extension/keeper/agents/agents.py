"""How sandboxes come that code asks for: from nothing, from a snapshot, as copies of another one; and their end."""

import asyncio
import contextlib
import dataclasses
import os
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from warmcell.extension.keeper.agents import checks
from warmcell.extension.keeper.agents.boxes import AgentBox
from warmcell.extension.keeper.agents.lifetimes import Lifetimes
from warmcell.extension.keeper.agents.once import Once
from warmcell.extension.keeper.kernel import KernelRequest
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.sandbox import errors
from warmcell.sandbox.models import SandboxId, SandboxInfo, SandboxSpec, Terms
from warmcell.sandbox.service import SandboxService

NOT_THEIRS = ("workspace", "mounts", "home")
"""Fields of a spec that would let a sandbox see something of the host, or leave something there."""


class Agents(Lifetimes):
    """All of them, of one keeper."""

    def __init__(
        self,
        service: SandboxService,
        kernels: Kernels,
        memory: KernelMemory,
        *,
        asleep_s: float | None = None,
        frozen_s: float | None = None,
    ) -> None:
        """There are none yet. The arguments are those of `Lifetimes`."""
        super().__init__(service, kernels, memory, asleep_s=asleep_s, frozen_s=frozen_s)
        self.once = Once()

    async def create(
        self,
        asked: Mapping[str, Any],
        terms: Terms,
        *,
        snapshot: str | None = None,
        principal: str | None = None,
        with_kernel: bool = False,
    ) -> SandboxInfo:
        """A new sandbox; it outlives whoever has asked for it.

        Commands and files need no kernel. It comes up a moment later, or when the first code is to be run.

        Args:
            asked: Of a spec, what is to be other than usual.
            terms: For how long.
            snapshot: Id or name of one that it goes on from; then nothing is `asked`.
            principal: Whose it is.
            with_kernel: It is there once its kernel answers. One from a snapshot always is.

        Raises:
            WarmcellError: There is none; nothing is left of it.
        """
        kernel_id = str(uuid.uuid4())
        self._coming.add(kernel_id)
        try:
            info = await self._start(kernel_id, asked, terms, snapshot, principal, with_kernel=with_kernel)
            self._boxes[info.id] = AgentBox(self, info.id)
        finally:
            self._coming.discard(kernel_id)
        self.kernels.want(info.id)
        self.changed(info)
        return self._service.info(info.id)

    async def fork(self, sandbox_id: SandboxId, count: int) -> list[SandboxInfo]:
        """Clones with terms of the same kind, whose time begins now; all of them, or none.

        Raises:
            QuotaExceededError: Not all of them have room in its principal's quota; nothing was begun.
            WarmcellError: As `KernelMemory.fork`.
        """
        await self._memory.check(sandbox_id)
        live = self.live(sandbox_id)
        self._service.admission.check_quota(live.spec, live.info.principal, count=count)
        await self.awake(sandbox_id)
        await self.kernels.running(sandbox_id)
        clones = await self._memory.fork(sandbox_id, count)
        for info in clones:
            self.of(info.id)
            self.changed(info)
        return [self._service.info(info.id) for info in clones]

    async def close(self) -> None:
        """End all work on them; they themselves are the service's."""
        for task in self._ending:
            task.cancel()
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self.kernels.close()
        for info in self._service.infos():
            if info.terms is not None and info.terms.frozen:  # What is saved now has to get ready for it.
                with contextlib.suppress(errors.WarmcellError):
                    await self.live(info.id).thaw()
        await self.once.close()
        await asyncio.gather(*(self.forget(sandbox_id) for sandbox_id in list(self._boxes)))
        self.context.destroy(linger=0)

    async def _start(
        self,
        kernel_id: str,
        asked: Mapping[str, Any],
        terms: Terms,
        snapshot: str | None,
        principal: str | None,
        *,
        with_kernel: bool,
    ) -> SandboxInfo:
        terms = dataclasses.replace(terms, ends_at=None, frozen=False, cold=False)
        if snapshot is not None:
            info = await self._from_snapshot(snapshot, asked, kernel_id, terms, principal)
        else:
            request = KernelRequest(
                kernel_id=kernel_id,
                spec=_spec(asked),
                connection=self._memory.connection(kernel_id),
                persistent=True,
                terms=terms,
                principal=principal,
            )
            info = await self._kernels.start(request, owner_pid=0, sandbox_only=not with_kernel)
            kernel = self._kernels.get(kernel_id)  # What was chosen for it stays so, for its copies too.
            kernel.request = dataclasses.replace(kernel.request, spec=self.live(info.id).spec)
        return info

    async def _from_snapshot(
        self, ref: str, asked: Mapping[str, Any], kernel_id: str, terms: Terms, principal: str | None
    ) -> SandboxInfo:
        if set(asked) - {"env"}:
            raise errors.InvalidRequestError(
                "A sandbox that goes on from a snapshot is as that was", hint="Leave out everything but env and terms."
            )
        manifest = self._service.memory.store.get(ref)
        saved = manifest.kernel.get("request")
        if manifest.info.kind != "named" or not isinstance(saved, Mapping) or not saved.get("terms"):
            raise errors.UnsupportedOperationError(
                "It is no snapshot of a sandbox that code has asked for", hint="Take one with Sandbox.snapshot()."
            )
        await self._service.memory.check(manifest.spec)
        request = dataclasses.replace(
            KernelRequest.from_json(saved),
            kernel_id=kernel_id,
            spec=dataclasses.replace(manifest.spec, env={**manifest.spec.env, **checks.strings(asked, "env")}),
            connection=self._memory.connection(kernel_id),
            terms=terms,
            principal=principal,
        )
        info = await self._memory.bring_up(request, manifest.info.id)
        if saved["terms"].get("cold"):
            try:
                await self._begin_anew(info.id)
            except BaseException:
                await self._kill(info.id)
                raise
        return info


def _spec(asked: Mapping[str, Any]) -> SandboxSpec:
    """What is asked for, nothing of the host in it.

    Raises:
        InvalidRequestError: It asks for what such a sandbox does not get.
    """
    for name in NOT_THEIRS:
        if name in asked:
            raise errors.InvalidRequestError(
                f"{name!r} is not for sandboxes of this kind", hint="Upload what it is to have: box.files."
            )
    if asked.get("network") == "host":
        raise errors.InvalidRequestError(
            "Sandboxes of this kind do not have the machine's network", hint='Name hosts: {"allow": ["pypi.org"]}.'
        )
    usual = {"python": "" if asked.get("image") else os.path.abspath(sys.executable)}
    return SandboxSpec.from_json({**usual, **asked})
