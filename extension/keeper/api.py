"""The keeper's REST, `/warmcell/api/v1` (docs/explanation/keeper-api.md). Handlers translate, no more."""

import dataclasses
import json
import math
import os
import sys
from typing import Any

from tornado import web
from tornado.iostream import StreamClosedError

from warmcell.extension import machine
from warmcell.extension.keeper import images_api, meters_api, principals_api, self_api, snapshots_api
from warmcell.extension.keeper.agents import api as agents_api
from warmcell.extension.keeper.agents import urls_api
from warmcell.extension.keeper.agents.boxes import Agents
from warmcell.extension.keeper.gate import Gate, narrow, own_sandboxes
from warmcell.extension.keeper.http import JsonHandler
from warmcell.extension.keeper.kernel import KernelRequest
from warmcell.extension.keeper.kernel_memory import CLONES_MAX, KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.extension.keeper.ledger import SessionNote
from warmcell.extension.keeper.owners import OwnerWatch
from warmcell.extension.keeper.principals import Principals
from warmcell.extension.keeper.quotas import PrincipalQuotas
from warmcell.extension.keeper.ranks import RANKS_MAX
from warmcell.extension.keeper.run_handler import RunHandler
from warmcell.extension.keeper.runs import Runs
from warmcell.extension.keeper.scope import GuestScope, of_gpu
from warmcell.extension.keeper.tickets import Tickets
from warmcell.extension.keeper.usage import Meter, UsageHandler
from warmcell.extension.keeper.values_handler import ValuesHandler
from warmcell.extension.keeper.wiring import Wiring
from warmcell.extension.keeper.wishes import Wishes
from warmcell.sandbox.changes import Change, Subscription
from warmcell.sandbox.errors import CapacityError, InvalidRequestError, UnsupportedOperationError
from warmcell.sandbox.images.cache import ImageCache
from warmcell.sandbox.lifecycle import TERMINAL
from warmcell.sandbox.models import SandboxId, SandboxInfo, SandboxSpec, Wire
from warmcell.sandbox.service import SandboxService

PREFIX = "/warmcell/api/v1"
LONGEST_WAIT_S = 300.0
MAX_CHILDREN = 16
"""Sandboxes that one sandbox may have made at a time."""

SIGNAL_MAX = 64
EVENT_KEEPALIVE_S = 15.0
"""A comment this often shows both sides of an event stream that the other is there."""


@dataclasses.dataclass(frozen=True)
class KeeperApi:
    """What handlers work with."""

    service: SandboxService
    kernels: Kernels
    memory: KernelMemory
    wishes: Wishes
    runs: Runs
    images: ImageCache
    wiring: Wiring
    principals: Principals
    quotas: PrincipalQuotas
    started_at: float
    agents: Agents
    meter: Meter
    tickets: Tickets
    owners: dict[SandboxId, OwnerWatch] = dataclasses.field(default_factory=dict)

    def application(self) -> web.Application:
        """All verbs, for the user's own processes."""
        return self._application(
            [
                (r"/status", StatusHandler),
                (r"/doctor", DoctorHandler),
                (r"/templates", TemplatesHandler),
                (r"/events", EventsHandler),
                (r"/check", CheckHandler),
                *snapshots_api.routes(),
                *images_api.routes(),
                *principals_api.routes(),
                *meters_api.routes(),
                (r"/usage", UsageHandler),
                (r"/sandboxes/([a-z0-9]+)/queue", QueueHandler),
                (r"/sandboxes/([a-z0-9]+)/(suspend|resume|snapshot|restore|fork|park|gpu)", MemoryHandler),
                *agents_api.routes(),
                *urls_api.routes(),
                (r"/kernels", KernelsHandler),
                (r"/kernels/([^/]+)", KernelHandler),
                (r"/kernels/([^/]+)/(signal|end|adopt|leave|sessions)", KernelVerbHandler),
            ],
            scope=None,
            gate=Gate(self.principals, self.quotas, self.service, self.tickets),
            principals=principals_api.PrincipalsApi(self.principals, self.quotas),
        )

    def guest_application(self, scope: GuestScope) -> web.Application:
        """The few verbs that code in a sandbox has, within what that sandbox was given."""
        return self._application(self_api.routes(), scope=scope)

    def _application(self, routes: list[Any], scope: GuestScope | None, **settings: Any) -> web.Application:
        routes = [
            *routes,
            (r"/gpus", GpusHandler),
            (r"/sandboxes", SandboxesHandler),
            (r"/sandboxes/([a-z0-9]+)", SandboxHandler),
            (r"/sandboxes/([a-z0-9]+)/interrupt", InterruptHandler),
            (r"/sandboxes/([a-z0-9]+)/run", RunHandler),
            (r"/sandboxes/([a-z0-9]+)/values/([0-9]{1,9})", ValuesHandler),
            (r"/remote", RemoteHandler),
        ]
        return web.Application(
            [(PREFIX + path, handler) for path, handler in routes],
            default_handler_class=UnknownHandler,
            log_function=lambda handler: None,
            keeper=self,
            snapshots=snapshots_api.SnapshotsApi(
                store=self.service.memory.store,
                images=self.wiring.images,
                imports=self.wiring.settings.import_snapshots,
            ),
            meters=meters_api.Meters(self.service, self.kernels),
            meter=self.meter,
            scope=scope,
            check_peer=scope is None,
            **settings,
        )

    async def stop(self, sandbox_id: SandboxId) -> None:
        """Stop a sandbox, with the kernel that is in it."""
        await self.kernels.forget_sandbox(sandbox_id)
        await self.service.stop(sandbox_id)

    async def forget(self, sandbox_id: SandboxId) -> None:
        """Let go of what hangs on a sandbox that has ended, however that came. Idempotent."""
        owner = self.owners.pop(sandbox_id, None)
        if owner is not None:
            owner.close()
        await self.runs.forget(sandbox_id)
        await self.agents.forget(sandbox_id)


