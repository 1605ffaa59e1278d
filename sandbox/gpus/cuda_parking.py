"""Parking by the NVIDIA driver, in one process beside the keeper that alone has its libraries loaded."""

import asyncio
import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import (
    BackendUnavailableError,
    CapacityError,
    OperationTimeoutError,
    SnapshotError,
    UnsupportedOperationError,
    WarmcellError,
)
from warmcell.sandbox.gpus.base import GpuInventory, GpuProcess
from warmcell.sandbox.gpus.parking import check_like, of_kind, refuse_divided, refuse_several
from warmcell.sandbox.models import GIB, GpuDevice, Parked

log = logging.getLogger(__name__)

FLOOR = (575, 57, 8)
"""Earlier drivers fail with PyTorch, or corrupt what they bring back."""

MOVES_FROM = (580,)
"""From here on, what was parked may go on on another device of its kind."""

LOCK_MS = 10_000
"""For calls into CUDA that are under way. An idle kernel has none."""

START_S = 60.0
"""The driver comes up in up to 7 s on machines with many GPUs."""

BASE_S, BYTES_PER_S = 60.0, GIB // 2
"""How long parking may take; the slowest that was published is ten times as fast."""

MARGIN_BYTES = GIB // 2
"""What a context takes beside its arrays."""

LINE_MAX = 2**20

LOOKS_S = (0.02, 0.1, 0.5, 0.0)
"""How long to wait after each look at who is on a device, and at what is free there."""


