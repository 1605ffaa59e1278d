"""The keeper's own connection to a kernel that nobody uses yet: a template, or one that waits in the pool."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any

import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient

from warmcell.sandbox import errors
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.live import LiveSandbox

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0
REHEARSAL_TIMEOUT_S = 20.0
"""Of each step. One that waits is of no use if it takes longer, and another one is made."""
WARMUP_TIMEOUT_S = 300.0
WARMUP = "warm-up"
"""Stands among the modules that failed."""

WELCOME_TIMEOUT_S = 2.0
"""Older kernels have no welcome."""
IDLE_TIMEOUT_S = 10.0
"""After a reply, for the word that ends its request. Nothing breaks without it."""

FIRST_CELL = "get_ipython().display_formatter.format(0); print(flush=True)"

_FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


class TemplateFront:
    """Implements `Frontend` for a template: has it settle before it is saved, and speaks with it no more."""

    def __init__(self, box: LiveSandbox) -> None:
        self._box = box
        self._failed: dict[str, str] = {}

    def record(self) -> Mapping[str, Any]:
        """What it has imported."""
        status = self._box.info.template
        if status is None:
            return {"template": {}}
        return {"template": dataclasses.replace(status, failed={**status.failed, **self._failed}).to_json()}

    async def pause(self, *, token: str, offload: str = "") -> int:
        """Wait until it answers, run a cell in it as its first, and the warm-up if there is one, and leave it.

        A warm-up that fails is told with what could not be imported; the template is without it.

        Raises:
            OperationTimeoutError: It does not answer, or the warm-up does not end.
        """
        assert self._box.kernel is not None
        async with connected(self._box.kernel) as client:
            try:
                async with asyncio.timeout(READY_TIMEOUT_S):
                    await client._async_wait_for_ready(timeout=READY_TIMEOUT_S)
                # What every kernel's first cell would load, and its first result, of which nothing is kept.
                await _first_cell(client)
            except TimeoutError as error:
                raise errors.OperationTimeoutError(
                    "The template's kernel does not answer", hint="Try again."
                ) from error
            if self._box.spec.warmup:
                await self._warm_up(client, self._box.spec.warmup)
            await ask(client, "warmcell_before_snapshot_request", {"token": token, "template": True})
        return 0

    async def _warm_up(self, client: AsyncKernelClient, what: str) -> None:
        try:
            said = await _executed(client, warmup_code(what), timeout_s=WARMUP_TIMEOUT_S)
        except TimeoutError as error:
            raise errors.OperationTimeoutError(
                f"The warm-up did not end within {WARMUP_TIMEOUT_S:.0f} s",
                hint="Take it out of the kernelspec, or have it do less.",
                details={"operation": WARMUP, "timeout": WARMUP_TIMEOUT_S},
            ) from error
        if said.get("status") != "ok":
            self._failed[WARMUP] = f"{said.get('ename')}: {said.get('evalue')}"[:500]
            log.warning("the warm-up of template %s failed: %s", self._box.spec.template, self._failed[WARMUP])

    async def go_on(
        self,
        kernel: KernelProcess,
        record: Mapping[str, Any],
        *,
        token: str,
        restored: bool,
        clone: bool,
        undone: bool = False,
    ) -> None:
        """Nobody speaks with it any more."""

    async def undone(self) -> None:
        """It has no requests."""

    async def sleep(self, record: Mapping[str, Any]) -> None:
        """It has no clients."""


async def rehearse(box: LiveSandbox) -> None:
    """Have a kernel that waits in a prepared sandbox come to life, run a first cell, and wait again.

    A restored kernel gets each page that it writes for the first time by a fault, some two thousand until its first
    reply. Now nobody waits for that.

    Raises:
        WarmcellError: It does not answer, and is of no use.
    """
    kernel = box.kernel
    if kernel is None or not kernel.token:
        return
    token, kernel.token = kernel.token, ""
    again = secrets.token_hex(16)
    async with connected(kernel) as client:
        await _subscribed(client)
        woken = {"token": token, "clone": True}
        await ask(client, "warmcell_after_restore_request", woken, timeout_s=REHEARSAL_TIMEOUT_S)
        try:
            await _first_cell(client, timeout_s=REHEARSAL_TIMEOUT_S)
        except TimeoutError as error:
            raise errors.OperationTimeoutError("A prepared kernel does not answer", hint="Try again.") from error
        await ask(client, "warmcell_before_snapshot_request", {"token": again}, timeout_s=REHEARSAL_TIMEOUT_S)
    kernel.token = again


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


async def ask(
    client: AsyncKernelClient, kind: str, content: Mapping[str, Any], *, timeout_s: float = ANSWER_TIMEOUT_S
) -> Mapping[str, Any]:
    """A request on its control channel, answered with ok.

    Raises:
        SnapshotError: It was answered with an error.
        OperationTimeoutError: It was not answered.
    """
    message = client.session.msg(kind, dict(content))
    client.control_channel.send(message)
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                reply = await client.get_control_msg()
                if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                    break
    except TimeoutError as error:
        raise errors.OperationTimeoutError(
            f"The kernel did not answer {kind} within {timeout_s:.0f} s", hint="Restart the kernel."
        ) from error
    said: Mapping[str, Any] = reply["content"]
    if said.get("status") != "ok":
        raise errors.SnapshotError(f"The kernel refuses: {said.get('evalue')}", hint="Restart the kernel.")
    return said


def warmup_code(what: str) -> str:
    """The cell that does it and leaves no name behind."""
    function = _FUNCTION.fullmatch(what.strip())
    if function is not None:
        return f"__import__('importlib').import_module({function[1]!r}).{function[2]}()"
    return f"exec(compile({json.dumps(what)}, '<{WARMUP}>', 'exec'), {{'__name__': '__warmup__'}})"


async def _subscribed(client: AsyncKernelClient) -> None:
    """Wait until what it says comes through, which its welcome proves: else the end of a cell could go unheard."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WELCOME_TIMEOUT_S):
            await client.get_iopub_msg()


async def _first_cell(client: AsyncKernelClient, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Run it to its very end: what is said of it later would be kept for whoever comes next.

    Raises:
        TimeoutError: There was no reply.
    """
    msg_id = client.execute(FIRST_CELL, silent=False, store_history=False)
    await _reply(client, msg_id, timeout_s=timeout_s)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            while True:
                said = await client.get_iopub_msg()
                if said["parent_header"].get("msg_id") == msg_id and said["content"].get("execution_state") == "idle":
                    return


async def _executed(client: AsyncKernelClient, code: str, *, timeout_s: float) -> Mapping[str, Any]:
    """The reply to a cell that nobody sees.

    Raises:
        TimeoutError: There was none.
    """
    return await _reply(client, client.execute(code, silent=True, store_history=False), timeout_s=timeout_s)


async def _reply(client: AsyncKernelClient, msg_id: str, *, timeout_s: float) -> Mapping[str, Any]:
    async with asyncio.timeout(timeout_s):
        while (reply := await client.get_shell_msg())["parent_header"].get("msg_id") != msg_id:
            pass
    content: Mapping[str, Any] = reply["content"]
    return content
