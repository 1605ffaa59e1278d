"""Run cells in the kernel of a sandbox that has no Jupyter client: the far end of `%%remote`.

The keeper is the kernel's only client then. Values travel as files in the sandbox's run directory,
pickled and unpickled inside sandboxes only: the keeper never looks into them.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient

from warmcell.extension.keeper.death import death, unless_dead
from warmcell.extension.keeper.template_front import ask
from warmcell.sandbox import errors
from warmcell.sandbox.gpus.environment import environment as gpu_environment
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
ASK_AGAIN_S = 0.25
INTERRUPT_TIMEOUT_S = 15.0
"""How long a cell that nobody waits for any more has to end before the next one is sent."""

SILENCE_S = 10.0
"""Output of a cell that has ended may be late, or lost where it printed faster than anybody could read."""

VALUES_MODULE = "warmcell_guest.values"

SHOWN = frozenset({"stream", "display_data", "update_display_data", "execute_result", "clear_output", "error"})
"""iopub messages that belong to a cell's output."""


@dataclass
class Runner:
    """The keeper's own connection to one sandbox's kernel."""

    client: AsyncKernelClient
    process: KernelProcess
    box: LiveSandbox
    oom_before: int
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One cell at a time, as in any kernel."""


class Runs:
    """One runner per sandbox, made with its first cell."""

    def __init__(self, service: SandboxService) -> None:
        self._service = service
        self._context = zmq.asyncio.Context()
        self._runners: dict[SandboxId, Runner] = {}
        self._starting: dict[SandboxId, asyncio.Lock] = {}

    def new_file(self, sandbox_id: SandboxId, name: str) -> Path:
        """A fresh path in the sandbox's run directory for values to or from it."""
        return self._service.live(sandbox_id).run_directory / f"{name}-{time.monotonic_ns()}.pkl"

    async def run(
        self, sandbox_id: SandboxId, code: str, *, send: Path | None, get: Sequence[str], values: Path
    ) -> AsyncGenerator[dict[str, Any]]:
        """Run one cell: a message at a time of what it shows, last `{"done": true, …}`.

        A cell that runs when the generator is closed is interrupted.

        Args:
            sandbox_id: Where; its kernel is started with its first cell.
            code: The cell.
            send: A file of values that the cell finds in its namespace.
            get: Names whose values are written to `values` afterwards, if the cell did not fail.
            values: A file that does not exist yet.

        Raises:
            WarmcellError: The sandbox is gone, or its kernel ends.
        """
        runner = await self._runner(sandbox_id)
        async with runner.lock:
            began = time.perf_counter()
            status = "ok"
            for step in _steps(code, runner.box.guest_run_directory, send, get, values):
                async with contextlib.aclosing(_execute(runner, step)) as messages:
                    async for message in messages:
                        if message["msg_type"] == "reply":
                            status = message["content"]["status"]
                        else:
                            yield message
                if status != "ok":
                    break
            yield {
                "done": True,
                "status": status,
                "started_from": runner.box.info.started_from,
                "started_ms": runner.box.info.started_ms,
                "seconds": round(time.perf_counter() - began, 6),
            }

    def busy(self, sandbox_id: SandboxId) -> bool:
        """Whether a cell runs in it that was sent from here."""
        runner = self._runners.get(sandbox_id)
        return runner is not None and runner.lock.locked()

    async def interrupt(self, sandbox_id: SandboxId) -> None:
        """Interrupt what runs in it, if anything does."""
        await self._service.live(sandbox_id).signal_kernel(2)

    async def forget(self, sandbox_id: SandboxId) -> None:
        """Close the connection to a sandbox that has ended. Idempotent."""
        self._starting.pop(sandbox_id, None)
        self._drop(sandbox_id)

    async def close(self) -> None:
        """Close all connections."""
        for sandbox_id in list(self._runners):
            self._drop(sandbox_id)
        self._context.destroy(linger=0)

    def _drop(self, sandbox_id: SandboxId) -> None:
        runner = self._runners.pop(sandbox_id, None)
        if runner is not None:
            runner.client.stop_channels()

    async def _runner(self, sandbox_id: SandboxId) -> Runner:
        box = self._service.live(sandbox_id)
        if box.info.kernel_id is not None:
            raise errors.ConflictError(
                f"The kernel of sandbox {sandbox_id} is a notebook's", hint="Run the cell in that notebook."
            )
        async with self._starting.setdefault(sandbox_id, asyncio.Lock()):
            runner = self._runners.get(sandbox_id)
            if runner is not None and runner.process.alive:
                return runner
            self._drop(sandbox_id)
            return await self._start(box)

    async def _start(self, box: LiveSandbox) -> Runner:
        began = time.perf_counter()
        sandbox_id, oom_before = box.info.id, box.oom_kills()
        env = {**box.spec.env, **gpu_environment(box.gpus)}
        cwd = box.spec.workspace.path if box.spec.workspace and box.spec.workspace.mode != "none" else ""
        process = await self._service.start_kernel(sandbox_id, env=env, cwd=cwd)
        runner = Runner(self._client(process), process, box, oom_before)
        try:
            if process.token:  # It has been up for a while, and waits for somebody to become.
                become = {"token": process.token, "clone": True, "env": env, "cwd": cwd}
                await unless_dead(process, _become(runner.client, become))
                process.token = ""
            await _answers(runner)
            self._service.kernel_ready(sandbox_id, started_ms=1000 * (time.perf_counter() - began))
        except BaseException:
            runner.client.stop_channels()
            with contextlib.suppress(errors.WarmcellError):
                await box.end_kernel(grace=0.0)
            raise
        self._runners[sandbox_id] = runner
        return runner

    def _client(self, process: KernelProcess) -> AsyncKernelClient:
        client = AsyncKernelClient(
            context=self._context,
            transport="ipc",
            ip=str(process.socket_prefix),
            shell_port=1,
            iopub_port=2,
            stdin_port=3,
            control_port=4,
            hb_port=5,
        )
        client.session.key = b""
        client.start_channels(hb=False)
        return client


