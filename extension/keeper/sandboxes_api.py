"""`/sandboxes`, and what there is for them: made, told, changed and removed."""

import sys
from typing import Any

from warmcell.extension.keeper.agents import api as agents_api
from warmcell.extension.keeper.gate import Gate, own_sandboxes
from warmcell.extension.keeper.handler import Handler, number, object_of, text
from warmcell.extension.keeper.owners import OwnerWatch
from warmcell.extension.keeper.ranks import RANKS_MAX
from warmcell.extension.keeper.scope import GuestScope, of_gpu
from warmcell.sandbox.errors import CapacityError, InvalidRequestError
from warmcell.sandbox.lifecycle import TERMINAL
from warmcell.sandbox.models import SandboxId, SandboxInfo, SandboxSpec

MAX_CHILDREN = 16
"""Sandboxes that one sandbox may have made at a time."""


def routes() -> list[Any]:
    """For the user's own processes."""
    return [
        (r"/templates", TemplatesHandler),
        (r"/check", CheckHandler),
        (r"/sandboxes/([a-z0-9]+)/queue", QueueHandler),
    ]


def routes_for_guests() -> list[Any]:
    """For them, and for code in sandboxes."""
    return [
        (r"/gpus", GpusHandler),
        (r"/sandboxes", SandboxesHandler),
        (r"/sandboxes/([a-z0-9]+)", SandboxHandler),
        (r"/sandboxes/([a-z0-9]+)/interrupt", InterruptHandler),
        (r"/remote", RemoteHandler),
    ]


class GpusHandler(Handler):
    """The machine's GPUs, and who waits for one."""

    async def get(self) -> None:
        gpus, leases = await self.unless_gone(self.keeper.service.gpus()), self.keeper.service.leases
        if self.scope is not None or self.principal is not None:
            self.answer({"gpus": [of_gpu(gpu) for gpu in gpus]})
            return
        queue = await self.unless_gone(leases.queue())
        self.answer({"gpus": gpus, "queue": queue, "shares": leases.most_parts, "problem": leases.problem})


class QueueHandler(Handler):
    """The place of a sandbox in the queue for a GPU."""

    def delete(self, sandbox_id: str) -> None:
        self.keeper.service.leave_queue(self.visible(sandbox_id).id)
        self.set_status(204)


class TemplatesHandler(Handler):
    """Templates in use."""

    async def get(self) -> None:
        self.answer({"templates": [one.to_json() for one in await self.keeper.service.templates()]})


class CheckHandler(Handler):
    """Would this start? Nothing is made. The interpreter, if none is named, is ours: a kernelspec's default."""

    async def post(self) -> None:
        asked = object_of(self.body(), "spec")
        if self.principal is not None:
            asked = self.narrowed(self.principal, asked)
        spec = SandboxSpec.from_json({"python": sys.executable, **asked})
        self.answer({"spec": (await self.keeper.service.check(spec, principal=self.principal_name)).to_json()})


