"""Which backend a sandbox gets whose spec names none, and why.

Notebooks are shown what this machine has and keep what they have: what they get depends on their kernelspec, the images
and the configuration, never on which tools are installed. Agents ask for a sandbox each time anew, so theirs may
depend on what works here.
"""

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.models import SandboxInfo, SandboxSpec
from warmcell.sandbox.reports import BackendReport

AUTO = "auto"
USUAL = "bubblewrap"
"""For whoever has no reason for another: it needs no daemon, no root and no image."""

FOR_AGENTS = "gvisor"
"""For code that nobody has read."""

AGENT = "client"
"""Who asks for sandboxes through the SDK or the API: `SandboxInfo.owner`."""

TRY_AGAIN_S = 30.0
"""A backend that was not ready may have been installed, or repaired, since."""


class Images(Protocol):
    """Images that were built here; `sandbox.images.cache.ImageCache` is the real one."""

    async def resolve(self, spec: SandboxSpec, backend: str) -> SandboxSpec: ...
    def backend_of(self, ref: str, *, default: str, among: Sequence[str]) -> str: ...


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and a reason that completes "it was chosen, since …"; none where the spec names it."""

    backend: str
    why: str = ""


class Choosing:
    """Chooses for the sandboxes of one keeper."""

    def __init__(
        self, backends: Mapping[str, SandboxBackend], *, configured: str = AUTO, among: Sequence[str] = ()
    ) -> None:
        """Begin without images.

        Args:
            backends: All that are wired, by name.
            configured: What the operator says; `auto` leaves it to us.
            among: Those that may be used.
        """
        self._backends = backends
        self._configured = configured
        self._among = among
        self._reports: dict[str, tuple[float, asyncio.Future[BackendReport]]] = {}
        self.images: Images | None = None
        """Looks up what specs call an image. None: backends are given the name as it is."""

    @property
    def usual(self) -> str:
        """For notebooks that name neither backend nor image."""
        return USUAL if self._configured == AUTO else self._configured

    def for_notebook(self, spec: SandboxSpec) -> Choice:
        """What a notebook's kernel of that spec gets."""
        return self._of(spec, default=self.usual, why="c.Warmcell.backend says so" if self._is_configured else "")

    async def for_owner(self, spec: SandboxSpec, owner: str) -> Choice:
        """What whoever asks gets; whether gVisor serves is tried, but for agents only."""
        if owner != AGENT or spec.backend != AUTO or self._is_configured or FOR_AGENTS not in self._backends:
            return self.for_notebook(spec)
        lacks = await self._lacks(spec)
        if not lacks:
            return self._of(spec, default=FOR_AGENTS, why="nobody has read what an agent runs")
        return self._of(spec, default=self.usual, why=f"{FOR_AGENTS}, which agents get, does not serve: {lacks}")

    @property
    def _is_configured(self) -> bool:
        return self._configured != AUTO

    def _of(self, spec: SandboxSpec, *, default: str, why: str) -> Choice:
        if spec.backend != AUTO:
            return Choice(spec.backend)
        if spec.image is None or self.images is None:
            return Choice(default, why or "no image is asked for")
        backend = self.images.backend_of(spec.image, default=default, among=self._among)
        if backend == default:
            return Choice(default, why or f"it can have the image {spec.image}")
        return Choice(backend, f"{default} has no image {spec.image}")

    async def _lacks(self, spec: SandboxSpec) -> str:
        """Why gVisor does not serve an agent's sandbox; empty if it does."""
        backend = self._backends[FOR_AGENTS]
        can = backend.capabilities
        if FOR_AGENTS not in self._among:
            return "it may not be used here"
        if spec.network not in can.networks:
            return f"it has no network {spec.network!r}"
        if spec.gpu is not None and not can.gpus:
            return "it has no GPUs"
        report = await self._report(backend)
        if report.ready and spec.gpu is not None and report.no_gpus:
            return f"it has no GPUs here: {report.no_gpus}"
        return "" if report.ready else report.why_not

    async def _report(self, backend: SandboxBackend) -> BackendReport:
        """Tried once, and again after a while if it did not work."""
        tried = self._reports.get(backend.name)
        if tried is not None and tried[1].done() and time.monotonic() - tried[0] > TRY_AGAIN_S:
            tried = tried if tried[1].result().ready else None
        if tried is None:
            tried = self._reports[backend.name] = (time.monotonic(), asyncio.ensure_future(backend.probe()))
        return await asyncio.shield(tried[1])

    def know(self, report: BackendReport) -> None:
        """Take a report that somebody has from just now, instead of trying it."""
        known = asyncio.get_running_loop().create_future()
        known.set_result(report)
        self._reports[report.name] = (time.monotonic(), known)

    async def close(self) -> None:
        """Wait for what is being tried: it takes down what it has made."""
        await asyncio.gather(*(task for _, task in self._reports.values()), return_exceptions=True)


def explain(error: BackendUnavailableError, info: SandboxInfo) -> BackendUnavailableError:
    """The error of a backend that is missing, with why it was wanted where nobody named it."""
    if not info.backend_why:
        return error
    return BackendUnavailableError(
        f"{error.message.rstrip('.')}. {info.backend} was chosen, since {info.backend_why}",
        hint=error.hint,
        details={**error.details, "backend": info.backend, "backend_why": info.backend_why},
    )


def chosen(spec: SandboxSpec, choice: Choice) -> SandboxSpec:
    """The spec with its backend, which it keeps for as long as it lives, whatever is configured or installed later."""
    return dataclasses.replace(spec, backend=choice.backend)