@dataclass(frozen=True)
class Step:
    """One execute request of a run."""

    code: str
    silent: bool


def _steps(code: str, guest: str, send: Path | None, get: Sequence[str], values: Path) -> list[Step]:
    """Values in, the cell, values out. Each step is left out where it has nothing to do."""
    steps = []
    if send is not None:
        steps.append(Step(f"__import__({VALUES_MODULE!r}, fromlist=['load']).load({f'{guest}/{send.name}'!r})", True))
    steps.append(Step(code, False))
    if get:
        out = f"{guest}/{values.name}"
        steps.append(Step(f"__import__({VALUES_MODULE!r}, fromlist=['dump']).dump({list(get)!r}, {out!r})", True))
    return steps


async def _execute(runner: Runner, step: Step) -> AsyncGenerator[dict[str, Any]]:
    """Messages of one request, last its reply; then nothing of it is still to come."""
    client = runner.client
    sent = client.execute(step.code, silent=step.silent, store_history=False, allow_stdin=False)
    reply = asyncio.create_task(_reply(client, sent))
    died = asyncio.create_task(runner.process.exited.wait())
    heard: asyncio.Task[Any] | None = None
    try:
        while True:
            heard = heard or asyncio.ensure_future(client.get_iopub_msg(timeout=None))
            wait_for = {heard, died} if reply.done() else {heard, died, reply}
            done, _ = await asyncio.wait(
                wait_for, timeout=SILENCE_S if reply.done() else None, return_when=asyncio.FIRST_COMPLETED
            )
            if heard in done:
                message, heard = heard.result(), None
                if message["parent_header"].get("msg_id") != sent:
                    continue
                if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                    break
                if message["msg_type"] in SHOWN:
                    yield {key: message[key] for key in ("msg_type", "content", "metadata")}
            elif died in done:
                raise _died(runner)
            elif not done:
                log.warning("sandbox %s: the end of a cell's output was lost", runner.box.info.id)
                break
        await asyncio.wait({reply, died}, return_when=asyncio.FIRST_COMPLETED)
        if not reply.done():
            raise _died(runner)
        content = reply.result()
        if step.silent and content["status"] == "error":
            yield {"msg_type": "error", "content": content, "metadata": {}}
        yield {"msg_type": "reply", "content": {"status": content["status"]}, "metadata": {}}
    finally:
        if not reply.done() and runner.process.alive:  # whoever asked has gone
            with contextlib.suppress(errors.WarmcellError):
                await runner.box.signal_kernel(2)
            await asyncio.wait({reply, died}, timeout=INTERRUPT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        tasks = [task for task in (reply, died, heard) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


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
    heard = asyncio.create_task(_heard(runner.client))
    died = asyncio.create_task(runner.process.exited.wait())
    try:
        await asyncio.wait({heard, died}, timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if heard.done():
            heard.result()
        elif died.done():
            raise _died(runner)
        else:
            raise errors.OperationTimeoutError(
                f"The remote kernel did not answer within {READY_TIMEOUT_S:.0f} s",
                hint="Try again on a less busy machine.",
                details={"operation": "remote kernel start", "timeout": READY_TIMEOUT_S},
            )
    finally:
        for task in (heard, died):
            task.cancel()
        await asyncio.gather(heard, died, return_exceptions=True)


async def _heard(client: AsyncKernelClient) -> None:
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
    return death(
        runner.process.exit_code or 0,
        oom_killed=runner.box.oom_kills() > runner.oom_before,
        spec=runner.box.spec,
        who="The remote kernel",
    )
