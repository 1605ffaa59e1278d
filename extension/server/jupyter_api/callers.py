"""Who asks for kernels, and which kernels exist for whom."""

from typing import Any

from jupyter_server.auth.identity import User
from jupyter_server.utils import url_path_join
from tornado import web

from warmcell.extension.keeper.principals import TOKEN_PREFIX, bearer
from warmcell.extension.server.base import AUTH_RESOURCE, WarmcellHandler
from warmcell.extension.server.e2b.keeper import Keeper
from warmcell.sandbox.errors import NotFoundError
from warmcell.sandbox.lifecycle import TERMINAL

PREFIX = "/warmcell/jupyter"
SPEC = "warmcell"


class KernelsApiHandler(WarmcellHandler):
    """Of a principal with a token of Warmcell's own, in a header or as Jupyter's `?token=`; else of Jupyter's user."""

    keeper: Keeper
    principal_asks = False

    async def prepare(self) -> None:  # type: ignore[override] # as jupyter_server's own
        """The keeper looks at a principal's token; Jupyter at everybody else."""
        token = bearer(self.request.headers) or self.get_query_argument("token", "")
        if token.startswith(TOKEN_PREFIX):
            self.principal_asks = True
            self.current_user = self._jupyter_current_user = User(username="a principal of Warmcell")
            self.keeper = Keeper(self.link, {"Authorization": f"Bearer {token}"})
            self.set_cors_headers()
            return
        await super().prepare()
        if self.current_user is None:
            raise web.HTTPError(403)
        looks = self.request.method == "GET" and "Upgrade" not in self.request.headers
        action = "read" if looks else "write"
        allowed: Any = self.authorizer.is_authorized(self, self.current_user, action, AUTH_RESOURCE)
        if not (await allowed if hasattr(allowed, "__await__") else allowed):
            raise web.HTTPError(403)
        self.keeper = Keeper(self.link, {})

    async def sandboxes(self) -> list[dict[str, Any]]:
        """Those that have a kernel and are whoever asks' own: the user's are not those of principals."""
        found = (await self.keeper.ask("GET", "/sandboxes"))["sandboxes"]
        return [
            one
            for one in found
            if one["kernel_id"] is not None
            and one["terms"] is not None
            and one["state"] not in [state.value for state in TERMINAL]
            and (self.principal_asks or one["principal"] is None)
        ]

    async def sandbox(self, kernel_id: str) -> dict[str, Any]:
        """The one with that kernel.

        Raises:
            NotFoundError: There is none for whoever asks.
        """
        for one in await self.sandboxes():
            if one["kernel_id"] == kernel_id:
                return one
        raise NotFoundError(f"There is no kernel {kernel_id}", hint="List your own with GET …/api/kernels.")

    async def kernel(self, kernel_id: str) -> dict[str, Any]:
        """What the keeper knows of a kernel, its connection included, once it was seen to be whoever asks' own."""
        await self.sandbox(kernel_id)
        found: dict[str, Any] = await self.link.get(f"/kernels/{kernel_id}")
        return found


def path(below: str) -> str:
    """A pattern of this API."""
    return url_path_join(PREFIX, "/api", below)
