"""REST of what is used right now: by the machine, its GPUs and each sandbox."""

import asyncio
import time
from typing import Any

from warmcell.extension.keeper.http import JsonHandler
from warmcell.extension.keeper.kernels import Kernels
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.readings import Reading, read, read_machine
from warmcell.sandbox.service import SandboxService

GPU_FIELDS = ("uuid", "index", "name", "simulated", "memory_used_bytes", "memory_total_bytes", "utilization_pct")

FRESH_S = 0.5
"""Pages that ask within this time of each other are given one reading."""

RATE_MAX_S = 30.0
"""Readings that are further apart make no rate: nobody wants the mean of an hour."""

MACHINE = "machine"


def routes() -> list[tuple[str, type[JsonHandler]]]:
    """Paths below the API's prefix, for the user's own processes only."""
    return [(r"/meters", MetersHandler)]


class Meters:
    """Reads what is used. Nothing is read while nobody asks."""

    def __init__(self, service: SandboxService, kernels: Kernels) -> None:
        self._service = service
        self._kernels = kernels
        self._last: dict[str, Any] = {}
        self._read_at = float("-inf")
        self._before: dict[str, tuple[float, float]] = {}
        """When something was last read, and the processor seconds that it had had."""
        self._lock = asyncio.Lock()

    async def latest(self) -> dict[str, Any]:
        """What is used now, or was half a second ago."""
        async with self._lock:
            if time.monotonic() - self._read_at > FRESH_S:
                self._last = await self._look()
                self._read_at = time.monotonic()
            return self._last

    async def _look(self) -> dict[str, Any]:
        running = [info for info in self._service.infos() if info.state is State.RUNNING]
        proxies = {kernel.sandbox_id: kernel.proxy for kernel in self._kernels.all() if kernel.started}
        gpus = await self._gpus()
        by_uuid = {gpu["uuid"]: gpu for gpu in gpus}
        rates: dict[str, tuple[float, float]] = {}
        rows = {}
        for info in running:
            used = await asyncio.to_thread(self._used, info.id)
            proxy = proxies.get(info.id)
            limit = info.limits.get("memory")
            rows[info.id] = {
                "cpu": self._rate(info.id, used.cpu_s, rates),
                "memory_bytes": used.memory_bytes,
                "memory_limit_bytes": None if limit is None or limit.value is None else int(limit.value),
                "busy": proxy is not None and proxy.busy,
                "idle_s": None if proxy is None else proxy.idle_s,
                **_of_gpus([by_uuid[gpu.uuid] for gpu in info.gpus if gpu.uuid in by_uuid]),
            }
        machine = await asyncio.to_thread(read_machine)
        told = {
            "cpus": machine.cpus,
            "cpu": self._rate(MACHINE, machine.cpu_s, rates),
            "memory_bytes": machine.memory_used_bytes,
            "memory_total_bytes": machine.memory_total_bytes,
            "gpus": [{name: gpu.get(name) for name in GPU_FIELDS} for gpu in gpus],
        }
        self._before = rates
        return {"at": time.time(), "sandboxes": rows, "machine": told}

    def _rate(self, name: str, cpu_s: float, rates: dict[str, tuple[float, float]]) -> float | None:
        """Processors in use since it was last read; None where that is not known."""
        now = time.monotonic()
        rates[name] = now, cpu_s
        at, before = self._before.get(name, (float("-inf"), 0.0))
        # A sandbox that has come back from disk counts anew.
        return (cpu_s - before) / (now - at) if now - at < RATE_MAX_S and cpu_s >= before else None

    def _used(self, sandbox_id: SandboxId) -> Reading:
        try:
            return read(self._service.live(sandbox_id).processes)
        except WarmcellError:  # It has ended meanwhile.
            return read(())

    async def _gpus(self) -> list[dict[str, Any]]:
        try:
            return list(await self._service.gpus())
        except WarmcellError:  # Whoever asks for GPUs is told why; meters have none to show.
            return []


def _of_gpus(held: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of what they compute, the sum of their memory; None where one of them does not say it."""
    busy = [gpu["utilization_pct"] for gpu in held]
    used = [gpu["memory_used_bytes"] for gpu in held]
    return {
        "gpu_pct": sum(busy) / len(busy) if held and None not in busy else None,
        "vram_bytes": sum(used) if held and None not in used else None,
        "vram_total_bytes": sum(gpu["memory_total_bytes"] for gpu in held) if held else None,
    }


class MetersHandler(JsonHandler):
    """What is used right now. The first answer has no rates, which take two readings."""

    async def get(self) -> None:
        meters: Meters = self.settings["meters"]
        self.answer(await self.unless_gone(meters.latest()))
