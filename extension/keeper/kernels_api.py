"""`/kernels`: those of notebooks, for the server that has them."""

import dataclasses
from typing import Any

from warmcell.extension.keeper.handler import Handler, number, parsed, text
from warmcell.extension.keeper.kernel import KernelRequest
from warmcell.extension.keeper.ledger import SessionNote
from warmcell.sandbox.wire import Wire

LONGEST_WAIT_S = 300.0
SIGNAL_MAX = 64


def routes() -> list[Any]:
    """On the keeper's own socket only."""
    return [
        (r"/kernels", KernelsHandler),
        (r"/kernels/([^/]+)", KernelHandler),
        (r"/kernels/([^/]+)/(signal|end|adopt|leave|sessions)", KernelVerbHandler),
    ]


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
            timeout = number(parsed(wait), "wait", most=LONGEST_WAIT_S)
            await self.unless_gone(kernels.wait(kernel_id, timeout=timeout))
        unowned = self.get_query_argument("unowned", None)
        if unowned is not None:
            timeout = number(parsed(unowned), "unowned", most=LONGEST_WAIT_S)
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
            await kernels.signal(kernel_id, int(number(body.get("signum"), "signum", least=1, most=SIGNAL_MAX)))
        elif verb == "end":
            grace = number(body.get("grace_s", 0), "grace_s", most=LONGEST_WAIT_S)
            await kernels.end(kernel_id, grace=grace, restart=body.get("restart") is True)
        elif verb == "sessions":
            said = OpenSessions.from_json(body)
            kernels.set_sessions(kernel_id, said.sessions, notebook=said.notebook, session_name=said.session_name)
        elif verb == "leave":
            kernels.leave(kernel_id, owner_pid=self.peer()[0], soon=body.get("soon") is True)
        else:
            server = body.get("server")
            server = None if server is None else text(server, "server")
            kernels.adopt(kernel_id, server=server, owner_pid=self.peer()[0])
        self.answer(kernels.get(kernel_id).describe())
