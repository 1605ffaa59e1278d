"""Ports of sandboxes at hosts of their own, `<port>-<sandbox>.<domain>`: for E2B's clients, and for browsers."""

from typing import TYPE_CHECKING, Final

from warmcell.extension.keeper import tickets
from warmcell.extension.server.e2b import gateway, shapes
from warmcell.extension.server.e2b.keys import Holder
from warmcell.extension.server.ports.headers import Place, may_cross
from warmcell.extension.server.ports.passing import pass_on
from warmcell.sandbox.errors import ForbiddenError, NotFoundError, UnauthenticatedError

if TYPE_CHECKING:
    from warmcell.extension.server.e2b.handler import E2bHandler

COOKIE: Final = "warmcell-port"


async def serve(request: "E2bHandler") -> None:
    """What listens there answers; a browser that comes with a ticket has it as a cookie from then on."""
    visitor = await gateway.visitor(request)
    place = Place(
        port=request.port,
        scheme=str(request.request.protocol),
        host=request.request.host,
        authorized=visitor is not None,
    )
    ticket = request.argument(tickets.ARGUMENT)
    if ticket is not None and request.request.method == "GET" and request.by_host:
        name, secure = _cookie(place)
        request.set_cookie(name, ticket, path="/", httponly=True, samesite="Lax", secure=secure)
        request.set_header("Referrer-Policy", "no-referrer")
        await request.body_stream.drain()
        request.redirect(request.request.path)  # so that neither the page nor the history has it
        return
    proof = visitor if visitor is not None else await _anybody(request)
    if proof is None:
        proof = _proof(request, place, ticket)
    await pass_on(
        request,
        place,
        request.sandbox_id,
        request.target,
        proof=proof,
        secrets=(str(request.identity_provider.token),),
    )


async def _anybody(request: "E2bHandler") -> dict[str, str] | None:
    """What tells the keeper who asks, of a port that is everybody's: whose the sandbox is. None: it is not.

    Whoever has the sandbox may write its tags, so the operator's word is asked for anew.
    """
    if not request.settings.get("warmcell_e2b_public_ports"):
        return None
    try:
        info = await request.link.get(f"/sandboxes/{request.sandbox_id}")
    except NotFoundError:
        return None
    return Holder(info["principal"]).headers() if shapes.is_public(info) else None


def _proof(request: "E2bHandler", place: Place, ticket: str | None) -> dict[str, str]:
    """What tells the keeper who asks.

    Raises:
        UnauthenticatedError: Nobody is known to.
        ForbiddenError: Another page asks than the port's own.
    """
    headers = request.request.headers
    token = headers.get("X-Access-Token") or headers.get("E2b-Traffic-Access-Token")
    if token is not None:
        return request.keys.whose(token, request.sandbox_id, "envd", "traffic").headers()
    if ticket is None and request.by_host:
        ticket = request.get_cookie(_cookie(place)[0])
        if ticket is not None and not may_cross(headers, place):
            raise ForbiddenError("A page of another origin may not use this port", hint="Open it in a tab of its own.")
    if ticket is None:
        raise UnauthenticatedError(
            "Nobody is known to ask for this port",
            hint="Open the URL that Sandbox.forward() gives, or send E2b-Traffic-Access-Token.",
        )
    return {tickets.HEADER: ticket.encode("ascii", "replace").decode()}


def _cookie(place: Place) -> tuple[str, bool]:
    """Its name, and whether it is for TLS alone: with that prefix no other host can set it."""
    secure = place.scheme == "https"
    return (f"__Host-{COOKIE}" if secure else COOKIE), secure
