"""REST for the page: what can be done with a kernel's memory, and clones that become kernels of this server."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jupyter_server.auth.decorator import authorized
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado import web

from warmcell.extension.server.base import WarmcellHandler
from warmcell.kernel_provisioner.adopt import adopt
from warmcell.sandbox.backends.threads import to_its_end
from warmcell.sandbox.errors import NotFoundError, UnsupportedOperationError


class MemoryHandler(WarmcellHandler):
    """Suspend, resume, snapshot or restore a sandbox's kernel. It goes on although the page goes away."""

    @web.authenticated
    @authorized
    async def post(self, sandbox_id: str, verb: str) -> None:
        done = await self.link.do("post", f"/sandboxes/{sandbox_id}/{verb}", self.body())
        self.finish(json.dumps(done))


class ListingHandler(WarmcellHandler):
    """Whoever has a kernel of the keeper's listed by this server, under its id: `GET /api/kernels`, sessions."""

    async def enlist(self, kernel_ids: Sequence[str]) -> None:
        """Have this server manage kernels that are the keeper's alone; those that it has already are left alone.

        Raises:
            WarmcellError: One cannot be had. Those before it are this server's.
        """
        kernels = self.kernel_manager
        if not isinstance(kernels, AsyncMappingKernelManager):
            raise UnsupportedOperationError(
                "This Jupyter server's kernels are managed elsewhere",
                hint="Use the server's own kernel manager, without a gateway.",
            )
        for kernel_id in kernel_ids:
            if kernel_id not in kernels:
                await adopt(kernels, await self.link.get(f"/kernels/{kernel_id}"))


class ForkHandler(ListingHandler):
    """Clone a sandbox's kernel. Of a kernel of this server the clones are kernels of this server."""

    @web.authenticated
    @authorized
    async def post(self, sandbox_id: str) -> None:
        done = await self.link.do("post", f"/sandboxes/{sandbox_id}/fork", self.body())
        source = await self.link.get(f"/sandboxes/{sandbox_id}")
        if source["kernel_id"] in cast(Any, self.kernel_manager):
            try:
                await self.enlist([clone["kernel_id"] for clone in done["sandboxes"]])
            except BaseException:
                await to_its_end(self._undo(done["sandboxes"]))
                raise
        self.set_status(201)
        self.finish(json.dumps(done))

    async def _undo(self, clones: Sequence[Mapping[str, Any]]) -> None:
        """None of these is to stay, those neither that are kernels of this server already."""
        kernels = cast(Any, self.kernel_manager)
        for clone in clones:
            try:
                if clone["kernel_id"] in kernels:
                    await kernels.shutdown_kernel(clone["kernel_id"], now=True)
                with contextlib.suppress(NotFoundError):
                    await self.link.delete(f"/sandboxes/{clone['id']}")
            except Exception:
                self.log.exception("Warmcell: clone %s is left of a fork that failed", clone["id"])


class OpenHandler(ListingHandler):
    """Have a kernel that is the keeper's alone, such as a clone that a cell has made, listed by this server."""

    @web.authenticated
    @authorized
    async def post(self, sandbox_id: str) -> None:
        info = await self.link.get(f"/sandboxes/{sandbox_id}")
        if info["kernel_id"] is None:
            raise UnsupportedOperationError("It has no kernel", hint="Open a notebook's sandbox, or a clone of one.")
        await self.enlist([info["kernel_id"]])
        self.finish(json.dumps(info))