class Handler(JsonHandler):
    """Access to the keeper, and to the scope of whoever asks."""

    @property
    def keeper(self) -> KeeperApi:
        keeper: KeeperApi = self.settings["keeper"]
        return keeper

    @property
    def scope(self) -> GuestScope | None:
        scope: GuestScope | None = self.settings["scope"]
        return scope

    def own_snapshot(self, ref: str, sandbox_id: str | None = None) -> str:
        """What to ask the store for: of a principal, the id of one of its own.

        Raises:
            SnapshotNotFoundError: It has none like that.
        """
        if self.principal is None:
            return ref
        gate: Gate = self.settings["gate"]
        return gate.snapshot(self.principal, ref, sandbox_id)

    def visible(self, sandbox_id: str) -> SandboxInfo:
        """The sandbox, if it exists for whoever asks."""
        info = self.keeper.service.info(SandboxId(sandbox_id))
        if self.scope is not None:
            self.scope.check_visible(info)
        return info


class StatusHandler(Handler):
    """Who this keeper is."""

    def get(self) -> None:
        from warmcell import __version__

        self.answer(
            {
                "pid": os.getpid(),
                "version": __version__,
                "user": machine.user(),
                "started_at": self.keeper.started_at,
                "isolation": self.keeper.wiring.settings.usual_backend,
            }
        )


class DoctorHandler(Handler):
    """What this machine can do."""

    async def get(self) -> None:
        engines = await self.unless_gone(self.keeper.service.memory.reports())
        self.answer(await self.unless_gone(self.keeper.wiring.doctor(engines)))


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
        asked = _object(self.body(), "spec")
        if self.principal is not None:
            asked = narrow(self.principal, asked, usual=self.keeper.wiring.settings.usual_backend)
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
        asked = _object(self.body(), "spec")
        if self.scope is None and (self.principal is not None or "terms" in self.body()):
            info = await agents_api.once(self.keeper.agents, self, lambda: self._create_to_last(asked))
        elif self.scope is not None:
            self._check_children(self.scope)
            spec = self.scope.narrow(
                asked,
                values_bytes=self.keeper.wiring.settings.remote_values_bytes,
                egress=self.keeper.service.live(self.scope.sandbox_id).spec.egress,
            )
            create = self.keeper.service.create(spec, owner="remote", parent=self.scope.sandbox_id)
            info = await self.unless_gone(create)
        else:
            pid = self.peer()[0]
            info = await self.unless_gone(self.keeper.service.create(SandboxSpec.from_json(asked), owner="client"))
            self._end_with_caller(info.id, pid)
        self.answer(info.to_json(), 201)

    async def _create_to_last(self, asked: dict[str, Any]) -> SandboxInfo:
        """One that outlives whoever asks, until its terms say otherwise."""
        body, keeper = self.body(), self.keeper
        snapshot = body.get("snapshot")
        if self.principal is not None:
            asked = narrow(self.principal, asked, usual=self.keeper.wiring.settings.usual_backend)
            if snapshot is None:
                asked = keeper.quotas.capped(self.principal.name, asked)
        ref = None if snapshot is None else self.own_snapshot(_text(snapshot, "snapshot"))
        if self.principal is not None and ref is not None:
            gate: Gate = self.settings["gate"]
            gate.check_copy(self.principal, keeper.service.memory.store.get(ref).spec.gpu)
        return await keeper.agents.create(
            asked,
            agents_api.terms_of(_object(body, "terms")),
            snapshot=ref,
            principal=self.principal_name,
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
        changes = agents_api.changes_of({name: value for name, value in body.items() if name != "network"})
        if "network" in body:
            policy = SandboxSpec.from_json({"python": "", "network": body["network"]})
            if policy.network != "none":
                raise InvalidRequestError("A sandbox gets no network later", hint='Name hosts, or give "none".')
            info = await self.keeper.agents.set_network(info.id, policy.egress)
        if changes or "network" not in body:
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
                info.id, None if rank is None else int(_number(rank, "rank", most=RANKS_MAX))
            )
        self.answer({})


