"""Run cells in the kernel of a sandbox that has no Jupyter client: the far end of `%%remote`.

The keeper is the kernel's only client then. Values travel as files in the sandbox's run directory,
pickled and unpickled inside sandboxes only: the keeper never looks into them.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient

from warmcell.sandbox import errors
from warmcell.sandbox.gpus.environment import environment as gpu_environment
from warmcell.sandbox.live import KernelProcess
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
ASK_AGAIN_S = 0.25
VALUES_MODULE = "warmcell_guest.values"

SHOWN = frozenset({"stream", "display_data", "update_display_data", "execute_result", "clear_output", "error"})
"""iopub messages that belong to a cell's output."""


@dataclass
class Runner:
    """The keeper's own connection to one sandbox's kernel."""

    client: AsyncKernelClient
    process: KernelProcess
    files: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One cell at a time, as in any kernel."""


class Runs:
    """One runner per sandbox, made with its first cell."""

    def __init__(self, service: SandboxService) -> None:
        self._service = service
        self._runners: dict[SandboxId, Runner] = {}
        self._starting: dict[SandboxId, asyncio.Lock] = {}

    def new_file(self, sandbox_id: SandboxId, name: str) -> Path:
        """A fresh path in the sandbox's run directory for values to or from it."""
        return self._service.live(sandbox_id).run_directory / f"{name}-{time.monotonic_ns()}.pkl"

    async def run(
        self, sandbox_id: SandboxId, code: str, *, send: Path | None, get: Sequence[str], values: Path
    ) -> AsyncIterator[dict[str, Any]]:
        """Run one cell: a message at a time of what it shows, last `{"done": true, …}`.

        Args:
            send: A file of values that the cell finds in its namespace.
            get: Names whose values are written to `values` afterwards, if the cell did not fail.

        Raises:
            WarmcellError: The sandbox is gone, or its kernel ends.
        """
        runner = await self._runner(sandbox_id)
        async with runner.lock:
            began = time.perf_counter()
            box = self._service.live(sandbox_id)
            status, shown = "ok", 0
            for step in _steps(code, box.guest_run_directory, send, get, values):
                if status != "ok":
                    break
                async for message in self._execute(runner, step):
                    if message["msg_type"] == "reply":
                        status = message["content"]["status"]
                    else:
                        shown += 1
                        yield message
            yield {
                "done": True,
                "status": status,
                "started_from": box.info.started_from,
                "started_ms": box.info.started_ms,
                "seconds": round(time.perf_counter() - began, 6),
            }

    async def interrupt(self, sandbox_id: SandboxId) -> None:
        """Interrupt what runs in it, if anything does."""
        await self._service.live(sandbox_id).signal_kernel(2)

    async def forget(self, sandbox_id: SandboxId) -> None:
        """Close the connection to a sandbox that is going."""
        self._starting.pop(sandbox_id, None)
        runner = self._runners.pop(sandbox_id, None)
        if runner is not None:
            runner.client.stop_channels()

    async def close(self) -> None:
        """Close all connections."""
        for sandbox_id in list(self._runners):
            await self.forget(sandbox_id)

    async def _runner(self, sandbox_id: SandboxId) -> Runner:
        async with self._starting.setdefault(sandbox_id, asyncio.Lock()):
            runner = self._runners.get(sandbox_id)
            if runner is not None and runner.process.alive:
                return runner
            await self.forget(sandbox_id)
            began = time.perf_counter()
            box = self._service.live(sandbox_id)
            env = {**box.spec.env, **gpu_environment(box.gpus)}
            cwd = box.spec.workspace.path if box.spec.workspace and box.spec.workspace.mode != "none" else ""
            process = await self._service.start_kernel(sandbox_id, env=env, cwd=cwd)
            client = AsyncKernelClient(
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
            runner = self._runners[sandbox_id] = Runner(client, process)
            await _answers(runner)
            self._service.kernel_ready(sandbox_id, started_ms=1000 * (time.perf_counter() - began))
            return runner

    async def _execute(self, runner: Runner, step: "Step") -> AsyncIterator[dict[str, Any]]:
        """Messages of one request, last its reply; then nothing of it is still to come."""
        client = runner.client
        sent = client.execute(step.code, silent=step.silent, store_history=False, allow_stdin=False)
        died = asyncio.create_task(runner.process.exited.wait())
        try:
            while True:
                message = await _next(client.get_iopub_msg(timeout=None), died, runner)
                if message["parent_header"].get("msg_id") != sent:
                    continue
                if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                    break
                if message["msg_type"] in SHOWN:
                    yield {key: message[key] for key in ("msg_type", "content", "metadata")}
            while True:
                message = await _next(client.get_shell_msg(timeout=None), died, runner)
                if message["parent_header"].get("msg_id") == sent:
                    break
            content = {"status": message["content"]["status"]}
            if step.silent and content["status"] == "error":
                yield {"msg_type": "error", "content": message["content"], "metadata": {}}
            yield {"msg_type": "reply", "content": content, "metadata": {}}
        finally:
            died.cancel()


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


async def _next(what: Any, died: "asyncio.Task[Any]", runner: Runner) -> dict[str, Any]:
    """The next message, or the error that none will come."""
    task = asyncio.ensure_future(what)
    try:
        await asyncio.wait({task, died}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            message: dict[str, Any] = task.result()
            return message
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    raise errors.SandboxDiedError(
        f"The remote kernel ended by itself with exit code {runner.process.exit_code}",
        hint="Run the cell again for a fresh one; give it more memory if it was killed for it.",
        details={"exit_code": runner.process.exit_code},
    )


async def _answers(runner: Runner) -> None:
    """Wait until the kernel answers and its iopub reaches us."""
    client = runner.client
    died = asyncio.create_task(runner.process.exited.wait())
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while True:
                asked = client.kernel_info()
                try:
                    async with asyncio.timeout(ASK_AGAIN_S):
                        while True:
                            message = await _next(client.get_iopub_msg(timeout=None), died, runner)
                            if message["parent_header"].get("msg_id") == asked:
                                return
                except TimeoutError:
                    continue
    except TimeoutError:
        raise errors.OperationTimeoutError(
            f"The remote kernel did not answer within {READY_TIMEOUT_S:.0f} s", hint="Try again on a less busy machine."
        ) from None
    finally:
        died.cancel()
