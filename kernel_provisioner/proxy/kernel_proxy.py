"""The proxy of one kernel, as the keeper uses it."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from warmcell.kernel_provisioner.proxy.connection import Connection
from warmcell.kernel_provisioner.proxy.relay import Relay
from warmcell.sandbox.errors import ConflictError, OperationTimeoutError

_COMMAND_S: Final = 10.0
"""How long the relay's thread may take for a command before that is an error."""


class KernelProxy:
    """Clients connect to it once; kernels behind it come and go.

    Requests that come while no kernel is connected, or before it is ready, wait (bounded) and are delivered.
    `shutdown_request`, `interrupt_request` and answers to `input()` are meant for the kernel of that moment and
    do not wait for the next one. For requests that were open when a kernel went away nothing is published:
    jupyter_client's restarter says `restarting` or `dead`, as for any other kernel.

    All methods are for one event loop; the work is done in a thread of its own.
    """

    def __init__(self, connection: Connection, *, name: str) -> None:
        self.connection = connection
        self._name = name
        self._relay: Relay | None = None

    async def start(self) -> None:
        """Listen for clients.

        Raises:
            ConflictError: Somebody else listens at one of the addresses.
            InvalidRequestError: An address is not of this machine, or its directory cannot be used.
        """
        relay = Relay(self.connection, name=self._name)
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
        try:
            async with asyncio.timeout(timeout):
                info: dict[str, Any] = await asyncio.wrap_future(await self._do(Relay.wait_ready))
                return info
        except TimeoutError:
            raise OperationTimeoutError(
                f"The kernel did not answer within {timeout:g} s",
                hint="Restart it; the keeper's log and the sandbox's state say what it does.",
                details={"operation": "wait_ready", "timeout": timeout},
            ) from None

    async def interrupt(self) -> None:
        """Ask the kernel to interrupt what it runs; returns when it is asked.

        Raises:
            ConflictError: No kernel is connected.
        """
        await self._do(Relay.interrupt)

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

    async def _do(self, command: Callable[[Relay], Any]) -> Any:
        relay = self._relay
        if relay is None:
            raise ConflictError("The kernel's proxy is not running", hint="Start the kernel again.")
        async with asyncio.timeout(_COMMAND_S):
            return await asyncio.wrap_future(relay.submit(lambda: command(relay)))