class CudaParking:
    """Asks the parker, which is started when first needed and again if it has died."""

    name = kind = "cuda"

    def __init__(
        self,
        inventory: GpuInventory,
        *,
        command: Sequence[str] = (sys.executable, "-m", "warmcell.sandbox.gpus.parker"),
        environment: Mapping[str, str] | None = None,
        timeout_s: float = BASE_S,
    ) -> None:
        """Nothing runs yet.

        Args:
            inventory: Knows which processes are on a device.
            command: Starts the parker.
            environment: Of the parker; None: ours.
            timeout_s: How long it may take beside the time for the memory itself.
        """
        self._inventory = inventory
        self._command = command
        self._environment = environment
        self._timeout_s = timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last = 0

    async def probe(self) -> None:
        """See the port: by the parker, which stays."""
        await self._running()

    async def check_device(self, device: GpuDevice) -> None:
        """See the port: by driver, kind of device, and who else is on it."""
        refuse_divided([device])
        if version(device.driver_version) < FLOOR:
            raise UnsupportedOperationError(
                f"The NVIDIA driver {device.driver_version or '(of unknown version)'} cannot park kernels",
                hint="Install 575.57.08 or newer; from 580 on kernels can also be moved to another GPU.",
            )
        for process in await self._inventory.processes(device):
            if process.command.startswith("nvidia-cuda-mps"):
                raise UnsupportedOperationError(
                    f"An MPS server runs on GPU {device.index}, and what it serves cannot be parked",
                    hint="End it (`echo quit | nvidia-cuda-mps-control`) where kernels are to be parked.",
                )
        await self._running()

    async def check(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> None:
        """See the port: as the devices allow; of several it is refused."""
        if not await asyncio.to_thread(with_cuda, pids) and not await self._of(devices, pids):
            return
        refuse_divided(devices)
        refuse_several(devices)
        for device in devices:
            await self.check_device(device)

    async def uses_gpus(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> bool:
        """If one has the driver's library loaded: what it holds then is the driver's affair."""
        return bool(await asyncio.to_thread(with_cuda, pids))

    async def vram_bytes(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> int:
        """What the driver says that these processes have."""
        return sum(process.memory_bytes or 0 for process in await self._of(devices, pids))

    async def check_offload(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> None:
        """See the port: one device, and one process that uses it."""
        refuse_several(devices)
        using = await asyncio.to_thread(with_cuda, pids)
        if len(using) > 1:
            raise UnsupportedOperationError(
                f"{len(using)} processes of the sandbox use the GPU, and only the kernel's own torch can be asked",
                hint="End the others. The kernel keeps its GPU.",
            )

    async def offloaded(self, devices: Sequence[GpuDevice], pids: Sequence[int], moved_bytes: int) -> Parked:
        """See the port: what stays is what the driver says."""
        stays = await self.vram_bytes(devices, pids)
        return Parked(gpus=tuple(devices), since=time.time(), vram_bytes=moved_bytes, by="torch", stays_bytes=stays)

    async def park(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> Parked:
        """See the port. It is done only when the driver lists none of the processes on the devices any more."""
        vram = await self.vram_bytes(devices, pids)
        using = await asyncio.to_thread(with_cuda, pids)
        try:
            found = await self._ask({"do": "park", "pids": using, "lock_ms": LOCK_MS}, vram) if using else []
        except BackendUnavailableError:
            with contextlib.suppress(WarmcellError):  # The parker has died in the middle of it; another one undoes it.
                await self._ask({"do": "unpark", "pids": using}, vram)
            raise
        left = await self._left(devices, pids)
        if left:
            if found:
                await self._ask({"do": "unpark", "pids": found}, vram)
            raise UnsupportedOperationError(
                f"The driver does not take {left[0]} off the GPU",
                hint="It must be the keeper's own user's, and be allowed to be traced. The kernel keeps its GPU.",
            )
        return Parked(gpus=tuple(devices), since=time.time(), vram_bytes=vram, bound=bool(found))

    async def unpark(self, parked: Parked, devices: Sequence[GpuDevice], pids: Sequence[int]) -> None:
        """See the port."""
        if not parked.bound:
            return
        check_like(parked, devices)
        if parked.by == "torch":
            await self._check_room(parked, devices, margin_bytes=0)
            return
        moved = {was.uuid: now.uuid for was, now in zip(parked.gpus, devices, strict=True)}
        for was, now in zip(parked.gpus, devices, strict=True):
            if was.uuid != now.uuid and version(now.driver_version) < MOVES_FROM:
                raise UnsupportedOperationError(
                    f"The NVIDIA driver {now.driver_version} cannot move kernels to another GPU",
                    hint="Install 580 or newer. On the GPU where it was the kernel can go on.",
                )
        await self._check_room(parked, devices)
        asked: dict[str, Any] = {"do": "unpark", "pids": await asyncio.to_thread(with_cuda, pids)}
        if any(was != now for was, now in moved.items()):
            asked["mapping"] = await self._whole_mapping(moved)
        found = await self._ask(asked, parked.vram_bytes)
        if not found:
            raise SnapshotError(
                "Nothing of this kernel is parked any more", hint="What it had on the GPU is lost: restart the kernel."
            )

    def comes_back_on(self, parked: Parked) -> str:
        """Where it was; from driver 580 on, any of its kind."""
        movable = all(version(device.driver_version) >= MOVES_FROM for device in parked.gpus)
        if not parked.bound or movable:
            return of_kind(parked)
        (only,) = parked.gpus
        return only.uuid if only.parts == 1 else f"{only.uuid}/{only.parts}"

    async def close(self) -> None:
        """End the parker."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                async with asyncio.timeout(5.0):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _of(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> list[GpuProcess]:
        found = [process for device in devices for process in await self._inventory.processes(device)]
        return [process for process in found if process.pid in pids]

    async def _left(self, devices: Sequence[GpuDevice], pids: Sequence[int]) -> list[GpuProcess]:
        """Those that the driver still lists on the devices; it may need a moment to strike one off."""
        for pause_s in LOOKS_S:
            left = await self._of(devices, pids)
            if not left:
                break
            await asyncio.sleep(pause_s)
        return left

    async def _check_room(
        self, parked: Parked, devices: Sequence[GpuDevice], *, margin_bytes: int = MARGIN_BYTES
    ) -> None:
        """A restore that finds no room leaves a process in a state that nothing brings it out of."""
        needed = parked.vram_bytes + min(margin_bytes, parked.vram_bytes)
        for device in devices:
            for pause_s in LOOKS_S:
                free = await self._inventory.free_bytes(device)
                if free is None or free >= needed:
                    break
                await asyncio.sleep(pause_s)  # Somebody may have been parked for this one just now.
            else:
                assert free is not None
                raise CapacityError(
                    f"GPU {device.index} has {free / GIB:.1f} GiB free, and the kernel needs "
                    f"{parked.vram_bytes / GIB:.1f} GiB to go on",
                    hint="Free memory on that GPU, then run the cell again. The kernel stays parked.",
                )

    async def _whole_mapping(self, moved: Mapping[str, str]) -> dict[str, str]:
        """It wants a place for each GPU that it has, divided ones too; those that change places, change them."""
        back = {now: was for was, now in moved.items()}
        uuids = await self._inventory.board_uuids()
        return {_bare(uuid): _bare(moved.get(uuid) or back.get(uuid) or uuid) for uuid in uuids}

    async def _ask(self, what: Mapping[str, Any], vram_bytes: int) -> list[int]:
        process = await self._running()
        self._last += 1
        number, answer = self._last, asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        timeout = self._timeout_s + vram_bytes / BYTES_PER_S
        try:
            assert process.stdin is not None
            with contextlib.suppress(ConnectionError):  # The reader sees its end as well.
                process.stdin.write(json.dumps({"id": number, **what}).encode() + b"\n")
                await process.stdin.drain()
            async with asyncio.timeout(timeout):
                said = await answer
        except TimeoutError:
            raise OperationTimeoutError(
                f"The NVIDIA driver did not {what['do']} the kernel in {timeout:.0f} s",
                hint="See whether `nvidia-smi` answers; if not, reload the driver or reboot.",
                details={"operation": what["do"], "timeout": timeout},
            ) from None
        finally:
            del self._asked[number]
        if "error" in said:
            raise _refusal(said["error"])
        return [int(pid) for pid in said["pids"]]

    async def _running(self) -> asyncio.subprocess.Process:
        """The parker, once it has said that the driver can do it."""
        async with self._starting:
            if self._process is not None and self._reader is not None and not self._reader.done():
                return self._process
            environment = dict(os.environ if self._environment is None else self._environment)
            environment.pop("CUDA_VISIBLE_DEVICES", None)
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
                limit=LINE_MAX,
            )
            assert process.stdout is not None
            try:
                async with asyncio.timeout(START_S):
                    line = await process.stdout.readline()
                told = json.loads(line or b"{}")
            except (TimeoutError, ValueError):
                told = {}
            if told.get("ready") is not True:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
                raise _no_parker(told)
            self._process = process
            self._reader = asyncio.create_task(self._read(process, process.stdout))
            return process

    async def _read(self, process: asyncio.subprocess.Process, lines: asyncio.StreamReader) -> None:
        """Hand answers to those who wait, until there are no more."""
        try:
            async for line in lines:
                said = json.loads(line)
                answer = self._asked.get(said.get("id"))
                if answer is not None and not answer.done():
                    answer.set_result(said)
        except ValueError:
            log.exception("the parker says what nobody understands")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        code = await process.wait()
        if self._asked:
            log.error("the parker ended with exit code %d in the middle of its work", code)
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(
                    BackendUnavailableError(
                        f"The process that parks kernels ended with exit code {code}",
                        hint="Try it again; if the kernel does not answer then, restart it.",
                    )
                )


def version(text: str | None) -> tuple[int, ...]:
    """A driver's version as numbers; () where it has none."""
    return tuple(int(part) for part in re.findall(r"\d+", text or ""))


def with_cuda(pids: Sequence[int]) -> list[int]:
    """Those of the processes that have the driver's library loaded. Blocks."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if "/libcuda.so" in (Path("/proc") / str(pid) / "maps").read_text(errors="replace"):
                found.append(pid)
    return found


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-")


def _refusal(said: Mapping[str, Any]) -> Exception:
    words = f"The NVIDIA driver cannot {said['step']} process {said['pid']}: {said['words']}"
    if said.get("lost"):
        return SnapshotError(words, hint="What the kernel had on the GPU is lost: restart it.")
    return UnsupportedOperationError(
        words,
        hint="Managed memory (UVM), memory shared between processes (CUDA IPC) and MPS cannot be parked. "
        "The kernel is as it was.",
    )


def _no_parker(told: Mapping[str, Any]) -> Exception:
    if told.get("missing"):
        return UnsupportedOperationError(
            f"Kernels cannot be parked without cuda-core: {told.get('words')}",
            hint="Install it into the environment of Warmcell: pip install 'warmcell[nvidia]'.",
        )
    if told:
        return UnsupportedOperationError(
            f"This machine's driver cannot park kernels: {told.get('words')}",
            hint="Install the NVIDIA driver 575.57.08 or newer.",
        )
    return BackendUnavailableError(
        "The process that parks kernels does not come up", hint="keeper.log in the state directory says more."
    )