class MemoryHandler(Handler):
    """What can be done with the memory of a sandbox."""

    async def post(self, sandbox_id: str, verb: str) -> None:
        info = self.visible(sandbox_id)
        if info.terms is None:
            self.answer(*await self._of_notebook(info.id, verb))
        else:
            self.answer(*await agents_api.once(self.keeper.agents, self, lambda: self._of_agent(info.id, verb)))

    async def _of_notebook(self, box: SandboxId, verb: str) -> tuple[Any, int]:
        memory, body = self.keeper.memory, self.body()
        populate = body.get("populate") is True
        if verb == "suspend":
            info = await memory.suspend(box, even_busy=body.get("busy") is True)
        elif verb == "park":
            info = await memory.park(box)
        elif verb == "gpu":
            info = await memory.change_gpu(box, self_api.gpu_wish(body.get("gpu")))
        elif verb == "resume":
            info = await memory.resume(box)
            if populate:
                await memory.populate(box)
        elif verb == "snapshot":
            name = body.get("name", "")
            return (await memory.snapshot(box, name=_text(name, "name") if name else "")).to_json(), 201
        elif verb == "restore":
            ref = self.own_snapshot(_text(body.get("snapshot"), "snapshot"), box)
            info = await memory.restore(box, ref)
            if populate:
                await memory.populate(box, ref)
        else:
            ref = (
                self.own_snapshot(_text(body["snapshot"], "snapshot"), box) if body.get("snapshot") is not None else ""
            )
            return {"sandboxes": [one.to_json() for one in await memory.fork(box, self._clones(), ref=ref)]}, 201
        return info.to_json(), 200

    async def _of_agent(self, box: SandboxId, verb: str) -> tuple[Any, int]:
        """The same, of what may be frozen, and goes on for whoever asks again."""
        agents, memory, body = self.keeper.agents, self.keeper.memory, self.body()
        if verb == "suspend":
            return (await agents.suspend(box)).to_json(), 200
        if verb == "resume":
            return (await agents.wake(box)).to_json(), 200
        if verb in ("park", "gpu"):
            raise UnsupportedOperationError(
                "Sandboxes of code keep the GPU that they have", hint="Suspend it to give it back, or make a new one."
            )
        if verb == "fork":
            return {"sandboxes": [one.to_json() for one in await agents.fork(box, self._clones())]}, 201
        await memory.check(box)
        await agents.awake(box)
        if verb == "snapshot":
            name = body.get("name", "")
            return (await memory.snapshot(box, name=_text(name, "name") if name else "")).to_json(), 201
        await memory.restore(box, self.own_snapshot(_text(body.get("snapshot"), "snapshot"), box))
        return self.keeper.service.info(box).to_json(), 200

    def _clones(self) -> int:
        return int(_number(self.body().get("n", 1), "n", least=1, most=CLONES_MAX))


