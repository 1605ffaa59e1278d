"""The keeper's REST, `/warmcell/api/v1` (docs/explanation/keeper-api.md). Handlers translate, no more."""

import dataclasses
import os
from typing import Any

from tornado import web

from warmcell.extension import machine
from warmcell.extension.keeper import (
    images_api,
    kernels_api,
    meters_api,
    principals_api,
    sandboxes_api,
    self_api,
    snapshots_api,
)
from warmcell.extension.keeper.agents import api as agents_api
from warmcell.extension.keeper.agents import urls_api
from warmcell.extension.keeper.agents.agents import Agents
from warmcell.extension.keeper.events_api import EventsHandler
from warmcell.extension.keeper.gate import Gate
from warmcell.extension.keeper.handler import Handler
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.extension.keeper.memory_api import MemoryHandler
from warmcell.extension.keeper.owners import OwnerWatch
from warmcell.extension.keeper.principals import Principals
from warmcell.extension.keeper.quotas import PrincipalQuotas
from warmcell.extension.keeper.run_handler import RunHandler
from warmcell.extension.keeper.runs import Runs
from warmcell.extension.keeper.scope import GuestScope
from warmcell.extension.keeper.tickets import Tickets
from warmcell.extension.keeper.usage import Meter, UsageHandler
from warmcell.extension.keeper.values_handler import ValuesHandler
from warmcell.extension.keeper.wiring import Wiring
from warmcell.extension.keeper.wishes import Wishes
from warmcell.sandbox.images.cache import ImageCache
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.service import SandboxService

PREFIX = "/warmcell/api/v1"


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
                (r"/events", EventsHandler),
                *sandboxes_api.routes(),
                *snapshots_api.routes(),
                *images_api.routes(),
                *principals_api.routes(),
                *meters_api.routes(),
                (r"/usage", UsageHandler),
                (r"/sandboxes/([a-z0-9]+)/(suspend|resume|snapshot|restore|fork|park|wake|gpu)", MemoryHandler),
                *agents_api.routes(),
                *urls_api.routes(),
                *kernels_api.routes(),
            ],
            scope=None,
            gate=Gate(self.principals, self.quotas, self.service, self.tickets),
            principals=principals_api.PrincipalsApi(self.principals, self.quotas),
        )

    def guest_application(self, scope: GuestScope) -> web.Application:
        """The few verbs that code in a sandbox has, within what that sandbox was given."""
        notebooks = self.service.info(scope.sandbox_id).kernel_id is not None
        return self._application(self_api.routes() if notebooks else self_api.routes_for_ranks(), scope=scope)

    def _application(self, routes: list[Any], scope: GuestScope | None, **settings: Any) -> web.Application:
        routes = [
            *routes,
            *sandboxes_api.routes_for_guests(),
            (r"/sandboxes/([a-z0-9]+)/run", RunHandler),
            (r"/sandboxes/([a-z0-9]+)/values/([0-9]{1,9})", ValuesHandler),
        ]
        return web.Application(
            [(PREFIX + path, handler) for path, handler in routes],
            default_handler_class=UnknownHandler,
            log_function=lambda handler: None,
            keeper=self,
            snapshots=snapshots_api.SnapshotsApi(
                store=self.service.memory.store,
                images=self.wiring.images,
                compressor=self.wiring.compressor(self.service),
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
        await self.runs.forget(sandbox_id)

    async def forget(self, sandbox_id: SandboxId) -> None:
        """Let go of what hangs on a sandbox that has ended, however that came. Idempotent."""
        owner = self.owners.pop(sandbox_id, None)
        if owner is not None:
            owner.close()
        await self.runs.forget(sandbox_id)
        await self.agents.forget(sandbox_id)


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


class UnknownHandler(Handler):
    """Whatever is not of this API."""

    def prepare(self) -> None:
        raise web.HTTPError(404, f"there is nothing at {self.request.path}")
