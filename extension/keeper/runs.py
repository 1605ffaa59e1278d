"""Run cells in the kernels of a sandbox that has no Jupyter client: the far end of `%%remote`.

The keeper is their only client then: one kernel for each rank of a fan-out, all in one sandbox. Values travel as files
in the sandbox's run directory, pickled and unpickled inside sandboxes only: the keeper never looks into them.
"""

import asyncio
import contextlib
import logging
import time
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from tornado.iostream import IOStream

from warmcell.extension.keeper.kernel import Kernel
from warmcell.extension.keeper.rank_client import RankClient
from warmcell.extension.keeper.rank_front import RankFront
from warmcell.extension.keeper.rank_steps import Request, step_of
from warmcell.extension.keeper.ranks import MASTER_PORT, Rank, environment, free_port, share
from warmcell.extension.keeper.returning import Room
from warmcell.extension.keeper.runner import Runner, join, start
from warmcell.sandbox import errors
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxInfo
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

WAITS_S = 2.0
"""A cell that has waited so long for its sandbox's GPUs says so."""


class Runs:
    """One runner per rank of each sandbox, made with its first cell."""

    def __init__(self, service: SandboxService, *, values_bytes: int = 2**30) -> None:
        """Run cells in that service's sandboxes; at most `values_bytes` come back from one."""
        self._service = service
        self.values_bytes = values_bytes
        self._runners: dict[tuple[SandboxId, int], Runner] = {}
        self._starting: dict[tuple[SandboxId, int], asyncio.Lock] = {}
        self._ports: dict[SandboxId, int] = {}
        """Where the ranks of a sandbox meet."""
        self.clone_of: Callable[[SandboxId], Kernel | None] = lambda sandbox_id: None
        """Finds the kernel that somebody's cell has cloned itself into, in that sandbox."""
        self.sandbox_in_use: Callable[[LiveSandbox], None] = lambda box: None
        """Told of a sandbox whose rank has started."""
        self._used: dict[SandboxId, float] = {}
        """When a cell has ended in a sandbox, or it was first asked for that."""
        self._under_way: Counter[SandboxId] = Counter()
        """Cells of each, those whose kernel starts included."""
        self._room = Room()
        self._followed: dict[SandboxId, weakref.WeakSet[IOStream]] = {}

    def new_file(self, sandbox_id: SandboxId, name: str) -> Path:
        """A fresh path in the sandbox's run directory for values to or from it."""
        return self.file(sandbox_id, f"{name}-{time.monotonic_ns()}.pkl")

    def file(self, sandbox_id: SandboxId, name: str) -> Path:
        """The path of that name in the sandbox's run directory."""
        return self._service.live(sandbox_id).run_directory / name

    async def run(
        self, sandbox_id: SandboxId, request: Request, *, rank: Rank, values: Path
    ) -> AsyncGenerator[dict[str, Any]]:
        """Run one cell: a message at a time of what it shows, last `{"done": true, …}`.

        A cell that runs when the generator is closed is interrupted.

        Args:
            sandbox_id: Where.
            request: The cell, and what travels.
            rank: In which of its kernels; it is started with its first cell.
            values: A file that does not exist yet, for what is asked back.

        Raises:
            WarmcellError: The sandbox is gone, or its kernel ends.
        """
        self._service.live(sandbox_id)  # Of one that is gone nothing is counted.
        self._under_way[sandbox_id] += 1
        try:
            async for message in self._awake(sandbox_id):
                yield message
            runner = await self._runner(sandbox_id, rank)
            async with runner.lock, contextlib.aclosing(self._run(runner, request, values)) as messages:
                async for message in messages:
                    yield message
        finally:
            if sandbox_id in self._under_way:  # Else it is gone, and forgotten.
                self._under_way[sandbox_id] -= 1
                self._used[sandbox_id] = time.monotonic()

    async def park(self, sandbox_id: SandboxId) -> SandboxInfo:
        """Give back the GPUs of a sandbox in which no cell runs; its next cell takes some again.

        Raises:
            WarmcellError: As `SandboxService.park`.
        """
        box = self._service.live(sandbox_id)
        if box.frontend is None:
            box.frontend = RankFront(box, lambda: self._ranks_of(sandbox_id))
        try:
            return await self._service.park(sandbox_id, unless=lambda: self._under_way[sandbox_id] > 0)
        finally:
            if box.info.parked is None:
                box.frontend = None

    def _ranks_of(self, sandbox_id: SandboxId) -> list[tuple[Rank, RankClient]]:
        found = [runner for (one, _), runner in self._runners.items() if one == sandbox_id and runner.is_of_use]
        return [(runner.rank, runner.client) for runner in found]

    async def _awake(self, sandbox_id: SandboxId) -> AsyncGenerator[dict[str, Any]]:
        """Have one that is parked go on; where its GPUs are in use that is said."""
        box = self._service.live(sandbox_id)
        if not isinstance(box.frontend, RankFront):
            return
        resuming = asyncio.create_task(self._service.resume(sandbox_id))
        try:
            if not (await asyncio.wait({resuming}, timeout=WAITS_S))[0]:
                text = "It gave its GPU back while nothing ran here, and waits for one.\n"
                yield {"msg_type": "stream", "content": {"name": "stderr", "text": text}, "metadata": {}}
            await resuming
        finally:
            resuming.cancel()
            await asyncio.gather(resuming, return_exceptions=True)  # It may have to come to its end all the same.
        if box.info.parked is None:
            box.frontend = None

    async def _run(self, runner: Runner, request: Request, values: Path) -> AsyncGenerator[dict[str, Any]]:
        """One cell, whose turn it is."""
        began = time.perf_counter()
        status = "ok"
        if runner.instead:
            text, runner.instead = f"{runner.instead}. It was started again, without its variables.\n", ""
            yield {"msg_type": "stream", "content": {"name": "stderr", "text": text}, "metadata": {}}
        step = step_of(request, runner.box.guest_run_directory, values, self.values_bytes)
        if step is not None:
            if "dump" in step.travels:
                working = self._room.of(runner.box.info.id).run(runner.execute, step, values)
            else:
                working = runner.execute(step)
            async with contextlib.aclosing(working) as messages:
                async for message in messages:
                    if message["msg_type"] == "reply":
                        status = message["content"]["status"]
                    else:
                        yield await self._with_vram(runner, message) if message["msg_type"] == "usage" else message
        yield {
            "done": True,
            "status": status,
            "started_from": runner.process.started_from,
            "started_ms": runner.box.info.started_ms,
            "seconds": round(time.perf_counter() - began, 6),
        }

    def returned(self, sandbox_id: SandboxId, values: Path) -> None:
        """What came back has gone on, or nobody wants it: its file is removed."""
        self._room.returned(sandbox_id, values)

    async def _with_vram(self, runner: Runner, usage: dict[str, Any]) -> dict[str, Any]:
        """With what the rank's processes have of its GPUs' memory, as the driver tells; simulated ones have none."""
        box, rank = runner.box, runner.rank
        gpus = [gpu for gpu in share(box.gpus, rank) if not gpu.simulated]
        if not gpus or len(box.gpus) < rank.of:  # Of a GPU that several ranks share nobody knows whose it is.
            return usage
        pids = set(box.processes)
        try:
            used = [await self._service.leases.memory_of(gpu, pids) for gpu in gpus]
        except errors.WarmcellError as error:
            log.info("sandbox %s: the memory of its GPUs is not known: %s", box.info.id, error)
            return usage
        return {**usage, "content": {**usage["content"], "vram_bytes": sum(used)}}

    def follow(self, sandbox_id: SandboxId, connection: IOStream) -> bool:
        """Close this connection, which a cell has used, when the sandbox ends: whoever keeps it then knows.

        False: there is nothing to follow, and the connection is not to be kept.
        """
        if not any(one == sandbox_id for one, _ in self._runners):
            return False
        self._followed.setdefault(sandbox_id, weakref.WeakSet()).add(connection)
        return True

    def lead(self, connection: IOStream) -> None:
        """A cell begins on this connection, whose sandbox alone it follows from now on."""
        for followers in self._followed.values():
            followers.discard(connection)

    def busy(self, sandbox_id: SandboxId) -> bool:
        """Whether a cell runs in it that was sent from here."""
        return any(one == sandbox_id and runner.lock.locked() for (one, _), runner in self._runners.items())

    def idle_s(self, sandbox_id: SandboxId) -> float:
        """How long nothing has run in it, or in what was made from it, as far as that was looked at."""
        now = time.monotonic()
        if self._under_way[sandbox_id] or any(
            info.parent == sandbox_id and self._under_way[info.id] for info in self._service.infos()
        ):
            self._used[sandbox_id] = now
        return now - self._used.setdefault(sandbox_id, now)

    async def interrupt(self, sandbox_id: SandboxId, rank: int | None = None) -> None:
        """Interrupt what runs in it, if anything does: in one of its kernels, or in all."""
        box = self._service.live(sandbox_id)
        for (one, number), runner in list(self._runners.items()):
            if one == sandbox_id and rank in (None, number):
                await box.signal_process(runner.process, 2)

    async def forget(self, sandbox_id: SandboxId) -> None:
        """Close the connection to a sandbox that has ended. Idempotent."""
        for key in [key for key in {*self._starting, *self._runners} if key[0] == sandbox_id]:
            self._starting.pop(key, None)
            self._drop(key)
        self._ports.pop(sandbox_id, None)
        self._used.pop(sandbox_id, None)
        self._room.forget(sandbox_id)
        for connection in list(self._followed.pop(sandbox_id, ())):
            connection.close()
        self._under_way.pop(sandbox_id, None)

    async def close(self) -> None:
        """Close all connections."""
        for key in list(self._runners):
            self._drop(key)

    def _drop(self, key: tuple[SandboxId, int]) -> None:
        runner = self._runners.pop(key, None)
        if runner is not None:
            runner.close()

    async def _runner(self, sandbox_id: SandboxId, rank: Rank) -> Runner:
        box = self._service.live(sandbox_id)
        clone = self.clone_of(sandbox_id)
        if box.info.kernel_id is not None and clone is None:
            raise errors.ConflictError(
                f"The kernel of sandbox {sandbox_id} is a notebook's", hint="Run the cell in that notebook."
            )
        key = (sandbox_id, rank.number)
        async with self._starting.setdefault(key, asyncio.Lock()):
            runner = self._runners.get(key)
            if runner is not None and runner.is_of_use:
                return runner
            if runner is not None and runner.process.alive and clone is None:  # It says what nobody understands.
                await runner.kill()
            instead = "" if runner is None else runner.instead or runner.died().message
            self._drop(key)
            if clone is not None:
                runner = await join(box, clone, rank)
            else:
                runner = await start(self._service, box, rank, env=self._of_rank(box, rank), in_use=self.sandbox_in_use)
            runner.instead = instead
            self._runners[key] = runner
            return runner

    def _of_rank(self, box: LiveSandbox, rank: Rank) -> dict[str, str]:
        port = self._ports.setdefault(box.info.id, MASTER_PORT if box.spec.network == "none" else free_port())
        return environment(box, rank, port=port)
