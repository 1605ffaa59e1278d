"""Run cells in the kernels of a sandbox that has no Jupyter client: the far end of `%%remote`.

The keeper is their only client then: one kernel for each rank of a fan-out, all in one sandbox. Values travel as files
in the sandbox's run directory, pickled and unpickled inside sandboxes only: the keeper never looks into them.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient

from warmcell.extension.keeper.death import death, unless_dead
from warmcell.extension.keeper.kernel import Kernel
from warmcell.extension.keeper.rank_memory import readings
from warmcell.extension.keeper.ranks import MASTER_PORT, Rank, environment, free_port, share
from warmcell.extension.keeper.template_front import ask
from warmcell.sandbox import errors
from warmcell.sandbox.gpus.environment import environment as gpu_environment
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.told import MORE_MEMORY

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
ASK_AGAIN_S = 0.25
INTERRUPT_TIMEOUT_S = 15.0
"""How long a cell that nobody waits for any more has to end before its kernel is killed."""

KILL_TIMEOUT_S = 10.0

SILENCE_S = 10.0
"""Output of a cell that has ended may be late, or lost where it printed faster than anybody could read."""

MORE_MEMORY_FOR_RANKS = "Ask for more with memory=, as in memory=8GiB, or load less at a time."

VALUES_MODULE = "warmcell_guest.values"

SHOWN = frozenset(
    {
        *("stream", "display_data", "update_display_data", "execute_result", "clear_output", "error"),
        *("comm_open", "comm_msg", "comm_close"),
    }
)
"""iopub messages that belong to a cell's output; those of comms say how its widgets change."""


@dataclass(frozen=True, slots=True)
class Request:
    """A cell, and what travels with it."""

    code: str
    load: Mapping[str, Any] | None = None
    """What `values.load` is told, less where the files are."""
    get: Sequence[str] = ()
    last: str = ""
    """What the value of its last line is called among the values that come back; empty: it stays there."""


@dataclass
class Runner:
    """The keeper's own connection to one kernel of a sandbox."""

    client: AsyncKernelClient
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


