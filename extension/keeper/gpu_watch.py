"""Looks after the GPUs that sandboxes have: one that falls off the bus, and a share whose memory is not kept to."""

import asyncio
import logging

from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import GIB, SandboxInfo
from warmcell.sandbox.service import SandboxService

log = logging.getLogger(__name__)

LOOK_S = 10.0
ROUNDING = 1.05
"""What a process has beside its own arrays counts as well; a little more than the share is no trespass."""


class GpuWatch:
    """What it finds is told as `SandboxInfo.gpu_note`; nobody is stopped for it."""

    def __init__(self, service: SandboxService) -> None:
        self._service = service

    async def run(self) -> None:
        """Look again and again, for ever. Without a sandbox that has a GPU nothing is asked."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
            except WarmcellError as error:  # Whoever asks for a GPU is told.
                log.warning("GPUs in use could not be looked at: %s", error)

    async def look(self) -> None:
        """Tell what is wrong with the GPUs of each sandbox, and what is no more."""
        having = [info for info in self._service.infos() if info.gpus and info.state is State.RUNNING]
        if not having:
            return
        lost = {row["uuid"] for row in await self._service.gpus() if row["lost"]}
        for info in having:
            note = self._lost(info, lost) or await self._overdrawn(info)
            if note != info.gpu_note:
                if note:
                    log.warning("sandbox %s: %s", info.id, note)
                self._service.live(info.id).tell(gpu_note=note)

    def _lost(self, info: SandboxInfo, lost: set[str]) -> str:
        gone = [str(gpu.index) for gpu in info.gpus if gpu.uuid in lost]
        if not gone:
            return ""
        return (
            f"GPU {', '.join(gone)} does not answer any more. Shut the kernel down and start it anew for another one; "
            "reset the GPU or reboot."
        )

    async def _overdrawn(self, info: SandboxInfo) -> str:
        shared = [gpu for gpu in info.gpus if gpu.parts > 1 and not gpu.simulated]
        if not shared:
            return ""
        pids = set(self._service.live(info.id).processes)
        for gpu in shared:
            used = await self._service.leases.memory_of(gpu, pids)
            share = gpu.memory_total_bytes / gpu.parts
            if used > share * ROUNDING:
                return (
                    f"It uses {used / GIB:.1f} GiB of GPU {gpu.index}, and its share is {share / GIB:.1f} GiB: "
                    "others who share it may fail. Free some, or ask for a larger share."
                )
        return ""
