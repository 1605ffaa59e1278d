"""The proxy of one kernel, as the keeper uses it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import Any, Final

from warmcell.kernel_provisioner.proxy.connection import Connection
from warmcell.kernel_provisioner.proxy.link import Answer, Word, refusal
from warmcell.kernel_provisioner.proxy.relay import Relay
from warmcell.sandbox.backends.threads import ended
from warmcell.sandbox.errors import ConflictError, OperationTimeoutError, SnapshotError, WarmcellError

MESSAGE_MAX_BYTES: Final = 256 * 2**20
"""Of one message of a kernel: all that it shows goes through one process that serves all kernels."""

_COMMAND_S: Final = 60.0
"""How long the relay's thread may take for a command before that is an error."""
_SILENCE_S: Final = 0.1


class KernelProxy:
    """Clients connect to it once; kernels behind it come and go.

    Requests that come while no kernel is connected, or before it is ready, wait (bounded) and are delivered.
    `shutdown_request`, `interrupt_request` and answers to `input()` are meant for the kernel of that moment and
    do not wait for the next one. For requests that were open when a kernel went away nothing is published:
    jupyter_client's restarter says `restarting` or `dead`, as for any other kernel.

    All methods are for one event loop; the work is done in a thread of its own.
    """

    def __init__(self, connection: Connection, *, name: str, message_max_bytes: int = MESSAGE_MAX_BYTES) -> None:
        """Nothing listens yet.

        Args:
            connection: Where clients come.
            name: Of the kernel, in logs.
            message_max_bytes: Of one message of the kernel, which is held as a whole. Instead of a larger one its
                clients are told that it is left out.
        """
        self.connection = connection
        self._name = name
        self._message_max_bytes = message_max_bytes
        self._relay: Relay | None = None
        self.moved_bytes = 0
        """What the kernel that was paused last has moved off its devices, as it says."""

    async def start(self) -> None:
        """Listen for clients.

        Raises:
            ConflictError: Somebody else listens at one of the addresses.
            InvalidRequestError: An address is not of this machine, or its directory cannot be used.
        """
        relay = Relay(self.connection, name=self._name, message_max_bytes=self._message_max_bytes)
        self._relay = relay
        try:
            await self._do(Relay.bind)
        except BaseException:
            await self.close()
            raise

    async def connect_guest(self, prefix: str, *, fresh: bool = True) -> None:
        """Speak with the kernel whose sockets are `ipc://{prefix}-1` to `-5`; one before it is dropped.

        Returns at once; `wait_ready` tells when it answers.

        Args:
            fresh: A kernel that begins, of which clients are told `starting`; False: one that goes on.
        """
        await self._do(lambda relay: relay.connect(prefix, fresh=fresh))

    async def drop_guest(self) -> None:
        """Carry over what the kernel has said so far, then close its side completely. Clients notice nothing."""
        await self._do(Relay.drop)

    async def rebind(self, connection: Connection | None = None) -> None:
        """Listen at the same paths again after they were removed, or at another connection's too.

        Connections that exist stay.

        Raises:
            ConflictError: Somebody else listens at one of the addresses.
            InvalidRequestError: An address is not of this machine, or its directory cannot be used.
        """
        await self._do(lambda relay: relay.bind(connection))
        self.connection = connection or self.connection

    async def wait_ready(self, *, timeout: float) -> dict[str, Any]:
        """Wait until the kernel has answered and its output is known to come through.

        Returns:
            The content of its `kernel_info_reply`.

        Raises:
            ConflictError: No kernel is connected.
            TransportError: The kernel went away before it was ready.
            OperationTimeoutError: `timeout` seconds have passed.
        """
        async with _deadline(timeout, "wait_ready"):
            info: dict[str, Any] = await asyncio.wrap_future(await self._do(Relay.wait_ready))
            return info

    async def interrupt(self) -> None:
        """Ask the kernel to interrupt what it runs; returns when it is asked.

        Raises:
            ConflictError: No kernel is connected.
        """
        await self._do(Relay.interrupt)

    # Kernels that are left alone and go on.

    async def pause(self, *, token: str, timeout: float, offload: str = "") -> tuple[str, ...]:
        """Let the kernel's own hooks prepare it, carry over all it has said, and close its side completely.

        Clients stay and their requests wait. What the kernel is in the middle of stays open: it goes on, in
        this process or in one that is restored from it.

        Args:
            token: What a kernel that is restored from this state has to show.
            timeout: Seconds that it may take.
            offload: Of which kind of device torch is to move what it has there to the host's memory, until `go_on`;
                `moved_bytes` is how much that was. Empty: nothing is moved.

        Returns:
            The msg_ids of the requests that it has and has not finished; `go_on` takes them as `inherited`.

        Raises:
            ConflictError: No kernel is connected that answers.
            SnapshotError: A hook of the kernel's refuses, in its words; the kernel runs on.
            UnsupportedOperationError: The kernel holds what cannot be saved; the kernel runs on.
            OperationTimeoutError: It did not answer in time; the kernel runs on.
            TransportError: It died meanwhile.
        """
        asking, given_up = await ended(self._do(lambda relay: relay.pauses.ask_leave(token, offload)))
        comms, leave, marked = asking.result()
        try:
            if given_up:
                raise asyncio.CancelledError
            async with _deadline(timeout, "pause"):
                said = await asyncio.wrap_future(leave)
                if said.get("status") != "ok":
                    raise refusal(said)
                moved = said.get("moved_bytes", 0)  # By a guest, which may say anything.
                self.moved_bytes = moved if isinstance(moved, int) and moved > 0 else 0
                await self._heard_all(marked)
            leaving, _ = await ended(self._do(lambda relay: relay.pauses.leave(comms)))
            left: tuple[str, ...] = leaving.result()
            return left  # Also if it was given up in that moment: only `go_on` undoes that.
        except BaseException:
            await self._undo(lambda relay: relay.pauses.stay())
            raise

    async def go_on(
        self,
        prefix: str,
        *,
        token: str,
        restored: bool,
        clone: bool = False,
        undone: bool = False,
        env: Mapping[str, str | None] | None = None,
        cwd: str = "",
        inherited: Collection[str] = (),
        timeout: float,
    ) -> None:
        """Connect to a kernel that was paused, once its output is known to come through, and let requests in.

        Args:
            restored: It was restored from a snapshot and has to show `token` and freshen itself before anything else
                reaches it; False: it is the same process.
            clone: It is one of several that were restored from the same snapshot.
            undone: It is what it was at an earlier moment, not the last.
            env: Variables that it is to have from now on; None takes one away.
            cwd: Where a restored kernel is to be; empty: where it was.
            inherited: What `pause` gave when the snapshot was taken. Of these, requests that a client of this proxy
                still awaits are answered as ever. What is said about the others is published, for their clients may
                have come along from another proxy, or dropped if the kernel is `undone`; either way it is busy until
                they are finished.

        Raises:
            ConflictError: A kernel is connected.
            SnapshotError: The kernel refuses; its side is closed again and requests go on waiting.
            OperationTimeoutError: It did not answer in time; as above.
            TransportError: It is gone; as above.
        """
        if restored:
            word = Word(
                "warmcell_after_restore_request", {"token": token, "clone": clone, "env": dict(env or {}), "cwd": cwd}
            )
        else:
            word = Word("warmcell_go_on_request", {"env": dict(env)} if env else {})
        names = tuple(inherited)
        connecting, given_up = await ended(
            self._do(lambda relay: relay.pauses.come_back(prefix, word, undone=undone, inherited=names))
        )
        answer = connecting.result()
        try:
            if given_up:
                raise asyncio.CancelledError
            async with _deadline(timeout, "go_on"):
                said = await asyncio.wrap_future(answer)
            if restored and said.get("token") != token:
                raise SnapshotError(
                    "The restored kernel is not the one that was saved",
                    hint="The snapshot cannot be trusted; remove it and restart the kernel.",
                )
            await self._do(lambda relay: relay.pauses.let_in())
        except BaseException:
            await self._undo(lambda relay: relay.pauses.give_up())
            raise

    async def suspended(
        self,
        *,
        on_wake: Callable[[], None],
        on_shutdown: Callable[[bool], None] | None = None,
        on_look: Callable[[], None] | None = None,
        on_interrupt: Callable[[], None] | None = None,
        info: Mapping[str, Any] | None = None,
        known_as: bytes = b"",
    ) -> None:
        """The kernel that was paused is away for long: answer for it what a page asks by itself.

        That ends with `go_on`, `awake` or another kernel. `kernel_info`, `comm_info` and `history` requests,
        `debugInfo` and interrupts are answered here. A shutdown is acknowledged. Everything else waits for the kernel.

        Args:
            on_wake: Called once, in this event loop, when something waits that only the kernel can do; at once if
                something does already.
            on_shutdown: Called in this event loop when a client shuts the kernel down, with its wish to restart.
            on_look: Called in this event loop when a client asks what kernel this is, as a page does that is opened.
            on_interrupt: Called in this event loop when a client interrupts the kernel.
            info: The content of the kernel's kernel_info reply, for a proxy that has never spoken with it.
            known_as: Likewise that of the proxy which has; see the property.

        Raises:
            ConflictError: A kernel is connected.
        """
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # The loop is closed.
                loop.call_soon_threadsafe(on_wake)

        def shut_down(restart: bool) -> None:
            if on_shutdown is not None:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(on_shutdown, restart)

        def look() -> None:
            if on_look is not None:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(on_look)

        def interrupt() -> None:
            if on_interrupt is not None:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(on_interrupt)

        await self._do(
            lambda relay: relay.pauses.suspended(
                info=info, known_as=known_as, on_wake=wake, on_shutdown=shut_down, on_look=look, on_interrupt=interrupt
            )
        )

    async def refuse(self, error: WarmcellError) -> None:
        """Answer what waits for a kernel that could not be woken with this error; the next request wakes it again."""
        await self._do(lambda relay: relay.pauses.refuse(error))

    async def awake(self) -> None:
        """Answer for the kernel no more; requests wait for it. Idempotent."""
        await self._do(lambda relay: relay.pauses.awake())

    async def end_open_requests(self, *, asked_by: str = "") -> None:
        """Give up the kernel's present state for an earlier one, which is to come with `go_on`.

        What it has said is carried over and its side is closed. The cell that asked for it is answered with ok, what
        it had begun or was asked before that is answered as aborted. Requests that came after wait for the
        restored kernel, before those that wait already.

        Args:
            asked_by: msg_id of the cell that asked for it; empty: nobody did in a cell.
        """
        await self._do(lambda relay: relay.pauses.end_open_requests(asked_by))

    async def tell(self, text: str) -> None:
        """Say something to all clients, as what was said on stderr."""
        await self._do(lambda relay: relay.tell(text))

    @property
    def known_as(self) -> bytes:
        """The identity under which the kernel knows the proxy, and answers what it was asked in an earlier life."""
        return self._relay.known_as if self._relay else b""

    async def kernel_info(self) -> Mapping[str, Any] | None:
        """The content of the kernel's last kernel_info reply, for `suspended` of another proxy."""
        found: Mapping[str, Any] | None = await self._do(Relay.info)
        return found

    async def close(self) -> None:
        """End the proxy; its socket files are gone afterwards. Idempotent."""
        relay, self._relay = self._relay, None
        if relay is not None:
            relay.submit(relay.close)
            await asyncio.to_thread(relay.join, _COMMAND_S)

    @property
    def last_activity(self) -> float:
        """Unix time of the last request or output, in seconds; 0 before `start`."""
        return self._relay.activity.last if self._relay else 0.0

    @property
    def busy(self) -> bool:
        """Whether something runs or waits to run."""
        return self._relay is not None and self._relay.activity.busy

    @property
    def open_requests(self) -> int:
        """Requests of clients that are not finished, those that wait for a kernel included."""
        return self._relay.activity.open_requests if self._relay else 0

    @property
    def cell(self) -> int | None:
        """Number of the last cell that the kernel has begun; None where that is not known."""
        return self._relay.activity.cell if self._relay else None

    def count_from(self, cell: int | None) -> None:
        """The kernel was brought back from when this was its last cell; one that it has begun since stays."""
        if self._relay is not None and self._relay.activity.cell is None:
            self._relay.activity.cell = cell

    @property
    def idle_s(self) -> float:
        """Seconds since the last request was finished and the last output came; 0 while a request is open.

        What a page asks by itself counts for neither.
        """
        return self._relay.activity.idle_s if self._relay else 0.0

    async def _heard_all(self, marked: Answer) -> None:
        """Wait until the mark has come. A kernel that keeps it with its other output is silent instead."""
        heard = asyncio.ensure_future(asyncio.wrap_future(marked))
        while not (await asyncio.wait({heard}, timeout=_SILENCE_S))[0]:
            if await self._do(lambda relay: relay.pauses.silent()):
                return
        heard.result()

    async def _undo(self, command: Callable[[Relay], None]) -> None:
        """Run a command to its end even if the caller is cancelled, and whatever has become of the proxy."""
        with contextlib.suppress(WarmcellError):
            await asyncio.shield(self._do(command))

    async def _do(self, command: Callable[[Relay], Any]) -> Any:
        relay = self._relay
        if relay is None:
            raise ConflictError("The kernel's proxy is not running", hint="Start the kernel again.")
        async with asyncio.timeout(_COMMAND_S):
            return await asyncio.wrap_future(relay.submit(lambda: command(relay)))


@contextlib.asynccontextmanager
async def _deadline(timeout: float, operation: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout):
            yield
    except OperationTimeoutError:
        raise
    except TimeoutError:
        raise OperationTimeoutError(
            f"The kernel did not answer within {timeout:g} s",
            hint="Restart it; the keeper's log and the sandbox's state say what it does.",
            details={"operation": operation, "timeout": timeout},
        ) from None
