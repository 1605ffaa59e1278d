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
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tornado.iostream import IOStream

from warmcell.extension.keeper.death import death
from warmcell.extension.keeper.kernel import Kernel
from warmcell.extension.keeper.rank_client import RankClient
from warmcell.extension.keeper.rank_front import RankFront
from warmcell.extension.keeper.rank_steps import Execution, LostError, Request, Step, step_of
from warmcell.extension.keeper.ranks import MASTER_PORT, Rank, environment, free_port, share
from warmcell.sandbox import errors
from warmcell.sandbox.gpus.environment import environment as gpu_environment
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxInfo
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.told import MORE_MEMORY

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
INTERRUPT_TIMEOUT_S = 15.0
"""How long a cell that nobody waits for any more has to end before its kernel is killed."""

KILL_TIMEOUT_S = 10.0

WAITS_S = 2.0
"""A cell that has waited so long for its sandbox's GPUs says so."""

HANG_UP_TIMEOUT_S = 10.0
"""A kernel that has hung up is about to end."""

MORE_MEMORY_FOR_RANKS = "Ask for more with memory=, as in memory=8GiB, or load less at a time."


@dataclass
class Runner:
    """The keeper's own connection to one kernel of a sandbox."""

    client: RankClient
    process: KernelProcess
    box: LiveSandbox
    oom_before: int
    rank: Rank
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One cell at a time, as in any kernel."""
    instead: str = ""
    """How the kernel ended that was here before; empty once that has been said."""
    deaf: bool = False
    """It was killed, as it did not stop when it was interrupted."""

    def __post_init__(self) -> None:
        self._follows = asyncio.create_task(_hang_up(self.process, self.client))

    def close(self) -> None:
        """Let go of it. Idempotent."""
        self._follows.cancel()
        self.client.close()


@dataclass
class Returning:
    """Files of one sandbox with what its cells bring back, on their way to whoever wants it."""

    files: set[Path] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """For the one who has all the room for itself."""
    under_way: int = 0
    """Cells that bring something back and have not ended: a part of it may take room already."""

    async def emptied(self) -> None:
        """Wait until there are none."""
        while self.files:
            self.changed.clear()
            await self.changed.wait()

    async def quiet(self) -> None:
        """Wait until no cell is under way."""
        while self.under_way:
            self.changed.clear()
            await self.changed.wait()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """One is under way."""
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self.changed.set()


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
        self._returning: dict[SandboxId, Returning] = {}
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
        found = [runner for (one, _), runner in self._runners.items() if one == sandbox_id and runner.process.alive]
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
            async with contextlib.aclosing(self._do(runner, step, values)) as messages:
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

    async def _do(self, runner: Runner, step: Step, values: Path) -> AsyncGenerator[dict[str, Any]]:
        """Messages of a step; where what comes back does not fit, once what others bring back has gone."""
        if "dump" not in step.travels:
            async with contextlib.aclosing(_execute(runner, step)) as messages:
                async for message in messages:
                    yield message
            return
        returning = self._returning.setdefault(runner.box.info.id, Returning())
        said: list[dict[str, Any]] = []
        """The end of it."""
        with returning.writing():
            async with contextlib.aclosing(_execute(runner, step)) as messages:
                async for message in messages:
                    if said or message["msg_type"] == "reply" or _is_no_room(message):
                        said.append(message)
                    else:
                        yield message
        if _no_room(said):
            async with returning.turn:
                while _no_room(said):
                    await returning.emptied()
                    alone = not returning.under_way
                    said = [message async for message in _execute(runner, step.again)]
                    if alone and not returning.files:  # Nobody was in the way.
                        break
                    if _no_room(said):
                        await returning.quiet()
        if said[-1]["content"]["status"] == "ok":
            returning.files.add(values)
        for message in said:
            yield message

    def returned(self, sandbox_id: SandboxId, values: Path) -> None:
        """What came back has gone on, or nobody wants it: its file, or what there is of it, is removed."""
        for path in (values, values.with_name(f"{values.name}.part")):
            with contextlib.suppress(OSError):  # Whatever the guest has put there stays in its sandbox.
                path.unlink()
        returning = self._returning.get(sandbox_id)
        if returning is not None and values in returning.files:
            returning.files.remove(values)
            returning.changed.set()

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
        """How long nothing has run in it, as far as that was looked at."""
        now = time.monotonic()
        if self._under_way[sandbox_id]:
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
        self._returning.pop(sandbox_id, None)
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
            if runner is not None and runner.process.alive and not runner.client.ended:
                return runner
            instead = "" if runner is None else runner.instead or _died(runner).message
            self._drop(key)
            if clone is not None:
                runner = await self._join(box, clone, rank)
            else:
                runner = await self._start(box, rank)
            runner.instead = instead
            self._runners[key] = runner
            return runner

    async def _join(self, box: LiveSandbox, kernel: Kernel, rank: Rank) -> Runner:
        """A clone runs already; it is reached as all its clients reach it, so what it does counts as work.

        Raises:
            SandboxDiedError: It has ended.
        """
        if kernel.process is None or not kernel.process.alive:
            raise errors.SandboxDiedError(
                f"Rank {rank.number} has ended with its clone", hint="Run the cell again, which makes other clones."
            )
        connection = kernel.request.connection
        client = RankClient(str(connection["ip"]), key=str(connection["key"]))
        runner = Runner(client, kernel.process, box, box.oom_kills(), rank)
        try:
            await _answers(runner)
        except BaseException as error:
            runner.close()
            if isinstance(error, errors.TransportError):
                raise await _lost(runner) from None
            raise
        return runner

    async def _start(self, box: LiveSandbox, rank: Rank) -> Runner:
        began = time.perf_counter()
        sandbox_id, oom_before = box.info.id, box.oom_kills()
        gpus = share(box.gpus, rank)
        env = {**self._of_rank(box, rank), **await box.network_environment(), **box.spec.env, **gpu_environment(gpus)}
        cwd = box.spec.workspace.path if box.spec.workspace and box.spec.workspace.mode != "none" else ""
        if rank.number == 0:
            process = await self._service.start_kernel(sandbox_id, env=env, cwd=cwd)
        else:
            process = await box.start_beside(env=env, cwd=cwd)
        runner = Runner(RankClient(str(process.socket_prefix)), process, box, oom_before, rank)
        try:
            self.sandbox_in_use(box)
            if process.token:  # It has been up for a while, and waits for somebody to become.
                become = {"token": process.token, "clone": True, "env": env, "cwd": cwd}
                await runner.client.ask("warmcell_after_restore_request", become, timeout_s=READY_TIMEOUT_S)
                process.token = ""
            await _answers(runner)
            if rank.number == 0:
                self._service.kernel_ready(sandbox_id, started_ms=1000 * (time.perf_counter() - began))
        except BaseException as error:
            runner.close()
            with contextlib.suppress(errors.WarmcellError):
                await box.signal_process(process, 9)
            if isinstance(error, errors.TransportError):
                raise await _lost(runner) from None
            raise
        return runner

    def _of_rank(self, box: LiveSandbox, rank: Rank) -> dict[str, str]:
        port = self._ports.setdefault(box.info.id, MASTER_PORT if box.spec.network == "none" else free_port())
        return environment(box, rank, port=port)


async def _hang_up(process: KernelProcess, client: RankClient) -> None:
    await process.exited.wait()
    client.finish()


async def _execute(runner: Runner, step: Step) -> AsyncGenerator[dict[str, Any]]:
    """Messages of one request, last its reply; then nothing of it is still to come."""
    execution = Execution(runner.client, step)
    try:
        async with contextlib.aclosing(execution.messages()) as messages:
            async for message in messages:
                yield message
        assert execution.reply is not None
        yield {"msg_type": "reply", "content": execution.reply, "metadata": {}}
    except LostError:
        raise await _lost(runner) from None
    finally:
        if execution.reply is None and runner.process.alive:  # whoever asked has gone
            with contextlib.suppress(errors.WarmcellError):
                await runner.box.signal_process(runner.process, 2)
            await _within(execution.end(), INTERRUPT_TIMEOUT_S)
            if execution.reply is None and runner.process.alive:  # Every later cell would wait behind this one.
                runner.deaf = True
                await _kill(runner)


async def _answers(runner: Runner) -> None:
    """Wait until the kernel answers and its iopub reaches us."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await runner.client.answers()
    except TimeoutError as error:
        raise errors.OperationTimeoutError(
            f"The remote kernel did not answer within {READY_TIMEOUT_S:.0f} s",
            hint="Try again on a less busy machine.",
            details={"operation": "remote kernel start", "timeout": READY_TIMEOUT_S},
        ) from error


