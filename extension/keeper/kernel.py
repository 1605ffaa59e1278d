"""One kernel as its clients know it: a proxy that stays, and a sandbox behind it that may change."""

import asyncio
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from warmcell.extension.keeper.ledger import KernelNote, SessionNote
from warmcell.extension.keeper.owners import OwnerWatch, process_name
from warmcell.kernel_provisioner.proxy import KernelProxy
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.models import SandboxId, SandboxSpec, Terms
from warmcell.sandbox.wire import Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRequest(Wire):
    """Body of `POST /kernels`."""

    kernel_id: str
    spec: SandboxSpec
    connection: Mapping[str, Any]
    cwd: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    notebook: str | None = None
    kernel_name: str = ""
    server: str | None = None
    persistent: bool = False
    terms: Terms | None = None
    """Of a sandbox that code has asked for."""
    principal: str | None = None
    contexts: Mapping[str, str] = field(default_factory=dict)
    """Of such a sandbox: id to directory of each set of variables that it has."""


@dataclass
class Kernel:
    """One kernel as its clients know it."""

    request: KernelRequest
    proxy: KernelProxy
    sandbox_id: SandboxId | None = None
    process: KernelProcess | None = None
    owner: OwnerWatch | None = None
    listens: bool = False
    """Whether its proxy's host side was bound."""
    started: bool = False
    """Whether a process of it has ever answered, or its sandbox is of use before one does."""
    ending: bool = False
    """Its process was told to end, so its end is no failure."""
    asks: str = ""
    """Token of the wish that its cell waits for, while that is done."""
    waking: bool = False
    """Something that a client wants of it has it resumed now."""
    goes_on: bool = False
    """It was saved in the middle of a cell that goes on as soon as its page is there, or before long."""
    kept_parked: bool = False
    """Somebody gave its GPU back by hand, so nothing but a cell takes one again."""
    woken_after: int | None = None
    """The last cell that it had run when somebody's typing had it go on: so it does once between two cells."""
    returned_at: float = -math.inf
    """When somebody came back to its notebook, by the monotonic clock."""
    restore_asked_by: str = ""
    """msg_id of the cell that asks to be undone, for as long as that is done."""
    sessions: tuple[SessionNote, ...] = ()
    """What its Jupyter server has open on it."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by a start and by its removal."""

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    @property
    def owned(self) -> bool:
        """Whether a process that lives has it."""
        return self.owner is not None and self.owner.alive

    def describe(self) -> dict[str, Any]:
        """A row of `GET /kernels`. It has the key, so it never leaves the keeper's socket."""
        return {
            "kernel_id": self.request.kernel_id,
            "sandbox_id": self.sandbox_id,
            "alive": self.alive,
            "exit_code": self.process.exit_code if self.process is not None else None,
            "connection": dict(self.request.connection),
            "notebook": self.request.notebook,
            "kernel_name": self.request.kernel_name,
            "server": self.request.server,
            "server_alive": self.owned,
            "server_leaving": self.owned and self.owner is not None and self.owner.leaving,
            "busy": self.proxy.busy,
            "idle_s": self.proxy.idle_s,
            "cwd": self.request.cwd,
            "session_name": self.request.env.get("JPY_SESSION_NAME"),
            "sessions": [session.to_json() for session in self.sessions],
        }

    def note(self) -> KernelNote:
        """What a keeper that comes later has to know."""
        return KernelNote(
            kernel_id=self.request.kernel_id,
            server=self.request.server,
            notebook=self.request.notebook,
            session_name=self.request.env.get("JPY_SESSION_NAME"),
            kernel_name=self.request.kernel_name,
            sessions=self.sessions,
            owner=process_name(self.owner.pid) if self.owner is not None and self.owned else "",
        )

    def call(self, *, notebook: str | None, session_name: str | None) -> None:
        """Its notebook has this path now, and its code sees that from its next start or resume on."""
        env = dict(self.request.env)
        if session_name is not None:
            env["JPY_SESSION_NAME"] = session_name
        self.request = dataclasses.replace(self.request, notebook=notebook, env=env)