class Runs:
    """One runner per rank of each sandbox, made with its first cell."""

    def __init__(self, service: SandboxService) -> None:
        self._service = service
        self._context = zmq.asyncio.Context()
        self._runners: dict[tuple[SandboxId, int], Runner] = {}
        self._starting: dict[tuple[SandboxId, int], asyncio.Lock] = {}
        self._ports: dict[SandboxId, int] = {}
        """Where the ranks of a sandbox meet."""
        self.clone_of: Callable[[SandboxId], Kernel | None] = lambda sandbox_id: None
        """Finds the kernel that somebody's cell has cloned itself into, in that sandbox."""
        self._used: dict[SandboxId, float] = {}
        """When a cell has ended in a sandbox, or it was first asked for that."""
        self._under_way: Counter[SandboxId] = Counter()
        """Cells of each, those whose kernel starts included."""

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
            runner = await self._runner(sandbox_id, rank)
            async with runner.lock, contextlib.aclosing(self._run(runner, request, values)) as messages:
                async for message in messages:
                    yield message
        finally:
            if sandbox_id in self._under_way:  # Else it is gone, and forgotten.
                self._under_way[sandbox_id] -= 1
                self._used[sandbox_id] = time.monotonic()

    async def _run(self, runner: Runner, request: Request, values: Path) -> AsyncGenerator[dict[str, Any]]:
        """One cell, whose turn it is."""
        began = time.perf_counter()
        status = "ok"
        if runner.instead:
            text, runner.instead = f"{runner.instead}. It was started again, without its variables.\n", ""
            yield {"msg_type": "stream", "content": {"name": "stderr", "text": text}, "metadata": {}}
        for step in _steps(request, runner.box.guest_run_directory, values):
            async with contextlib.aclosing(_execute(runner, step)) as messages:
                async for message in messages:
                    if message["msg_type"] == "reply":
                        status = message["content"]["status"]
                    else:
                        yield await self._with_vram(runner, message) if message["msg_type"] == "usage" else message
            if status != "ok":
                break
        yield {
            "done": True,
            "status": status,
            "started_from": runner.process.started_from,
            "started_ms": runner.box.info.started_ms,
            "seconds": round(time.perf_counter() - began, 6),
        }

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
        self._under_way.pop(sandbox_id, None)

    async def close(self) -> None:
        """Close all connections."""
        for key in list(self._runners):
            self._drop(key)
        self._context.destroy(linger=0)

    def _drop(self, key: tuple[SandboxId, int]) -> None:
        runner = self._runners.pop(key, None)
        if runner is not None:
            runner.client.stop_channels()

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
            if runner is not None and runner.process.alive:
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
        client = self._client(str(connection["ip"]), key=str(connection["key"]))
        runner = Runner(client, kernel.process, box, box.oom_kills(), rank)
        try:
            await _answers(runner)
        except BaseException:
            client.stop_channels()
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
        runner = Runner(self._client(str(process.socket_prefix)), process, box, oom_before, rank)
        try:
            if process.token:  # It has been up for a while, and waits for somebody to become.
                become = {"token": process.token, "clone": True, "env": env, "cwd": cwd}
                await unless_dead(process, _become(runner.client, become))
                process.token = ""
            await _answers(runner)
            if rank.number == 0:
                self._service.kernel_ready(sandbox_id, started_ms=1000 * (time.perf_counter() - began))
        except BaseException:
            runner.client.stop_channels()
            with contextlib.suppress(errors.WarmcellError):
                await box.signal_process(process, 9)
            raise
        return runner

    def _of_rank(self, box: LiveSandbox, rank: Rank) -> dict[str, str]:
        port = self._ports.setdefault(box.info.id, MASTER_PORT if box.spec.network == "none" else free_port())
        return environment(box, rank, port=port)

    def _client(self, prefix: str, *, key: str = "") -> AsyncKernelClient:
        client = AsyncKernelClient(
            context=self._context,
            transport="ipc",
            ip=prefix,
            shell_port=1,
            iopub_port=2,
            stdin_port=3,
            control_port=4,
            hb_port=5,
        )
        client.session.key = key.encode()
        client.start_channels(hb=False)
        return client


@dataclass(frozen=True)
class Step:
    """One execute request of a run."""

    code: str
    silent: bool
    name: str = "cell"


def _steps(request: Request, guest: str, values: Path) -> list[Step]:
    """Values in, the cell, values out. Each step is left out where it has nothing to do."""
    steps = []
    module = f"__import__({VALUES_MODULE!r}, fromlist=['load'])"
    if request.load is not None:
        told = json.dumps({**request.load, "directory": guest})
        steps.append(Step(f"{module}.load({told!r})", True, "load"))
    if request.code:
        steps.append(Step(request.code, False))
    if request.get or request.last:
        out = f"{guest}/{values.name}"
        steps.append(Step(f"{module}.dump({list(request.get)!r}, {out!r}, {request.last!r})", True, "dump"))
    return steps