async def _lost(runner: Runner) -> errors.WarmcellError:
    """The error for a kernel that has hung up; one that lives on is of no use, and is ended."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(HANG_UP_TIMEOUT_S):
            await runner.process.exited.wait()
    if runner.process.alive:
        await _kill(runner)
    return _died(runner)


async def _kill(runner: Runner) -> None:
    with contextlib.suppress(errors.WarmcellError):
        await runner.box.signal_process(runner.process, 9)
    await _within(runner.process.exited.wait(), KILL_TIMEOUT_S)


async def _within(what: Coroutine[Any, Any, object], timeout_s: float) -> None:
    """Wait for something, but not for ever; where one was cancelled `asyncio.timeout` takes its end for that."""
    work = asyncio.ensure_future(what)
    await asyncio.wait({work}, timeout=timeout_s)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


def _no_room(said: Sequence[Mapping[str, Any]]) -> bool:
    return any(map(_is_no_room, said))


def _is_no_room(one: Mapping[str, Any]) -> bool:
    return one.get("step") == "dump" and one["content"].get("ename") == "NoRoomError"


def _died(runner: Runner) -> errors.WarmcellError:
    who = "The remote kernel" if runner.rank.of == 1 else f"Rank {runner.rank.number}"
    if runner.deaf:
        return errors.SandboxDiedError(
            f"{who} did not stop within {INTERRUPT_TIMEOUT_S:.0f} s when it was interrupted, and was killed",
            hint="Let it react to an interrupt, or give it more time.",
        )
    return death(
        runner.process.exit_code or 0,
        oom_killed=runner.box.oom_kills() > runner.oom_before,
        spec=runner.box.spec,
        more_memory=MORE_MEMORY if runner.box.info.kernel_id else MORE_MEMORY_FOR_RANKS,
        who=who,
        sharing=1 if runner.box.info.kernel_id else runner.rank.of,
    )