class KernelsHandler(Handler):
    """Kernels with their keys; on the keeper's own socket only."""

    def get(self) -> None:
        kernels = self.keeper.kernels
        self.answer(
            {
                "kernels": [kernel.describe() for kernel in kernels.all()],
                "lost": [note.to_json() for note in kernels.ledger.lost()],
            }
        )

    async def post(self) -> None:
        request = KernelRequest.from_json(self.body())
        info = await self.unless_gone(self.keeper.kernels.start(request, owner_pid=self.peer()[0]))
        self.answer(info.to_json(), 201)


class KernelHandler(Handler):
    """One kernel."""

    async def get(self, kernel_id: str) -> None:
        kernels = self.keeper.kernels
        wait = self.get_query_argument("wait", None)
        if wait is not None:
            timeout = _number(_parsed(wait), "wait", most=LONGEST_WAIT_S)
            await self.unless_gone(kernels.wait(kernel_id, timeout=timeout))
        unowned = self.get_query_argument("unowned", None)
        if unowned is not None:
            timeout = _number(_parsed(unowned), "unowned", most=LONGEST_WAIT_S)
            await self.unless_gone(kernels.unowned(kernel_id, timeout=timeout))
        self.answer(kernels.get(kernel_id).describe())

    async def delete(self, kernel_id: str) -> None:
        await self.keeper.kernels.remove(kernel_id)
        self.set_status(204)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenSessions(Wire):
    """Body of `POST /kernels/{id}/sessions`."""

    sessions: tuple[SessionNote, ...]
    notebook: str | None = None
    session_name: str | None = None


class KernelVerbHandler(Handler):
    """Signal a kernel, end its process, own it or let go of it, or say what is open on it."""

    async def post(self, kernel_id: str, verb: str) -> None:
        kernels, body = self.keeper.kernels, self.body()
        if verb == "signal":
            await kernels.signal(kernel_id, int(_number(body.get("signum"), "signum", least=1, most=SIGNAL_MAX)))
        elif verb == "end":
            grace = _number(body.get("grace_s", 0), "grace_s", most=LONGEST_WAIT_S)
            await kernels.end(kernel_id, grace=grace, restart=body.get("restart") is True)
        elif verb == "sessions":
            said = OpenSessions.from_json(body)
            kernels.set_sessions(kernel_id, said.sessions, notebook=said.notebook, session_name=said.session_name)
        elif verb == "leave":
            kernels.leave(kernel_id, owner_pid=self.peer()[0], soon=body.get("soon") is True)
        else:
            server = body.get("server")
            server = None if server is None else _text(server, "server")
            kernels.adopt(kernel_id, server=server, owner_pid=self.peer()[0])
        self.answer(kernels.get(kernel_id).describe())


class EventsHandler(Handler):
    """Changes as server-sent events: `hello` with the present first."""

    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-cache")
        service = self.keeper.service
        changes = service.subscribe()
        try:
            await self.unless_gone(self._tell(service, changes))
        except StreamClosedError:  # the reader has gone
            return
        finally:
            changes.close()

    async def _tell(self, service: SandboxService, changes: Subscription) -> None:
        present = {
            "sandboxes": [info.to_json() for info in own_sandboxes(self.principal, service.infos())],
            "templates": [one.to_json() for one in await service.templates()] if self.principal is None else [],
        }
        await self._send("hello", present)
        while not changes.ended:
            change = await changes.next(timeout=EVENT_KEEPALIVE_S)
            if change is not None and not self._is_told(change):
                continue
            if change is not None:
                await self._send("sandbox" if isinstance(change, SandboxInfo) else "template", change.to_json())
            elif not changes.ended:
                self.write(": still here\n\n")
                await self.flush()

    def _is_told(self, change: Change) -> bool:
        return self.principal is None or getattr(change, "principal", None) == self.principal.name

    async def _send(self, name: str, data: Any) -> None:
        self.write(f"event: {name}\ndata: {json.dumps(data)}\n\n")
        await self.flush()


class UnknownHandler(Handler):
    """Whatever is not of this API."""

    def prepare(self) -> None:
        raise web.HTTPError(404, f"there is nothing at {self.request.path}")


def _object(body: dict[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{name} must be an object", hint=f'Send {{"{name}": {{…}}}}.')
    return value


def _parsed(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _number(value: Any, name: str, *, least: float = 0.0, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a number, not {value!r}", hint=f"Give {name}.")
    if not least <= value <= most:
        raise InvalidRequestError(f"{name} is {value:g}", hint=f"Give a number from {least:g} to {most:g}.")
    return float(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"{name} must be text, not {value!r}", hint=f"Give {name}.")
    return value
