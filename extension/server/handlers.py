"""REST for the page, `/warmcell/api/v1`: every verb authenticated and authorised by Jupyter, then forwarded."""

import asyncio
import json
from typing import Any, cast
from urllib.parse import urlencode

from jupyter_server.auth.decorator import authorized
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.iostream import StreamClosedError

from warmcell import __version__
from warmcell.extension.server import forward
from warmcell.extension.server.base import WarmcellHandler
from warmcell.extension.server.memory import ForkHandler, MemoryHandler, OpenHandler
from warmcell.extension.server.snapshots import (
    ExportHandler,
    ImportHandler,
    SnapshotHandler,
    SnapshotsHandler,
    VerifyHandler,
)
from warmcell.kernel_provisioner.wishes import Wishes
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError, TransportError

PREFIX = "/warmcell/api/v1"
SETTINGS = ("gpu", "memory", "network", "template", "preload", "limits")
"""What a page may choose for a notebook; anything else of a spec is the kernelspec's."""


class ReadHandler(WarmcellHandler):
    """What the keeper knows: gpus, meters, templates, doctor."""

    @web.authenticated
    @authorized
    async def get(self, noun: str) -> None:
        self.finish(json.dumps(await self.link.get(f"/{noun}")))


class UsageHandler(WarmcellHandler):
    """What was used: `?by=notebook|owner|sandbox&days=30`."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        names: list[str] = ["by", "days"]
        asked = {name: self.get_query_argument(name) for name in names if name in self.request.arguments}
        self.finish(json.dumps(await self.link.get(f"/usage?{urlencode(asked)}")))


class CheckHandler(WarmcellHandler):
    """Would a notebook with these settings start? Makes nothing."""

    @web.authenticated
    @authorized
    async def post(self) -> None:
        self.finish(json.dumps(await self.link.post("/check", self.body())))


class SandboxHandler(WarmcellHandler):
    """One sandbox."""

    @web.authenticated
    @authorized
    async def get(self, sandbox_id: str) -> None:
        self.finish(json.dumps(await self.link.get(f"/sandboxes/{sandbox_id}")))

    @web.authenticated
    @authorized
    async def patch(self, sandbox_id: str) -> None:
        """Change for how long it is kept, or its tags."""
        self.finish(json.dumps(await self.link.do("patch", f"/sandboxes/{sandbox_id}", self.body())))

    @web.authenticated
    @authorized
    async def delete(self, sandbox_id: str) -> None:
        """A kernel of this server is shut down by Jupyter, so that it is not restarted as if it had died."""
        try:
            info = await self.link.get(f"/sandboxes/{sandbox_id}")
        except NotFoundError:
            info = {}
        kernel_id, kernels = info.get("kernel_id"), cast(Any, self.kernel_manager)
        if kernel_id is not None and kernel_id in kernels:
            await kernels.shutdown_kernel(kernel_id, now=True)
        await self.link.delete(f"/sandboxes/{sandbox_id}")
        self.set_status(204)


class QueueHandler(WarmcellHandler):
    """The place of a sandbox in the queue for a GPU."""

    @web.authenticated
    @authorized
    async def delete(self, sandbox_id: str) -> None:
        """Have it wait no longer."""
        await self.link.do("delete", f"/sandboxes/{sandbox_id}/queue")
        self.set_status(204)


class SettingsHandler(WarmcellHandler):
    """What the next start of a kernel uses; a restart applies it."""

    @web.authenticated
    @authorized
    async def put(self, kernel_id: str) -> None:
        settings = self.body()
        for name in settings:
            if name not in SETTINGS:
                raise InvalidRequestError(f"{name!r} is no setting", hint=f"Settings are {', '.join(SETTINGS)}.")
        Wishes().chosen(settings, source="The notebook's choice")
        if kernel_id not in self.kernel_manager:
            raise NotFoundError(f"There is no kernel {kernel_id}", hint="Start the notebook's kernel first.")
        provisioner: Any = self.kernel_manager.get_kernel(kernel_id).provisioner
        if not hasattr(provisioner, "settings"):
            raise InvalidRequestError(
                "This kernel is not one of Warmcell's", hint="Choose Python 3 (Warmcell) as the notebook's kernel."
            )
        provisioner.settings = settings
        self.finish(json.dumps(settings))


class EventsHandler(WarmcellHandler):
    """The keeper's changes as server-sent events."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-cache")
        self.set_header("X-Accel-Buffering", "no")
        events = self.link.events()
        self._reader = asyncio.current_task()
        try:
            async for name, data in events:
                if name == "hello":
                    data["version"] = __version__  # so that a page of another version can say so
                self.write(f"event: {name}\ndata: {json.dumps(data)}\n\n")
                await self.flush()
        except (StreamClosedError, asyncio.CancelledError):  # the reader has gone
            return
        except TransportError:
            if not self._headers_written:  # no keeper could be had: the page says why
                raise
            return  # the keeper has gone; the page asks again, which starts the next one
        finally:
            await events.aclose()

    def on_connection_close(self) -> None:
        """The reader has gone (tornado's hook): nothing may come for hours, so do not wait for the next write."""
        reader = getattr(self, "_reader", None)
        if reader is not None:
            reader.cancel()


def routes() -> list[tuple[str, type[WarmcellHandler]]]:
    """URL patterns; the extension application puts them below the base URL."""
    patterns: list[tuple[str, type[WarmcellHandler]]] = [
        (r"/(gpus|meters|templates|doctor)", ReadHandler),
        (r"/usage", UsageHandler),
        (r"/check", CheckHandler),
        (r"/events", EventsHandler),
        (r"/sandboxes/([a-z0-9]+)", SandboxHandler),
        (r"/sandboxes/([a-z0-9]+)/(suspend|resume|snapshot|restore|park|wake|gpu)", MemoryHandler),
        (r"/sandboxes/([a-z0-9]+)/queue", QueueHandler),
        (r"/sandboxes/([a-z0-9]+)/fork", ForkHandler),
        (r"/sandboxes/([a-z0-9]+)/open", OpenHandler),
        (r"/snapshots", SnapshotsHandler),
        (r"/snapshots/import", ImportHandler),
        (r"/snapshots/([^/]+)", SnapshotHandler),
        (r"/snapshots/([^/]+)/verify", VerifyHandler),
        (r"/snapshots/([^/]+)/export", ExportHandler),
        (r"/kernels/([^/]+)/settings", SettingsHandler),
    ]
    return [*forward.routes(), *((url_path_join(PREFIX, path), handler) for path, handler in patterns)]
