"""Devices that exist in the configuration only, so that everything can be tried without a GPU."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.gpus.base import GpuProcess
from warmcell.sandbox.gpus.requests import memory_bytes
from warmcell.sandbox.models import GpuDevice

_KEYS = frozenset({"name", "memory", "count", "nvlink", "used", "busy", "mig"})
_MOST = 64
_SHAPE = 'Write it as {"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 2}.'


class SimulatedInventory:
    """An inventory of made-up devices; each is marked as simulated and does no work.

    The UUIDs follow from name, memory and place alone, so that they are the same after a restart and for each
    user of the machine.
    """

    def __init__(self, kinds: Sequence[Mapping[str, object]]) -> None:
        """Read the configuration.

        Args:
            kinds: One entry per kind: `name`, `memory` such as "80GiB", if more than one `count`, `nvlink`, so many of
                which are joined, `used`, what each sandbox that has one is said to take of its memory, `busy`, the
                percentage of time that one that somebody has is said to compute, and `mig`: it is an instance of a
                divided GPU, which the driver does not park.

        Raises:
            InvalidRequestError: An entry is malformed.
        """
        self._devices = _devices(kinds)

    @property
    def problem(self) -> str:
        """Empty: what is made up is always there."""
        return ""

    async def devices(self) -> Sequence[GpuDevice]:
        """The configured devices."""
        return self._devices

    async def board_uuids(self) -> Sequence[str]:
        """Those of the configured devices: what instances are made up of is not made up."""
        return [device.uuid for device in self._devices]

    async def processes(self, device: GpuDevice) -> Sequence[GpuProcess]:
        """None: nothing can compute on them."""
        return ()

    async def free_bytes(self, device: GpuDevice) -> int | None:
        """It is made up what is there."""
        return None


def _devices(kinds: Sequence[Mapping[str, object]]) -> tuple[GpuDevice, ...]:
    found: list[GpuDevice] = []
    seen: dict[tuple[str, int], int] = {}
    for kind in kinds:
        name, size, count = _kind(kind)
        joined, used, busy = _joined(kind), _used(kind, size), _busy(kind)
        for _ in range(count):
            place = seen[name, size] = seen.get((name, size), -1) + 1
            digest = hashlib.sha256(f"{name}\0{size}\0{place}".encode()).hexdigest()
            found.append(
                GpuDevice(
                    uuid=f"GPU-sim-{digest[:12]}",
                    index=len(found),
                    name=name,
                    memory_total_bytes=size,
                    simulated=True,
                    pretended_bytes=used,
                    pretended_pct=busy,
                    mig=kind.get("mig") is True,
                )
            )
        mine = found[len(found) - count :]
        for first in range(0, count, joined):
            group = mine[first : first + joined]
            for device in group:
                near = {other.uuid: 0 for other in group if other is not device}
                found[device.index] = dataclasses.replace(device, near=near)
    if len(found) > _MOST:
        raise InvalidRequestError(
            f"{len(found)} simulated GPUs are configured, at most {_MOST} can be",
            hint="Lower `count` in the list of simulated GPUs.",
        )
    return tuple(found)


def _joined(kind: Mapping[str, object]) -> int:
    joined = kind.get("nvlink", 1)
    if not isinstance(joined, int) or isinstance(joined, bool) or not 1 <= joined <= _MOST:
        raise InvalidRequestError(f"The simulated GPU {kind['name']} has nvlink {joined!r}", hint=_SHAPE)
    return joined


def _used(kind: Mapping[str, object], size: int) -> int:
    told = kind.get("used", 0)
    used = memory_bytes(told) if isinstance(told, str) else told
    if not isinstance(used, int) or isinstance(used, bool) or not 0 <= used <= size:
        raise InvalidRequestError(f"The simulated GPU {kind['name']} has used {told!r}", hint=_SHAPE)
    return used


def _busy(kind: Mapping[str, object]) -> float | None:
    busy = kind.get("busy")
    if busy is None:
        return None
    if not isinstance(busy, int | float) or isinstance(busy, bool) or not 0 <= busy <= 100:
        raise InvalidRequestError(f"The simulated GPU {kind['name']} has busy {busy!r}", hint="Give a percentage.")
    return float(busy)


def _kind(kind: object) -> tuple[str, int, int]:
    if not isinstance(kind, Mapping) or not set(kind) <= _KEYS:
        raise InvalidRequestError(f"{kind!r} is no simulated GPU", hint=_SHAPE)
    name, memory, count = kind.get("name"), kind.get("memory"), kind.get("count", 1)
    if not isinstance(name, str) or not name.strip():
        raise InvalidRequestError(f"The simulated GPU {kind!r} has no name", hint=_SHAPE)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MOST:
        raise InvalidRequestError(
            f"The simulated GPU {name} has count {count!r}", hint=f"Give a count from 1 to {_MOST}."
        )
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return name.strip(), memory, count
    if isinstance(memory, str):
        return name.strip(), memory_bytes(memory), count
    raise InvalidRequestError(f"The simulated GPU {name} has memory {memory!r}", hint=_SHAPE)
