"""Keeps account of what each sandbox uses, and answers `GET /usage`."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, get_args

from warmcell.extension.keeper.http import JsonHandler
from warmcell.extension.keeper.kernels import Kernels
from warmcell.sandbox.errors import InvalidRequestError, WarmcellError
from warmcell.sandbox.gpus.requests import parse, weight
from warmcell.sandbox.lifecycle import TERMINAL, State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxInfo
from warmcell.sandbox.readings import Reading, read
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.usage import DAY_S, Account, By, Usage, UsageRow, UsageStore, total

log = logging.getLogger(__name__)

SAMPLE_S = 10.0
"""How often processors and memory are read, where that takes little. What GPUs a sandbox has is taken up as it
changes."""

SAMPLING_SHARE = 0.01
"""Of the time, at most, goes into reading: a thousand sandboxes are read less often."""

WRITE_S = 30.0
UNWRITTEN_MAX = 10_000
"""Sandboxes whose sums are kept while they cannot be written."""

MOST_DAYS = 400


class Meter:
    """Follows the sandboxes of a service."""

    def __init__(
        self, service: SandboxService, kernels: Kernels, store: UsageStore, *, busy: Callable[[SandboxId], bool]
    ) -> None:
        """Args: busy: Whether something runs in a sandbox that no Jupyter client has asked for."""
        self._service = service
        self._kernels = kernels
        self._store = store
        self._busy = busy
        self._accounts: dict[SandboxId, Account] = {}
        self._unwritten: dict[SandboxId, UsageRow] = {}
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Follow them, for ever. At the end what is known is written."""
        changes = self._service.subscribe(backlog=None)
        sample = write = time.monotonic()
        try:
            while not changes.ended:
                now = time.monotonic()
                if now >= sample:
                    await self._sample()
                    sample = now + max(SAMPLE_S, (time.monotonic() - now) / SAMPLING_SHARE)
                if now >= write:
                    await self._write()
                    write = now + WRITE_S
                change = await changes.next(timeout=max(0.0, min(sample, write) - time.monotonic()))
                if isinstance(change, SandboxInfo):
                    self._advance(change)
        finally:
            changes.close()
            for info in self._service.infos():
                self._advance(info)
            await asyncio.shield(asyncio.create_task(self._write()))

    async def rows(self, *, by: By, days: int | None) -> list[UsageRow]:
        """What has been used until now; raises as `UsageStore.rows`."""
        for info in self._service.infos():
            self._advance(info)
        await self._write()
        return await asyncio.to_thread(self._store.rows, by=by, days=days)

    async def _sample(self) -> None:
        for info in self._service.infos():
            if info.state is State.RUNNING:
                try:
                    box = self._service.live(info.id)
                    self._advance(info, await asyncio.to_thread(_reading, box))
                except WarmcellError:  # It has ended meanwhile.
                    continue

    def _advance(self, info: SandboxInfo, reading: Reading | None = None) -> None:
        now = time.monotonic()
        account = self._accounts.get(info.id)
        if account is None:
            if info.state in TERMINAL:
                return
            account = self._accounts[info.id] = Account(at=now, asked_gpus=_asked(info))
        used = account.advance(
            now,
            idle_s=self._idle_s(info),
            gpus=0.0 if info.state in TERMINAL else sum(1 / gpu.parts for gpu in info.gpus),
            suspended=info.state is State.SUSPENDED,
            parked=info.parked is not None,
            up=info.state in (State.RUNNING, State.SUSPENDING),
            cpu_s=None if reading is None else reading.cpu_s,
            memory_bytes=None if reading is None else reading.memory_bytes,
        )
        if info.state in TERMINAL:
            del self._accounts[info.id]
        before = self._unwritten.get(info.id)
        usage = used if before is None else before.usage + used
        if usage != Usage():
            self._unwritten[info.id] = UsageRow(
                owner=info.owner, notebook=info.notebook, sandbox_id=info.id, usage=usage
            )

    def _idle_s(self, info: SandboxInfo) -> float:
        if self._busy(info.id):
            return 0.0
        kernel = self._kernels.of(info.id)
        return kernel.proxy.idle_s if kernel is not None and kernel.started else SAMPLE_S

    async def _write(self) -> None:
        async with self._writing:
            rows, self._unwritten = self._unwritten, {}
            try:
                await asyncio.to_thread(self._store.add, list(rows.values()), at=time.time())
            except WarmcellError as error:
                log.error("%s", error)
                self._take_back(rows)

    def _take_back(self, rows: Mapping[SandboxId, UsageRow]) -> None:
        """They could not be written: the next attempt has them, too, as far as they are not too many."""
        for sandbox_id, row in rows.items():
            since = self._unwritten.get(sandbox_id)
            if since is not None:
                self._unwritten[sandbox_id] = dataclasses.replace(since, usage=row.usage + since.usage)
            elif len(self._unwritten) < UNWRITTEN_MAX:
                self._unwritten[sandbox_id] = row


def _reading(box: LiveSandbox) -> Reading:
    return read(box.processes)


def _asked(info: SandboxInfo) -> float:
    """GPUs that it asks for; none where that is no request, so that it is about to fail."""
    if info.gpu is None:
        return 0.0
    try:
        return weight(parse(info.gpu).alternatives[0])
    except WarmcellError:
        return 0.0


class UsageHandler(JsonHandler):
    """What was used."""

    async def get(self) -> None:
        kind, asked = self.get_query_argument("by", "notebook"), self.get_query_argument("days", "30")
        by: By | None = next((known for known in get_args(By) if known == kind), None)
        if by is None:
            raise InvalidRequestError(f"by={kind!r}", hint=f"Use one of {', '.join(get_args(By))}.")
        if not asked.isdecimal() or int(asked) > MOST_DAYS:
            raise InvalidRequestError(f"days={asked!r}", hint=f"Give 1 to {MOST_DAYS} days, or 0 for all.")
        days = int(asked) or None
        meter: Meter = self.settings["meter"]
        rows = await self.unless_gone(meter.rows(by=by, days=days))
        self.answer(answer(rows, by=by, days=days))


def answer(rows: list[UsageRow], *, by: str, days: int | None) -> Mapping[str, Any]:
    """The body of `GET /usage`."""
    since = 0.0 if days is None else (time.time() // DAY_S - days + 1) * DAY_S
    return {
        "since": since,
        "by": by,
        "total": total(rows).to_json(),
        "rows": [row.to_json() for row in rows],
    }
