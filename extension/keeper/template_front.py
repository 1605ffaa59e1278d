"""The keeper's own connection to a kernel that nobody uses yet: a template, or one that waits in the pool."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient

from warmcell.sandbox import errors
from warmcell.sandbox.live import KernelProcess, LiveSandbox

READY_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0


class TemplateFront:
    """Implements `Frontend` for a template: has it settle before it is saved, and speaks with it no more."""

    def __init__(self, box: LiveSandbox) -> None:
        self._box = box

    def record(self) -> Mapping[str, Any]:
        """What it has imported."""
        return {"template": self._box.info.template.to_json() if self._box.info.template is not None else {}}

    async def pause(self, *, token: str) -> None:
        """Wait until it answers, run a cell in it as its first, and leave it."""
        assert self._box.kernel is not None
        async with connected(self._box.kernel) as client:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await client._async_wait_for_ready(timeout=READY_TIMEOUT_S)
            # What every kernel's first cell, completion and inspection would load.
            await _answered(client, client.execute("pass", silent=True, store_history=False))
            await ask(client, "warmcell_before_snapshot_request", {"token": token})

    async def go_on(
        self, kernel: KernelProcess, record: Mapping[str, Any], *, token: str, restored: bool, clone: bool
    ) -> None:
        """Nobody speaks with it any more."""

    async def undone(self) -> None:
        """It has no requests."""

    async def sleep(self, record: Mapping[str, Any]) -> None:
        """It has no clients."""


@contextlib.asynccontextmanager
async def connected(kernel: KernelProcess) -> AsyncIterator[AsyncKernelClient]:
    """A client of a kernel's own sockets; on leaving, nothing is connected to it any more."""
    context = zmq.asyncio.Context()
    client = AsyncKernelClient(
        context=context,
        transport="ipc",
        ip=str(kernel.socket_prefix),
        **{f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)},
    )
    client.session.key = b""
    client.start_channels(hb=False)
    try:
        yield client
    finally:
        client.stop_channels()
        context.destroy(linger=0)


async def ask(client: AsyncKernelClient, kind: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A request on its control channel, answered with ok.

    Raises:
        SnapshotError: It was answered with an error.
        OperationTimeoutError: It was not answered.
    """
    message = client.session.msg(kind, dict(content))
    client.control_channel.send(message)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while True:
                reply = await client.get_control_msg()
                if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                    break
    except TimeoutError as error:
        raise errors.OperationTimeoutError(
            f"The kernel did not answer {kind} within {ANSWER_TIMEOUT_S:.0f} s", hint="Restart the kernel."
        ) from error
    said: Mapping[str, Any] = reply["content"]
    if said.get("status") != "ok":
        raise errors.SnapshotError(f"The kernel refuses: {said.get('evalue')}", hint="Restart the kernel.")
    return said


async def _answered(client: AsyncKernelClient, msg_id: str) -> None:
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        while (await client.get_shell_msg())["parent_header"].get("msg_id") != msg_id:
            pass
