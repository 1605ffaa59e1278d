"""The keeper as a client of one of its own kernels, through the kernel's proxy: it stays connected whatever becomes of
the process behind.
"""

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

import zmq.asyncio
from jupyter_client.asynchronous.client import AsyncKernelClient

from warmcell.extension.keeper.agents.ahead import Ahead, Message
from warmcell.extension.keeper.agents.shown import note
from warmcell.extension.keeper.death import death
from warmcell.extension.keeper.kernel import Kernel
from warmcell.extension.keeper.rank_steps import SHOWN, SILENCE_S, TRAVELS
from warmcell.kernel_provisioner.proxy.wire import MalformedMessageError, Signer, parse
from warmcell.sandbox import errors
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.live import LiveSandbox

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
ASK_AGAIN_S = 0.25
EXIT_S = 10.0
"""For how long a kernel may take to end that its code has ended."""

REPLY_S = 60.0
"""For how long a kernel may owe the reply to a cell after whose end nothing more is said."""

HELD_UP_S = 0.25
"""For how long one cell that is followed slowly may hold up the others of its kernel."""

REFUSAL_MAX = 2000
"""Characters of a kernel's reason."""

UNHEARD = note("[The end of this output did not come]\n")


class KernelClient:
    """Sends cells to a kernel and to its contexts, and hears what they show."""

    def __init__(self, context: "zmq.asyncio.Context", kernel: Kernel) -> None:
        self._kernel = kernel
        connection = kernel.request.connection
        ports = {name: connection[name] for name in connection if name.endswith("_port")}
        self._client = AsyncKernelClient(context=context, transport="ipc", ip=connection["ip"], **ports)
        self._client.session.key = str(connection["key"]).encode()
        self._signer = Signer(self._client.session.key, "hmac-sha256")
        self._client.start_channels(stdin=False, hb=False, control=False)  # Descriptors: a thousand may wait.
        self._heard = False
        self._proving = asyncio.Lock()
        self._shown: dict[str, Ahead] = {}
        """What is published of each cell that runs, by the id of its request."""
        self._replies: dict[str, asyncio.Future[Message]] = {}
        self._hearing: dict[str, asyncio.Task[None]] = {}

    async def ready(self) -> None:
        """Wait until what the kernel says reaches us.

        Raises:
            OperationTimeoutError: It does not.
        """
        async with self._proving:  # Two who listen at once would take each other's messages.
            if self._heard:
                return
            try:
                async with asyncio.timeout(READY_TIMEOUT_S):
                    await self._published()
            except TimeoutError as error:
                raise errors.OperationTimeoutError(
                    f"The sandbox's kernel did not answer within {READY_TIMEOUT_S:.0f} s", hint="Try again, or kill it."
                ) from error
            self._heard = True

    async def execute(
        self, code: str, box: LiveSandbox, *, silent: bool = False, lent: Mapping[str, str] | None = None
    ) -> AsyncGenerator[Message]:
        """Messages of one cell, last its `reply`. Whoever closes this early leaves the cell running.

        Args:
            code: Of the cell.
            box: The sandbox as it is now.
            silent: Nothing of it is shown, and it has no number.
            lent: Variables of the environment that are there for this cell alone.

        Raises:
            SandboxDiedError: The kernel has ended.
        """
        oom_before = box.oom_kills()
        # Or else what is sent right after an error would be thrown away, with what is already queued behind it.
        content = _content(code, silent=silent, lent=lent)
        message = self._client.session.msg("execute_request", content)
        with self._following(message["header"]["msg_id"]) as shown, self._awaiting(message) as reply:
            await self._send(message, "shell")
            died = asyncio.create_task(self._died())
            try:
                async for each in self._until_idle(shown, reply, died, box, oom_before):
                    yield each
                await asyncio.wait(_both(reply, died), timeout=REPLY_S, return_when=asyncio.FIRST_COMPLETED)
                if died.done() and not reply.done():
                    raise self._death(died.result(), box, oom_before)
                said = _content_of(reply)
                if _asks_to_exit(said):  # It ends a moment later, and so would what comes until then.
                    await asyncio.wait({died}, timeout=EXIT_S)
                yield {"msg_type": "reply", "content": said, "metadata": {}}
            finally:
                died.cancel()
                await asyncio.gather(died, return_exceptions=True)

    async def execute_in(
        self,
        context: Mapping[str, Any],
        code: str,
        box: LiveSandbox,
        *,
        name: str,
        env: Mapping[str, str],
        lent: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Message]:
        """As `execute`, in one of the kernel's further contexts, whose process is started if it has none.

        Args:
            context: Its id and directory, as the guest knows them.
            code: Of the cell.
            box: The sandbox as it is now.
            name: By which `interrupt` knows the cell.
            env: Variables of the environment that are set first.
            lent: Those that are there for this cell alone.

        Raises:
            SandboxDiedError: The kernel, or the process of the context, has ended.
            WarmcellError: The context cannot be had.
        """
        asked = {**context, "action": "run", "content": _content(code, lent=lent), "env": dict(env)}
        async for message in self._in_context(asked, box, name=name):
            yield message

    async def start(self, context: Mapping[str, Any], box: LiveSandbox) -> None:
        """Start the process of a context and wait until it is up; raises as `execute_in`."""
        async for _ in self._in_context({**context, "action": "start"}, box):
            pass

    async def interrupt(self, context: str, name: str) -> None:
        """Interrupt a cell of a context, or have it never begin."""
        await self._ask({"action": "interrupt", "context": context, "run": name})

    async def end(self, context: str) -> None:
        """End the process of a context, if it has one."""
        await self._ask({"action": "end", "context": context})

    def close(self) -> None:
        """Let go of the kernel. Idempotent."""
        for task in self._hearing.values():
            task.cancel()
        self._hearing.clear()
        with contextlib.suppress(RuntimeError):
            self._client.stop_channels()

    async def _in_context(
        self, asked: Mapping[str, Any], box: LiveSandbox, *, name: str = ""
    ) -> AsyncGenerator[Message]:
        oom_before = box.oom_kills()
        header = self._client.session.msg_header("execute_request")
        if name:
            header["msg_id"] = name
        with self._following(header["msg_id"]) as shown:
            died = asyncio.create_task(self._died())
            said: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            try:
                await self._ask({**asked, "header": header})
                async for each in self._until_idle(shown, said, died, box, oom_before):
                    yield each
            finally:
                died.cancel()
                await asyncio.gather(died, return_exceptions=True)
            content = _content_of(said)
            if content.get("status") == "died":
                why, code = content.get("why"), content.get("exit_code")
                who = f"The context could not start: {why}. It" if isinstance(why, str) and why else "The context"
                oom = box.oom_kills() > oom_before
                code = code if isinstance(code, int) else 0
                raise death(code, oom_killed=oom, spec=box.spec, who=who, again=_AGAIN)
            if _asks_to_exit(content):
                await self.end(asked["context"])
            yield {"msg_type": "reply", "content": content, "metadata": {}}

    async def _until_idle(
        self,
        shown: Ahead,
        reply: "asyncio.Future[Message]",
        died: "asyncio.Task[KernelProcess]",
        box: LiveSandbox,
        oom_before: int,
    ) -> AsyncGenerator[Message]:
        """What is shown of a cell. A reply that comes among it, as those of contexts do, is `reply`'s result.

        Raises:
            SandboxDiedError: The kernel has ended.
        """
        hearing: asyncio.Task[Message] | None = None
        try:
            while True:
                hearing = hearing or asyncio.create_task(shown.take())
                waited: set[asyncio.Future[Any]] = {hearing, died, *self._hearing.values()}
                if not reply.done():
                    waited.add(reply)
                done, _ = await asyncio.wait(
                    waited, timeout=SILENCE_S if reply.done() else None, return_when=asyncio.FIRST_COMPLETED
                )
                for listening in done.intersection(self._hearing.values()):
                    listening.result()  # It ends only by an error.
                if hearing in done:
                    message, hearing = hearing.result(), None
                    if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                        return
                    if message["msg_type"] == "execute_reply" and not reply.done():
                        reply.set_result(message)
                    elif message["msg_type"] in SHOWN:
                        yield {key: message[key] for key in ("msg_type", "content", "metadata")}
                elif died in done:
                    raise self._death(died.result(), box, oom_before)
                elif not done:
                    log.warning("sandbox %s: the end of a cell's output did not come", box.info.id)
                    yield dict(UNHEARD)
                    return
        finally:
            if hearing is not None:
                hearing.cancel()
                await asyncio.gather(hearing, return_exceptions=True)

    async def _ask(self, content: Mapping[str, Any]) -> None:
        """Ask the kernel something about a context.

        Raises:
            InvalidRequestError: It has not the directory that was asked for.
            ConflictError: It has too many.
            SandboxDiedError: The kernel has ended.
            OperationTimeoutError: It does not know of such requests.
        """
        message = self._client.session.msg("warmcell_context_request", dict(content))
        died = asyncio.create_task(self._died())
        try:
            with self._awaiting(message) as reply:
                await self._send(message, "control")
                await asyncio.wait(_both(reply, died), timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
                if not reply.done():
                    if died.done():
                        raise errors.SandboxDiedError("The kernel has ended", hint="Run it again.")
                    raise errors.OperationTimeoutError(
                        "The kernel does not answer about its contexts",
                        hint="It was saved by another version: kill the sandbox, or use its default context.",
                    )
                answer = reply.result()["content"]
        finally:
            died.cancel()
            await asyncio.gather(died, return_exceptions=True)
        if answer.get("status") != "ok":
            raise _refusal(answer)

    # What the kernel says, taken to whoever waits for it.

    @contextlib.contextmanager
    def _following(self, name: str) -> "Iterator[Ahead]":
        self._hear("iopub")
        shown = self._shown[name] = Ahead()
        try:
            yield shown
        finally:
            del self._shown[name]
            shown.close()

    @contextlib.contextmanager
    def _awaiting(self, message: Message) -> "Iterator[asyncio.Future[Message]]":
        """The reply to a request that is about to be sent."""
        reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        name = message["header"]["msg_id"]
        self._replies[name] = reply
        try:
            yield reply
        finally:
            del self._replies[name]
            reply.cancel()

    async def _send(self, message: Message, channel: str) -> None:
        """By the socket's asynchronous side: past that, it would take notice of what has come and wake nobody."""
        self._hear(channel)
        await self._channel(channel).socket.send_multipart(self._client.session.serialize(message))

    def _hear(self, channel: str) -> None:
        if channel not in self._hearing or self._hearing[channel].done():
            self._hearing[channel] = asyncio.create_task(self._listen(self._channel(channel)))

    def _channel(self, name: str) -> Any:
        return getattr(self._client, f"{name}_channel")

    async def _listen(self, channel: Any) -> None:
        while True:
            frames: list[bytes] = await channel.socket.recv_multipart()
            parent, message = self._read(frames)
            shown, reply = self._shown.get(parent), self._replies.get(parent)
            if reply is not None and not reply.done() and message["msg_type"].endswith("_reply"):
                reply.set_result(message)
            elif shown is not None:
                await self._make_room(shown)
                shown.add(message, sum(map(len, frames)))

    def _read(self, frames: list[bytes]) -> tuple[str, Message]:
        """What came, and the id of the request that it belongs to; empty where it is no message: whatever runs in the
        sandbox may have written it.
        """
        try:
            said = parse(frames)
            kind, (_, parent), content = said.read_header()[0], said.read_parent(), said.read_content()
            message = {"msg_type": kind, "content": content, "metadata": said.read_metadata()}
        except MalformedMessageError:
            return "", {}
        ours = hmac.compare_digest(said.signature, self._signer.sign(said.signed))
        return (parent, message) if ours else ("", {})

    async def _published(self) -> None:
        """Ask again and again: what is published before iopub is connected is lost."""
        iopub = self._channel("iopub").socket
        while True:
            asked = self._client.kernel_info()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_AGAIN_S):
                    while self._read(await iopub.recv_multipart())[0] != asked:
                        continue
                    return

    async def _make_room(self, shown: Ahead) -> None:
        """Wait for whoever follows that cell, as long as the kernel has no other cell: what is one's own pace, all
        others would have to keep to.
        """
        while shown.full and not shown.losing and not await shown.room(HELD_UP_S):
            if len(self._shown) > 1:
                return

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
        oom = box.oom_kills() > oom_before
        return death(process.exit_code or 0, oom_killed=oom, spec=box.spec, again=_KERNEL_AGAIN)


