"""E2B's MCP gateway: how its clients start it, where they look for its token, and who comes to its port."""

import hmac
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from warmcell.extension.server.e2b.keys import Holder
from warmcell.extension.server.e2b.shapes import GATEWAY_TAG
from warmcell.sandbox.errors import NotFoundError
from warmcell.sandbox.guest_tree import MOUNTED_AT

if TYPE_CHECKING:
    from warmcell.extension.server.e2b.handler import E2bHandler

PORT: Final = 50005
USER: Final = "root"
"""As whom clients start it and read its token. Here it is the sandbox's one user that does."""

COMMAND: Final = "mcp-gateway"
TOKEN_VARIABLE: Final = "GATEWAY_ACCESS_TOKEN"  # noqa: S105 - its name
TOKEN_PATH: Final = "/etc/mcp-gateway/.token"  # noqa: S105 - its place
OWN_TOKEN_PATH: Final = ".mcp-gateway/token"  # noqa: S105 - its place
SHELL: Final = ("/bin/bash", "-l", "-c")
PROGRAM: Final = ("python3", f"{MOUNTED_AT}/enter.py", "mcp_gateway")


def started_by(argv: Sequence[str]) -> list[str] | None:
    """The gateway's own command line, where that is what clients start it with; else None."""
    if tuple(argv[:-1]) != SHELL or not argv[-1].startswith(f"{COMMAND} "):
        return None
    try:
        words = shlex.split(argv[-1])
    except ValueError:
        return None
    return [*PROGRAM, *words[1:]]


def token_at(path: str) -> str | None:
    """Where the token is that clients look for in a place of root's; None: another file is meant."""
    return OWN_TOKEN_PATH if path == TOKEN_PATH else None


async def note(request: "E2bHandler", env: Mapping[str, str]) -> None:
    """Have those come to the gateway's port from now on who show its token."""
    path, token = f"/sandboxes/{request.sandbox_id}", env.get(TOKEN_VARIABLE, "")
    if not token:  # The gateway says so.
        return
    noted = request.keys.gateway(request.sandbox_id, request.keeper.token_id, token)
    await request.keeper.ask("PATCH", path, {"merge_tags": {GATEWAY_TAG: noted}})


async def visitor(request: "E2bHandler") -> dict[str, str] | None:
    """What tells the keeper who asks, for who shows the gateway's token at its port; None: nobody does."""
    kind, _, shown = request.request.headers.get("Authorization", "").partition(" ")
    shown = shown.strip()
    if request.port != PORT or kind.lower() != "bearer" or not shown:
        return None
    try:
        info: Mapping[str, Any] = await request.link.get(f"/sandboxes/{request.sandbox_id}")
    except NotFoundError:
        info = {}
    noted = (info.get("terms") or {"tags": {}})["tags"].get(GATEWAY_TAG, "")
    token_id = noted.partition(":")[0]
    # Whoever has the sandbox may write its tags: only what was noted here counts.
    good = request.keys.gateway(request.sandbox_id, token_id, shown)
    return Holder(info["principal"], token_id).headers() if hmac.compare_digest(good.encode(), noted.encode()) else None
