"""The keeper as a client of one of its own kernels, through the kernel's proxy: it stays connected whatever becomes of
the process behind.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient

from warmcell.extension.keeper.death import death
from warmcell.extension.keeper.kernel import Kernel
from warmcell.extension.keeper.rank_steps import LOST, SHOWN, SILENCE_S
from warmcell.sandbox import errors
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.live import LiveSandbox

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
ASK_AGAIN_S = 0.25


class KernelClient:
    """Sends cells to a kernel, and hears what they show."""

    def __init__(self, context: "zmq.asyncio.Context", kernel: Kernel) -> None:
        self._kernel = kernel
        connection = kernel.request.connection
        ports = {name: connection[name] for name in connection if name.endswith("_port")}
        self._client = AsyncKernelClient(context=context, transport="ipc", ip=connection["ip"], **ports)
        self._client.session.key = str(connection["key"]).encode()
        self._client.start_channels(stdin=False, hb=False, control=False)  # Descriptors: a thousand may wait.
        self._heard = False

    async def ready(self) -> None:
        """Wait until what the kernel says reaches us.

        Raises:
            OperationTimeoutError: It does not.
        """
        if self._heard:
            return
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await _heard(self._client)
        except TimeoutError as error:
            raise errors.OperationTimeoutError(
                f"The sandbox's kernel did not answer within {READY_TIMEOUT_S:.0f} s", hint="Try again, or kill it."
            ) from error
        self._heard = True

    async def execute(self, code: str, box: LiveSandbox, *, silent: bool = False) -> AsyncGenerator[dict[str, Any]]:
        """Messages of one cell, last its `reply`. Whoever closes this early leaves the cell running.

        Raises:
            SandboxDiedError: The kernel has ended.
        """
        client = self._client
        oom_before = box.oom_kills()
        # Or else what is sent right after an error would be thrown away, with what is already queued behind it.
        sent = client.execute(code, silent=silent, store_history=not silent, allow_stdin=False, stop_on_error=False)
        reply = asyncio.create_task(self._reply(sent))
        died = asyncio.create_task(self._died())
        hearing: asyncio.Task[Any] | None = None
        try:
            while True:
                hearing = hearing or asyncio.ensure_future(client.get_iopub_msg(timeout=None))
                waited = {hearing, died} if reply.done() else {hearing, died, reply}
                done, _ = await asyncio.wait(
                    waited, timeout=SILENCE_S if reply.done() else None, return_when=asyncio.FIRST_COMPLETED
                )
                if hearing in done:
                    message, hearing = hearing.result(), None
                    if message["parent_header"].get("msg_id") != sent:
                        continue
                    if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                        break
                    if message["msg_type"] in SHOWN:
                        yield {key: message[key] for key in ("msg_type", "content", "metadata")}
                elif died in done:
                    raise self._death(died.result(), box, oom_before)
                elif not done:
                    log.warning("sandbox %s: the end of a cell's output was lost", box.info.id)
                    yield dict(LOST)
                    break
            await asyncio.wait({reply, died}, return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                raise self._death(died.result(), box, oom_before)
            yield {"msg_type": "reply", "content": reply.result(), "metadata": {}}
        finally:
            tasks = [task for task in (reply, died, hearing) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Let go of the kernel. Idempotent."""
        with contextlib.suppress(RuntimeError):
            self._client.stop_channels()

    async def _reply(self, sent: str) -> dict[str, Any]:
        while True:
            message: dict[str, Any] = await self._client.get_shell_msg(timeout=None)
            if message["parent_header"].get("msg_id") == sent:
                content: dict[str, Any] = message["content"]
                return content

    async def _died(self) -> KernelProcess:
        """Wait for the end of the kernel's process, unless another one takes its place."""
        while True:
            process = self._kernel.process
            assert process is not None
            await process.exited.wait()
            if self._kernel.process is process:
                return process

    @staticmethod
    def _death(process: KernelProcess, box: LiveSandbox, oom_before: int) -> errors.SandboxDiedError:
        return death(process.exit_code or 0, oom_killed=box.oom_kills() > oom_before, spec=box.spec)


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
