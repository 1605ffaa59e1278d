"""A kernel's proxy as the engine uses it when it saves the kernel's memory or brings it back."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from warmcell.extension.keeper.death import unless_dead
from warmcell.extension.keeper.kernel import Kernel
from warmcell.sandbox import guest_files
from warmcell.sandbox.gpus.environment import environment as gpu_environment
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import GpuDevice

PAUSE_TIMEOUT_S = 60.0
"""For the user's hooks before a snapshot, and what the kernel still has to say."""

GO_ON_TIMEOUT_S = 60.0
"""For the user's hooks after a restore."""


OFFLOAD_TIMEOUT_S = 180.0
"""More than that, for a kernel that moves what it has on its GPU: 80 GiB at 0.5 GiB/s."""


class Front:
    """Implements `Frontend` for a kernel of the keeper's."""

    def __init__(
        self,
        kernel: Kernel,
        box: LiveSandbox,
        *,
        before: Callable[[LiveSandbox], Awaitable[None]],
        followed: Callable[[Kernel, KernelProcess, LiveSandbox], None],
        wake: Callable[[Kernel], None],
        looked_at: Callable[[LiveSandbox], None],
        interrupted: Callable[[LiveSandbox], None],
    ) -> None:
        """Nothing is done yet.

        Args:
            kernel: Whose proxy it is.
            box: The sandbox that its process is in.
            before: Makes what the guest needs in a run directory that may be new.
            followed: Told of the process that the kernel has from now on.
            wake: Told that a client wants something of a kernel that sleeps.
            looked_at: Told that a page was opened whose kernel sleeps.
            interrupted: Told that a client interrupts a kernel that sleeps, and may be waiting to go on.
        """
        self._kernel = kernel
        self._box = box
        self._before = before
        self._followed = followed
        self._wake = wake
        self._looked_at = looked_at
        self._interrupted = interrupted
        self._inherited: tuple[str, ...] = ()
        self._info: Mapping[str, Any] = {}
        self._moved_bytes = 0
        """What the kernel has moved off its GPUs by itself, and has to bring back before it goes on."""
        self._gpus: tuple[GpuDevice, ...] = ()
        """Those that the kernel has been told of."""

    def record(self) -> Mapping[str, Any]:
        """The request that the kernel was started with, and what it was in the middle of."""
        return {
            "request": self._kernel.request.to_json(),
            "inherited": list(self._inherited),
            "known_as": self._kernel.proxy.known_as.hex(),
            "info": self._info,
            "asks": self._kernel.asks,
            "cell": self._kernel.proxy.cell,
        }

    async def pause(self, *, token: str, offload: str = "") -> int:
        """Leave the kernel; see the port."""
        proxy = self._kernel.proxy
        self._gpus = self._box.gpus
        timeout_s = PAUSE_TIMEOUT_S + (OFFLOAD_TIMEOUT_S if offload else 0.0)
        self._info = dict(await proxy.kernel_info() or {})
        self._inherited = await proxy.pause(token=token, timeout=timeout_s, offload=offload)
        self._moved_bytes = proxy.moved_bytes if offload else 0
        return self._moved_bytes

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
        """Speak with the kernel again; see the port."""
        if restored:
            await self._before(self._box)
        back = self._kernel.proxy.go_on(
            str(kernel.socket_prefix),
            token=token,
            restored=restored,
            clone=clone,
            undone=undone,
            env=await self._environment(restored=restored),
            inherited=record.get("inherited", ()),
            timeout=GO_ON_TIMEOUT_S + (OFFLOAD_TIMEOUT_S if self._moved_bytes else 0.0),
        )
        await unless_dead(kernel, back)
        if restored:
            self._kernel.proxy.count_from(record.get("cell"))
        if restored and record.get("asks"):  # It was saved at its own wish, and waits to be told.
            await answer(self._box, record["asks"], {"ok": True, "snapshot": None})
        if self._kernel.process is not kernel:
            self._followed(self._kernel, kernel, self._box)

    async def _environment(self, *, restored: bool) -> Mapping[str, str | None]:
        """What a kernel that is brought back is to have; of one that lives on, what other GPUs change."""
        told = gpu_environment(self._box.gpus)
        if restored:
            network = await self._box.network_environment()
            return {**self._kernel.request.env, **network, **self._box.spec.env, **told}
        before = gpu_environment(self._gpus)
        return {name: told.get(name) for name in {**before, **told} if told.get(name) != before.get(name)}

    async def undone(self) -> None:
        """Answer what the kernel of until now will not answer any more."""
        await self._kernel.proxy.end_open_requests(asked_by=self._kernel.restore_asked_by)

    async def sleep(self, record: Mapping[str, Any]) -> None:
        """Answer for a kernel that is not there, and have it woken for the rest."""
        await self._kernel.proxy.suspended(
            info=record.get("info"),
            known_as=bytes.fromhex(record.get("known_as", "")),
            on_wake=lambda: self._wake(self._kernel),
            on_look=lambda: self._looked_at(self._box),
            on_interrupt=lambda: self._interrupted(self._box),
        )


async def answer(box: LiveSandbox, token: str, content: Mapping[str, Any]) -> None:
    """Answer a kernel that waits without a connection: a file in its run directory, whole at its end.

    Raises:
        ProtocolError: The guest has put something there.
    """

    def write() -> None:
        with guest_files.create(box.run_directory / f"answer-{token}.json") as file:
            file.write(json.dumps(content).encode() + b"\n")

    await asyncio.to_thread(write)


async def lose_answer(box: LiveSandbox, token: str) -> None:
    """Tell a kernel that waits for an answer that there is no room for one: a file that takes none.

    Raises:
        ProtocolError: As `answer`.
        OSError: Not even that can be made.
    """
    await asyncio.to_thread(lambda: guest_files.create(box.run_directory / f"answer-{token}.lost").close())
