"""`/events`: what changes, as it does."""

import json
from typing import Any

from tornado.iostream import StreamClosedError

from warmcell.extension.keeper.gate import own_sandboxes
from warmcell.extension.keeper.handler import Handler
from warmcell.sandbox.changes import Change, Subscription
from warmcell.sandbox.errors import UnauthenticatedError
from warmcell.sandbox.models import SandboxInfo
from warmcell.sandbox.service import SandboxService

EVENT_KEEPALIVE_S = 15.0
"""A comment this often shows both sides of an event stream that the other is there."""


class EventsHandler(Handler):
    """Changes as server-sent events: `hello` with the present first."""

    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-cache")
        service = self.keeper.service
        changes = service.subscribe()
        try:
            await self.unless_gone(self._tell(service, changes))
        except UnauthenticatedError as error:
            await self._send("refused", error.to_json())
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