_KERNEL_AGAIN = "Run it again, in a kernel that begins anew, without its variables"
_AGAIN = "Run it again, in a context that begins anew, without its variables"


def _content(code: str, *, silent: bool = False, lent: Mapping[str, str] | None = None) -> Message:
    return {
        **({TRAVELS: {"env": dict(lent)}} if lent else {}),
        **{"code": code, "silent": silent, "store_history": not silent, "user_expressions": {}},
        **{"allow_stdin": False, "stop_on_error": False},
    }


def _content_of(reply: "asyncio.Future[Message]") -> Mapping[str, Any]:
    """What a reply says; raises ProtocolError where none has come, or none that says how it went."""
    content: Mapping[str, Any] = reply.result()["content"] if reply.done() else {}
    if not isinstance(content.get("status"), str):
        raise errors.ProtocolError("A cell ended without a reply", hint="Restart its context, or kill the sandbox.")
    return content


def _asks_to_exit(content: Mapping[str, Any]) -> bool:
    """Whether a cell has called `exit()`, which ends its kernel."""
    payload = content.get("payload")
    found = payload if isinstance(payload, list) else []
    return any(isinstance(one, dict) and one.get("source") == "ask_exit" and not one.get("keepkernel") for one in found)


def _both(*waited: "asyncio.Future[Any]") -> "set[asyncio.Future[Any]]":
    return set(waited)


def _refusal(answer: Mapping[str, Any]) -> errors.WarmcellError:
    words, hint = (str(answer.get(name) or "")[:REFUSAL_MAX] for name in ("evalue", "hint"))
    if answer.get("ename") in ("FileNotFoundError", "NotADirectoryError", "PermissionError"):
        return errors.InvalidRequestError(
            f"The context cannot begin there: {words}", hint="Name a directory of the sandbox's."
        )
    if answer.get("ename") == "ConflictError":
        return errors.ConflictError(words, hint=hint or "End another context.")
    return errors.BackendError(f"The context cannot be started: {words}", hint=hint or "Restart the sandbox.")