class SandboxesHandler(Handler):
    """All sandboxes that whoever asks may see."""

    def get(self) -> None:
        infos = own_sandboxes(self.principal, self.keeper.service.infos())
        if self.scope is not None:
            infos = self.scope.visible(infos)
        page, after = agents_api.selected(list(infos), self)
        self.answer({"sandboxes": [info.to_json() for info in page], "next": after})

    async def post(self) -> None:
        asked, hurry = object_of(self.body(), "spec"), self.body().get("wait") is False
        if self.scope is None and (self.principal is not None or "terms" in self.body()):
            info = await agents_api.once(self.keeper.agents, self, lambda: self._create_to_last(asked), makes=True)
        elif self.scope is not None:
            self._check_children(self.scope)
            spec = self.scope.narrow(
                asked,
                values_bytes=self.keeper.wiring.settings.remote_values_bytes,
                egress=self.keeper.service.live(self.scope.sandbox_id).spec.egress,
                has_image=self.has_image,
            )
            create = self.keeper.service.create(spec, owner="remote", parent=self.scope.sandbox_id, hurry=hurry)
            info = await self.unless_gone(create)
        else:
            pid, owner = self.peer()[0], "remote" if self.body().get("ranks") is True else "client"
            spec = SandboxSpec.from_json(asked)
            info = await self.unless_gone(self.keeper.service.create(spec, owner=owner, hurry=hurry))
            self._end_with_caller(info.id, pid)
        self.answer(info.to_json(), 201)

    async def _create_to_last(self, asked: dict[str, Any]) -> SandboxInfo:
        """One that outlives whoever asks, until its terms say otherwise."""
        body, keeper = self.body(), self.keeper
        snapshot = body.get("snapshot")
        if self.principal is not None:
            asked = self.narrowed(self.principal, asked)
            if snapshot is None:
                asked = keeper.quotas.capped(self.principal.name, asked)
        ref = None if snapshot is None else self.own_snapshot(text(snapshot, "snapshot"))
        if self.principal is not None and ref is not None:
            gate: Gate = self.settings["gate"]
            gate.check_copy(self.principal, keeper.service.memory.store.get(ref).spec.gpu)
        return await keeper.agents.create(
            asked,
            agents_api.terms_of(object_of(body, "terms")),
            snapshot=ref,
            principal=self.principal_name,
            with_kernel=body.get("kernel") is True,
        )

    def _check_children(self, scope: GuestScope) -> None:
        living = [one for one in scope.visible(self.keeper.service.infos()) if one.state not in TERMINAL]
        if len(living) >= MAX_CHILDREN:
            raise CapacityError(
                f"This sandbox has made {len(living)} others, which run", hint="Stop one, or wait until it has ended."
            )

    def _end_with_caller(self, sandbox_id: SandboxId, pid: int) -> None:
        keeper = self.keeper
        keeper.owners[sandbox_id] = OwnerWatch(pid, lambda: keeper.kernels.spawn(keeper.stop(sandbox_id)))


class SandboxHandler(Handler):
    """One sandbox."""

    def get(self, sandbox_id: str) -> None:
        self.answer(self.visible(sandbox_id).to_json())

    async def delete(self, sandbox_id: str) -> None:
        infos = {info.id: info for info in self.keeper.service.infos()}
        info = infos.get(SandboxId(sandbox_id))
        if info is not None:
            self.visible(sandbox_id)
            await self.keeper.stop(info.id)
        self.set_status(204)

    async def patch(self, sandbox_id: str) -> None:
        """Other terms, or another network policy, from now on."""
        info, body = self.visible(sandbox_id), self.body()
        asked = {name: value for name, value in body.items() if name != "network"}
        agents_api.changes_of(asked, info.terms)  # Before anything is changed.
        if "network" in body:
            policy = SandboxSpec.from_json({"python": "", "network": body["network"]})
            if policy.network != "none":
                raise InvalidRequestError("A sandbox gets no network later", hint='Name hosts, or give "none".')
            info = await self.keeper.agents.set_network(info.id, policy.egress)
        if asked or "network" not in body:
            changes = agents_api.changes_of(asked, self.keeper.service.info(info.id).terms)
            info = self.keeper.agents.set_terms(info.id, **changes)
        self.answer(info.to_json())


class RemoteHandler(Handler):
    """What `%%remote` begins with: the operator's defaults, and how much may be sent."""

    def get(self) -> None:
        settings = self.keeper.wiring.settings
        self.answer({"defaults": dict(settings.remote), "values_bytes": settings.remote_values_bytes})


class InterruptHandler(Handler):
    """Interrupt what runs in a sandbox's kernel."""

    async def post(self, sandbox_id: str) -> None:
        info, rank = self.visible(sandbox_id), self.body().get("rank")
        if info.terms is not None:
            await self.keeper.agents.interrupt(info.id)
        else:
            await self.keeper.runs.interrupt(
                info.id, None if rank is None else int(number(rank, "rank", most=RANKS_MAX))
            )
        self.answer({})
