"""The words in which a GPU is asked for. Pure: no input, no output.

request      alternative, or a list of them: fallbacks in order ("H100", "A100")
alternative  kind | "any" | memory, then ":count" if more than one is wanted, or "/k" for one of k shares of one
kind         words of the device's name: "A100", "A100-80GB", "RTX 4090", "1g.10gb"
memory       the least VRAM of the device: "24GiB" (or GB, MiB, MB)
uuid         that very device, as the driver calls it: "GPU-8f6d…", "MIG-…"
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from warmcell.sandbox.errors import InvalidRequestError, UnknownGpuKindError
from warmcell.sandbox.models import GIB, GpuDevice

EXAMPLES = '"A100", "H100:2", "A100-80GB", "24GiB", "A100/2", "any", or a list of them as fallbacks'

MISSING_PART = 0.08
"""Drivers report up to this part less than a card is sold with (a T4 of 16 GB has 14.8 GiB)."""

_LONGEST = 80
_MOST_ALTERNATIVES = 16
MOST_PARTS = 16
"""Into more shares no GPU is ever cut."""

_ALTERNATIVE = re.compile(r"(?P<what>[A-Za-z0-9][A-Za-z0-9 ._+-]*?)\s*(?:(?P<sign>[:/])\s*(?P<count>[0-9]{1,4}))?")
_MEMORY = re.compile(r"(?P<number>[0-9]{1,7}(?:\.[0-9]{1,3})?)\s*(?P<unit>[gm])i?b", re.IGNORECASE)
_PROFILE = r"[0-9]+g\.[0-9]+gb"
"""A MIG instance's kind: its part of the processors, and its memory."""
_UUID = re.compile(r"(?:GPU|MIG)-(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|sim-[0-9a-f]{12})")
_MEMORY_WORD = re.compile(r"([0-9]{1,4})(?:g|gb|gib)")
_NOISE = frozenset({"nvidia", "geforce", "tesla", "quadro", "graphics", "gpu"})
"""Words of device names that tell nothing about the kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One thing that would do: devices of one kind, or with some memory, or any."""

    words: tuple[str, ...] = ()
    """Lower-case words that the device's name must have; empty: any."""
    least_bytes: int = 0
    uuid: str = ""
    """The one device that will do; empty: any of the kind."""
    nominal_gib: int | None = None
    """As in "A100-80GB": the memory that the card is sold with."""
    count: int = 1
    parts: int = 1
    """One of so many shares of a device; 1: all of it. Only one device is shared at a time."""

    def __str__(self) -> str:
        return f"{self.kind}/{self.parts}" if self.parts > 1 else self.whole

    @property
    def whole(self) -> str:
        """The same of whole devices."""
        return self.kind if self.count == 1 else f"{self.kind}:{self.count}"

    @property
    def kind(self) -> str:
        """Canonical form without the count."""
        if self.uuid:
            return self.uuid
        if self.least_bytes:
            return f"{self.least_bytes / GIB:.7g}GiB"
        words = [word.upper() for word in self.words]
        if self.nominal_gib is not None:
            words.append(f"{self.nominal_gib}GB")
        return "-".join(words) or "any"

    def matches(self, device: GpuDevice) -> bool:
        """Whether this device is of the kind."""
        if self.uuid:
            return device.uuid == self.uuid
        if device.memory_total_bytes < self.least_bytes * (1 - MISSING_PART):
            return False
        if self.nominal_gib is not None and not _sold_with(device, self.nominal_gib):
            return False
        if not self.words:
            return True
        if device.mig and not any(word == "mig" or re.fullmatch(_PROFILE, word) for word in self.words):
            return False  # Who names a kind means a whole one.
        runs = _runs(_words(device.name))
        return "".join(self.words) in runs or all(word in runs for word in self.words)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRequest:
    """What somebody asks for: the first alternative that can be had."""

    alternatives: tuple[Alternative, ...]

    def __str__(self) -> str:
        return " or ".join(map(str, self.alternatives))

    @property
    def canonical(self) -> str | tuple[str, ...]:
        """The same request in its one spelling, in the form of `SandboxSpec.gpu`."""
        spelled = tuple(map(str, self.alternatives))
        return spelled[0] if len(spelled) == 1 else spelled


def parse(request: str | Sequence[str]) -> GpuRequest:
    """Read a request.

    Raises:
        InvalidRequestError: It is not in the grammar.
    """
    given = [request] if isinstance(request, str) else list(request)
    parts = [part for text in given for part in _text(text).split(",")]
    if not parts or len(parts) > _MOST_ALTERNATIVES:
        raise InvalidRequestError(
            f"A GPU request has one to {_MOST_ALTERNATIVES} alternatives, not {len(parts)}",
            hint=f"Ask for {EXAMPLES}.",
        )
    # A fallback that repeats an earlier one can never serve.
    return GpuRequest(alternatives=tuple(dict.fromkeys(map(_alternative, parts))))


def canonical(request: str | Sequence[str]) -> str | tuple[str, ...]:
    """The one spelling of a request: "a100:1" is "A100", "24 gb" is "24GiB".

    Raises:
        InvalidRequestError: It is not in the grammar.
    """
    return parse(request).canonical


