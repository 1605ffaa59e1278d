"""URLs that need no token: of a file of a sandbox, and of a web port of it; and the way to such a port."""

import asyncio
import contextlib
from typing import Any
from urllib.parse import urlencode

from tornado.iostream import IOStream, StreamClosedError

from warmcell.extension.keeper.agents import checks
from warmcell.extension.keeper.agents.agents import Agents
from warmcell.extension.keeper.agents.files_api import checked_path
from warmcell.extension.keeper.gate import PREFIX
from warmcell.extension.keeper.http import JsonHandler
from warmcell.extension.keeper.tickets import ARGUMENT, USUAL_S, Tickets
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError, UnauthenticatedError
from warmcell.sandbox.models import SandboxId

BOX = r"/sandboxes/([a-z0-9]+)"
PORTS = "/warmcell/ports"
"""Below which a server shows web ports."""

PROTOCOL = "warmcell-port"
"""What a connection becomes that leads to a port."""

PORT_MAX = 65535
PIECE_BYTES = 2**16
METHODS = {"read": "GET", "write": "PUT"}

HOST_HEADER, TLS_HEADER = "Warmcell-Port-Host", "Warmcell-Port-Tls"
"""Of the answer that a port's connection begins with: what it sees as its host, and that it is spoken to with TLS."""


def routes() -> list[tuple[str, type[JsonHandler]]]:
    """Paths below the API's prefix."""
    return [
        (rf"{BOX}/files/url", FileUrlHandler),
        (rf"{BOX}/ports/([0-9]{{1,5}})", PortHandler),
        (rf"{BOX}/ports/([0-9]{{1,5}})/tunnel", TunnelHandler),
    ]


class _Handler(JsonHandler):
    @property
    def agents(self) -> Agents:
        agents: Agents = self.settings["keeper"].agents
        return agents

    @property
    def tickets(self) -> Tickets:
        tickets: Tickets = self.settings["keeper"].tickets
        return tickets

    def asked(self, *names: str) -> dict[str, Any]:
        """The body, which has no other fields than these."""
        body = self.body()
        for name in body:
            if name not in names:
                raise InvalidRequestError(f"{name!r} is not known here", hint=f"Send {', '.join(names)}.")
        return body


class FileUrlHandler(_Handler):
    """A URL that reads or writes one file, or one directory as a tar."""

    def post(self, sandbox_id: str) -> None:
        body = self.asked("path", "operation", "tree", "expires_in_s")
        operation = checks.text(body, "operation", "read")
        if operation not in METHODS:
            raise InvalidRequestError("`operation` is read or write", hint="Leave it out to read.")
        self.agents.of(SandboxId(sandbox_id))
        file = checked_path(body.get("path"))
        try:
            file.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError("`path` cannot be in a URL", hint="Give the file a name of UTF-8.") from None
        path = f"/sandboxes/{sandbox_id}/files" + ("/tree" if checks.flag(body, "tree") else "")
        ticket, said = self.tickets.make(
            self.principal,
            METHODS[operation],
            path,
            file=file,
            expires_in_s=checks.seconds(body, "expires_in_s", USUAL_S) or USUAL_S,
        )
        query = urlencode({"path": file, ARGUMENT: ticket})
        self.answer({"method": said.method, "path": f"{PREFIX}{path}?{query}", "expires_at": said.expires_at})


class PortHandler(_Handler):
    """A URL that shows what listens on a port of a sandbox's loopback interface."""

    def post(self, sandbox_id: str, number: str) -> None:
        body, port = self.asked("expires_in_s"), _port(number)
        self.agents.live(SandboxId(sandbox_id))
        ticket, said = self.tickets.make(
            self.principal,
            "GET",
            f"/sandboxes/{sandbox_id}/ports/{port}/tunnel",
            expires_in_s=checks.seconds(body, "expires_in_s", USUAL_S) or USUAL_S,
        )
        domain, name = self.settings["keeper"].wiring.settings.port_domain, f"{port}-{sandbox_id}"
        self.answer(
            {
                "path": f"/?{ARGUMENT}={ticket}" if domain else f"{PORTS}/{name}/{ticket}/",
                "host": f"{name}.{domain}" if domain else None,
                "expires_at": said.expires_at,
            }
        )


class TunnelHandler(_Handler):
    """A connection that becomes one to a port of a sandbox."""

    async def get(self, sandbox_id: str, number: str) -> None:
        port = _port(number)
        if self.request.headers.get("Upgrade", "").lower() != PROTOCOL:
            raise InvalidRequestError("This leads to a port, and is no page", hint=f"Ask for `Upgrade: {PROTOCOL}`.")
        agents, box = self.agents, SandboxId(sandbox_id)
        if agents.owns(box):
            await self.unless_gone(agents.awake(box))
        async with agents.live(box).forward(port) as (reader, writer):
            stream = self.detach()
            try:
                head = ["HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", f"Upgrade: {PROTOCOL}"]
                terms = agents.live(box).info.terms
                if terms is not None and terms.port_host:
                    head.append(f"{HOST_HEADER}: {terms.port_host.replace('${PORT}', str(port))}")
                if terms is not None and port in terms.tls_ports:
                    head.append(f"{TLS_HEADER}: 1")
                await stream.write("\r\n".join([*head, "", ""]).encode())
                await self.unless_gone(_join(stream, reader, writer))
            except (StreamClosedError, ConnectionError, UnauthenticatedError):
                pass  # There is nobody to tell but by its end.
            finally:
                self.settled()
                stream.close()


async def _join(stream: IOStream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until either end is closed."""

    async def there() -> None:
        while True:
            writer.write(await stream.read_bytes(PIECE_BYTES, partial=True))
            await writer.drain()

    async def back() -> None:
        while piece := await reader.read(PIECE_BYTES):
            await stream.write(piece)

    ways = [asyncio.create_task(there()), asyncio.create_task(back())]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        with contextlib.suppress(StreamClosedError, ConnectionError):
            await asyncio.gather(*ways, return_exceptions=True)


def _port(number: str) -> int:
    if not 0 < int(number) <= PORT_MAX:
        raise NotFoundError(f"There is no port {number}", hint=f"Ports are 1 to {PORT_MAX}.")
    return int(number)