async def _execute(runner: Runner, step: Step) -> AsyncGenerator[dict[str, Any]]:
    """Messages of one request, last its reply; then nothing of it is still to come."""
    client = runner.client
    # Nothing is ever queued behind a step, and what comes next may come while the kernel still empties its queue.
    sent = client.execute(step.code, silent=step.silent, store_history=False, allow_stdin=False, stop_on_error=False)
    reply = asyncio.create_task(_reply(client, sent))
    died = asyncio.create_task(runner.process.exited.wait())
    heard: asyncio.Task[Any] | None = None
    memory = readings(client)
    reading: asyncio.Task[Any] | None = None if step.silent else asyncio.ensure_future(anext(memory))
    told = False
    try:
        while True:
            heard = heard or asyncio.ensure_future(client.get_iopub_msg(timeout=None))
            wait_for = {heard, died} if reply.done() else {heard, died, reply}
            if reading is not None and not reply.done():
                wait_for.add(reading)
            done, _ = await asyncio.wait(
                wait_for, timeout=SILENCE_S if reply.done() else None, return_when=asyncio.FIRST_COMPLETED
            )
            if heard in done:
                message, heard = heard.result(), None
                if message["parent_header"].get("msg_id") != sent:
                    continue
                if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                    break
                # What a step of ours raises is told once, by its reply.
                if message["msg_type"] in SHOWN and not (step.silent and message["msg_type"] == "error"):
                    told = told or message["msg_type"] == "error"
                    yield {key: message[key] for key in ("msg_type", "content", "metadata")}
            elif died in done:
                raise _died(runner)
            elif reading is not None and reading in done:
                told_memory, reading = reading, None
                if told_memory.exception() is None:
                    yield told_memory.result()
                    reading = asyncio.ensure_future(anext(memory))
            elif not done:
                log.warning("sandbox %s: the end of a cell's output was lost", runner.box.info.id)
                break
        await asyncio.wait({reply, died}, return_when=asyncio.FIRST_COMPLETED)
        if not reply.done():
            raise _died(runner)
        content = reply.result()
        if content["status"] == "error" and not told:  # Of groups of exceptions only the text is published.
            yield {"msg_type": "error", "content": content, "metadata": {}, "step": step.name}
        yield {"msg_type": "reply", "content": {"status": content["status"]}, "metadata": {}}
    finally:
        if not reply.done() and runner.process.alive:  # whoever asked has gone
            with contextlib.suppress(errors.WarmcellError):
                await runner.box.signal_process(runner.process, 2)
            await asyncio.wait({reply, died}, timeout=INTERRUPT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if not reply.done() and runner.process.alive:  # Every later cell would wait behind this one.
                runner.deaf = True
                with contextlib.suppress(errors.WarmcellError):
                    await runner.box.signal_process(runner.process, 9)
                await asyncio.wait({died}, timeout=KILL_TIMEOUT_S)
        tasks = [task for task in (reply, died, heard, reading) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await memory.aclose()


async def _reply(client: AsyncKernelClient, sent: str) -> dict[str, Any]:
    """The content of the answer to request `sent`."""
    while True:
        message: dict[str, Any] = await client.get_shell_msg(timeout=None)
        if message["parent_header"].get("msg_id") == sent:
            content: dict[str, Any] = message["content"]
            return content


async def _become(client: AsyncKernelClient, wanted: Mapping[str, Any]) -> None:
    """Have a kernel from a template's snapshot be one of its own."""
    await ask(client, "warmcell_after_restore_request", wanted)


async def _answers(runner: Runner) -> None:
    """Wait until the kernel answers and its iopub reaches us."""
    hearing = asyncio.create_task(heard(runner.client))
    died = asyncio.create_task(runner.process.exited.wait())
    try:
        await asyncio.wait({hearing, died}, timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if hearing.done():
            hearing.result()
        elif died.done():
            raise _died(runner)
        else:
            raise errors.OperationTimeoutError(
                f"The remote kernel did not answer within {READY_TIMEOUT_S:.0f} s",
                hint="Try again on a less busy machine.",
                details={"operation": "remote kernel start", "timeout": READY_TIMEOUT_S},
            )
    finally:
        for task in (hearing, died):
            task.cancel()
        await asyncio.gather(hearing, died, return_exceptions=True)


async def heard(client: AsyncKernelClient) -> None:
    """Ask again and again: what is published before iopub is connected is lost."""
    while True:
        asked = client.kernel_info()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ASK_AGAIN_S):
                while True:
                    message = await client.get_iopub_msg(timeout=None)
                    if message["parent_header"].get("msg_id") == asked:
                        return


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
