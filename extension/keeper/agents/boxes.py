"""The sandboxes that code has asked for, and what hangs on each: its commands, its runs, a connection to its kernel."""

import dataclasses
import math
from collections.abc import Mapping

import zmq.asyncio

from warmcell.extension.keeper.agents.agent_kernels import AgentKernels
from warmcell.extension.keeper.agents.commands import Commands
from warmcell.extension.keeper.agents.kernel_client import KernelClient
from warmcell.extension.keeper.agents.runs import KernelRuns
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.sandbox import errors
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import NetworkPolicy, SandboxId, SandboxInfo
from warmcell.sandbox.service import SandboxService

SIGINT = 2

CONNECTED_MAX = 64
"""Kernels that the keeper stays connected to while no code runs there. A connection takes six descriptors."""


class AgentBox:
    """What hangs on one such sandbox."""

    def __init__(self, agents: "Boxes", sandbox_id: SandboxId) -> None:
        self._agents = agents
        self.sandbox_id = sandbox_id
        self.frozen_at: float | None = None
        """Unix time since when it stands still in memory; None while it does not."""
        self.client: KernelClient | None = None
        self.commands = Commands()
        self.runs = KernelRuns(
            lambda: agents.live(sandbox_id),
            self._connected,
            lambda: agents.interrupt(sandbox_id),
            agents.kernels.of(sandbox_id).request.contexts,
            lambda contexts: agents.note_contexts(sandbox_id, contexts),
        )

    async def close(self) -> None:
        """The sandbox is gone. Idempotent."""
        await self.runs.close()
        await self.commands.close()
        self.disconnect()

    async def _connected(self) -> KernelClient:
        """A client of its kernel, which is started again if it has ended."""
        kernel = await self._agents.kernels.running(self.sandbox_id)
        if self.client is None:
            self.client = KernelClient(self._agents.context, kernel)
        await self.client.ready()
        self._agents.connected(self)
        return self.client

    def disconnect(self) -> None:
        """Let go of its kernel until the next run. Idempotent."""
        if self.client is not None:
            self.client.close()
            self.client = None


class Boxes:
    """Those of one keeper, found by their id."""

    def __init__(self, service: SandboxService, kernels: Kernels, memory: KernelMemory) -> None:
        """There are none yet.

        Args:
            service: Has the sandboxes.
            kernels: Has their kernels.
            memory: Saves them.
        """
        self.context = zmq.asyncio.Context()
        self.kernels = AgentKernels(service, kernels, memory)
        self._service = service
        self._kernels = kernels
        self._memory = memory
        self._boxes: dict[SandboxId, AgentBox] = {}
        self._connected: dict[SandboxId, AgentBox] = {}
        """To whose kernels there are connections, those that were used last at the end."""

    def owns(self, sandbox_id: SandboxId) -> bool:
        """Whether code has asked for it; False where there is no such sandbox."""
        try:
            return self._service.info(sandbox_id).terms is not None
        except errors.SandboxNotFoundError:
            return False

    def of(self, sandbox_id: SandboxId) -> AgentBox:
        """What hangs on one, whatever its state.

        Raises:
            SandboxNotFoundError: There is no such sandbox.
            UnsupportedOperationError: Nobody has asked for it in that way.
            WarmcellError: It never came up; this is why.
        """
        info = self._service.info(sandbox_id)
        if info.terms is None:
            raise errors.UnsupportedOperationError(
                f"Sandbox {sandbox_id} is a notebook's, or another sandbox's", hint="Make one with warmcell.Sandbox()."
            )
        if sandbox_id not in self._boxes:
            if info.error is not None and info.state is State.FAILED:
                raise errors.from_json(info.error.to_json())
            self._boxes[sandbox_id] = AgentBox(self, sandbox_id)
        return self._boxes[sandbox_id]

    def live(self, sandbox_id: SandboxId) -> LiveSandbox:
        """The sandbox as it is now; raises SandboxNotFoundError."""
        return self._service.live(sandbox_id)

    def busy(self, sandbox_id: SandboxId) -> bool:
        """Whether code or a command runs in it that was sent from here."""
        box = self._boxes.get(sandbox_id)
        return box is not None and (box.runs.busy or box.commands.running > 0)

    def idle_s(self, sandbox_id: SandboxId) -> float:
        """Seconds since a command has ended there; 0 while one runs. What its kernel does is not looked at."""
        box = self._boxes.get(sandbox_id)
        return math.inf if box is None else box.commands.idle_s

    def connected(self, box: AgentBox) -> None:
        """Its kernel is about to be used. Of those that were used longest ago too many are let go of."""
        self._connected.pop(box.sandbox_id, None)
        self._connected[box.sandbox_id] = box
        idle = [one for one in self._connected.values() if not one.runs.in_use]
        for one in idle[: max(0, len(self._connected) - CONNECTED_MAX)]:
            one.disconnect()
            del self._connected[one.sandbox_id]

    async def interrupt(self, sandbox_id: SandboxId) -> None:
        """Interrupt what its kernel does, if anything."""
        await self._kernels.signal(self.kernels.of(sandbox_id).request.kernel_id, SIGINT)

    def note_contexts(self, sandbox_id: SandboxId, contexts: Mapping[str, str]) -> None:
        """For snapshots of it."""
        kernel = self.kernels.of(sandbox_id)
        kernel.request = dataclasses.replace(kernel.request, contexts=dict(contexts))

    async def set_network(self, sandbox_id: SandboxId, policy: NetworkPolicy | None) -> SandboxInfo:
        """Have it reach what that says, and its kernel know; raises as `of` and `SandboxService.set_network`."""
        box = self.of(sandbox_id)
        info = await self._service.set_network(sandbox_id, policy)
        live, kernel = self.live(sandbox_id), self.kernels.of(sandbox_id)
        kernel.request = dataclasses.replace(
            kernel.request, spec=dataclasses.replace(kernel.request.spec, egress=live.spec.egress)
        )
        if info.state is State.RUNNING:  # Else it is told as it comes back.
            box.runs.tell(await live.network_environment())
        return info

    async def forget(self, sandbox_id: SandboxId) -> None:
        """Let go of what hangs on a sandbox that has ended. Idempotent."""
        self.kernels.forget(sandbox_id)
        self._connected.pop(sandbox_id, None)
        box = self._boxes.pop(sandbox_id, None)
        if box is not None:
            await box.close()
