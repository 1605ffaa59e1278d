"""`/warmcell/jupyter/api/…`: kernels as `jupyter_client`'s friends know them from a Jupyter server or a gateway."""

import json
import time
from datetime import UTC, datetime
from typing import Any

from jupyter_server import __version__ as server_version
from jupyter_server.auth.decorator import allow_unauthenticated

from warmcell.extension.server.base import WarmcellHandler
from warmcell.extension.server.jupyter_api.callers import SPEC, KernelsApiHandler, path
from warmcell.extension.server.jupyter_api.channels import ChannelsHandler, connected
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError

NAMES = (SPEC, "python3", "", None)
"""What clients call a kernel of Python."""

READY_WAIT_S = 60
KERNEL_ID = r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"


def spec() -> dict[str, Any]:
    """The one kernelspec. There is nothing to start by hand, so it has no arguments."""
    told = {
        "argv": [],
        "env": {},
        "display_name": "Python 3 (Warmcell)",
        "language": "python",
        "interrupt_mode": "message",
        "metadata": {},
    }
    return {"name": SPEC, "spec": told, "resources": {}}


class VersionHandler(WarmcellHandler):
    """What this is, for clients that look before they ask."""

    @allow_unauthenticated
    async def get(self) -> None:
        self.finish(json.dumps({"version": server_version}))


class SpecsHandler(KernelsApiHandler):
    """Kernelspecs."""

    @allow_unauthenticated
    async def get(self, name: str | None = None) -> None:
        if name is None:
            self.finish(json.dumps({"default": SPEC, "kernelspecs": {SPEC: spec()}}))
        elif name == SPEC:
            self.finish(json.dumps(spec()))
        else:
            raise NotFoundError(f"There is no kernelspec {name}", hint=f"There is {SPEC}.")


class KernelsHandler(KernelsApiHandler):
    """All kernels of whoever asks, and a new one."""

    @allow_unauthenticated
    async def get(self) -> None:
        self.finish(json.dumps([await self.model(one) for one in await self.sandboxes()]))

    @allow_unauthenticated
    async def post(self) -> None:
        """In a sandbox that has no end of its own time; `env` is its environment, `path` means nothing to it."""
        body = self.body()
        name, env = body.get("name"), body.get("env") or {}
        if name not in NAMES:
            raise InvalidRequestError(f"There is no kernelspec {name!r}", hint=f"Ask for {SPEC}.")
        if not isinstance(env, dict):
            raise InvalidRequestError("`env` must be an object of strings", hint='As in {"NAME": "value"}.')
        wanted = {"spec": {"env": env}, "terms": {"timeout_s": None, "tags": {"client": "jupyter"}}, "kernel": True}
        info = await self.keeper.ask("POST", "/sandboxes", wanted)
        model = await self.model(info)
        self.set_status(201)
        self.set_header("Location", f"{self.request.path.rstrip('/')}/{model['id']}")
        self.finish(json.dumps(model))

    async def model(self, info: dict[str, Any]) -> dict[str, Any]:
        """A kernel in Jupyter's words."""
        try:
            kernel = await self.link.get(f"/kernels/{info['kernel_id']}")
        except NotFoundError:  # it has ended meanwhile
            kernel = {"busy": False, "alive": False, "idle_s": 0.0}
        state = "busy" if kernel["busy"] else "idle" if kernel["alive"] or info["state"] == "suspended" else "dead"
        active_at = datetime.fromtimestamp(time.time() - kernel["idle_s"], UTC)
        return {
            "id": info["kernel_id"],
            "name": SPEC,
            "last_activity": active_at.isoformat().replace("+00:00", "Z"),
            "execution_state": "starting" if info["state"] == "creating" or info["generation"] == 0 else state,
            "connections": connected(self.settings)[info["kernel_id"]],
        }


class KernelHandler(KernelsHandler):
    """One kernel."""

    @allow_unauthenticated
    async def get(self, kernel_id: str) -> None:  # type: ignore[override] # of one, not of all
        self.finish(json.dumps(await self.model(await self.sandbox(kernel_id))))

    @allow_unauthenticated
    async def delete(self, kernel_id: str) -> None:
        """It goes, and its sandbox with it."""
        info = await self.sandbox(kernel_id)
        await self.keeper.ask("DELETE", f"/sandboxes/{info['id']}")
        self.set_status(204)
        self.finish()


class VerbHandler(KernelsHandler):
    """Interrupt or restart."""

    @allow_unauthenticated
    async def post(self, kernel_id: str, verb: str) -> None:  # type: ignore[override] # of one, not of all
        info = await self.sandbox(kernel_id)
        box = f"/sandboxes/{info['id']}"
        if verb == "interrupt":
            await self.keeper.ask("POST", f"{box}/interrupt", {})
            self.set_status(204)
            self.finish()
            return
        await self.keeper.ask("POST", f"{box}/connect", {})  # what sleeps has no process to end
        await self.link.do("post", f"/kernels/{kernel_id}/end", {"restart": True})
        run = await self.keeper.ask("POST", f"{box}/runs", {"code": "None"})  # its next process begins with that
        await self.keeper.ask("GET", f"{box}/runs/{run['id']}", params={"wait": str(READY_WAIT_S)})
        self.finish(json.dumps(await self.model(info)))


def routes() -> list[tuple[str, type[WarmcellHandler]]]:
    """Of both kinds of server."""
    return [
        (path("/?"), VersionHandler),
        (path("/kernelspecs"), SpecsHandler),
        (path("/kernelspecs/([^/]+)"), SpecsHandler),
        (path("/kernels"), KernelsHandler),
        (path(f"/kernels/{KERNEL_ID}"), KernelHandler),
        (path(f"/kernels/{KERNEL_ID}/(interrupt|restart)"), VerbHandler),
        (path(f"/kernels/{KERNEL_ID}/channels"), ChannelsHandler),
    ]