def memory_bytes(text: str) -> int:
    """Read an amount of memory such as "80GiB". GB is read as GiB, as cards are sold.

    Raises:
        InvalidRequestError: It is no positive amount.
    """
    found = _MEMORY.fullmatch(text.strip())
    amount = float(found["number"]) * (GIB if found["unit"] in "gG" else GIB // 1024) if found else 0.0
    if amount < 1:
        raise InvalidRequestError(f"{text!r} is no amount of memory", hint='Write it as "80GiB" or "512MiB".')
    return math.ceil(amount)


def weight(alternative: Alternative) -> float:
    """How many devices it is; a share is a part of one."""
    return alternative.count / alternative.parts


def unknown_kind(request: GpuRequest, devices: Sequence[GpuDevice]) -> UnknownGpuKindError:
    """The error for a request whose kinds no device of the machine has."""
    have = summary(devices)
    asked = str(request)
    details: dict[str, Any] = {"request": asked, "available": [f"{d.name}" for d in devices]}
    if not devices:
        return UnknownGpuKindError(
            f"This machine has no GPU, and {asked} was asked for",
            hint="Choose CPU; if there is a GPU, `nvidia-smi` must list it.",
            details=details,
        )
    nearest = _nearest(request.alternatives, devices)
    meant = f'Did you mean "{nearest}"? ' if nearest else ""
    return UnknownGpuKindError(
        f"This machine has no {asked}",
        hint=f"{meant}It has {have}.",
        details=details | ({"nearest": nearest} if nearest else {}),
    )


def summary(devices: Iterable[GpuDevice]) -> str:
    """What the machine has, in a few words: "2 × A100-SXM4-80GB (80 GiB)"."""
    counts: dict[tuple[str, int, bool], int] = {}
    for device in devices:
        key = (device.name, device.memory_total_bytes, device.simulated)
        counts[key] = counts.get(key, 0) + 1
    return (
        ", ".join(
            f"{count} × {name} ({size / GIB:.0f} GiB{', simulated' if simulated else ''})"
            for (name, size, simulated), count in counts.items()
        )
        or "no GPU"
    )


def _text(value: object) -> str:
    if isinstance(value, str) and 0 < len(value) <= _LONGEST:
        return value
    raise InvalidRequestError(f"{value!r:.60} is no GPU request", hint=f"Ask for {EXAMPLES}.")


def _alternative(text: str) -> Alternative:
    found = _ALTERNATIVE.fullmatch(text.strip())
    if found is None:
        raise InvalidRequestError(f"{text.strip()!r} is no GPU request", hint=f"Ask for {EXAMPLES}.")
    count, parts = int(found["count"] or 1), 1
    if found["sign"] == "/":
        count, parts = 1, count
        if not 2 <= parts <= MOST_PARTS:
            raise InvalidRequestError(
                f"{text.strip()!r} asks for a share that no GPU is cut into",
                hint=f"A GPU is cut into 2 to {MOST_PARTS} shares, if the operator allows it.",
            )
    if count < 1:
        raise InvalidRequestError(
            f"{text.strip()!r} asks for no GPU", hint="Ask for at least one, or leave the request out for CPU."
        )
    what = found["what"]
    if _UUID.fullmatch(what):
        if count > 1:
            raise InvalidRequestError(f"{text.strip()!r} asks for one device twice", hint="Leave the number out.")
        return Alternative(uuid=what, parts=parts)
    if what.lower() == "any":
        return Alternative(count=count, parts=parts)
    if _MEMORY.fullmatch(what):
        return Alternative(least_bytes=memory_bytes(what), count=count, parts=parts)
    nominal: int | None = None
    words = []
    for word in _words(what):
        size = _MEMORY_WORD.fullmatch(word)
        if size is not None:
            nominal = int(size[1])
        else:
            words.append(word)
    if nominal is not None and not words:  # "24G": no kind, but an amount.
        return Alternative(least_bytes=memory_bytes(f"{nominal}GiB"), count=count, parts=parts)
    return Alternative(words=tuple(words), nominal_gib=nominal, count=count, parts=parts)


def _words(name: str) -> list[str]:
    """The words of a name that tell its kind, in lower case."""
    words = re.findall(rf"{_PROFILE}|[a-z0-9]+", name.lower())
    return [word for word in words if word not in _NOISE] or words


def _runs(words: Sequence[str]) -> set[str]:
    """Neighbouring words written together, so that "RTX4090" finds "GeForce RTX 4090"."""
    return {"".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, len(words) + 1)}


def _sold_with(device: GpuDevice, gib: int) -> bool:
    if f"{gib}gb" in _words(device.name):
        return True
    return gib * (1 - MISSING_PART) <= device.memory_total_bytes / GIB <= gib * 1.02


def _nearest(alternatives: Sequence[Alternative], devices: Sequence[GpuDevice]) -> str | None:
    known: dict[str, str] = {}
    for device in devices:
        words = [word for word in _words(device.name)]
        for spelled in ("-".join(words), *(word for word in words if re.search(r"[0-9]", word))):
            if not _MEMORY_WORD.fullmatch(spelled):
                known[spelled] = spelled.upper()
    for alternative in alternatives:
        found = difflib.get_close_matches("-".join(alternative.words), known, n=1, cutoff=0.5)
        if found:
            return known[found[0]]
    return None
