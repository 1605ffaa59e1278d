"""How large variables are, as far as that can be known without copying them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

NAMED_MAX = 8


class Weight(NamedTuple):
    """One variable's."""

    name: str
    size_bytes: int | None
    """None: it is not known."""


def own_bytes(value: object) -> int:
    """Bytes that an array, a tensor or a text of bytes will take when it is sent; 0 for all else."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if isinstance(value, (bytes, bytearray)):
        return len(value)
    if isinstance(value, memoryview):
        return value.nbytes
    if numpy is not None and isinstance(value, getattr(numpy, "ndarray", ())):
        array: Any = value
        return 0 if array.dtype.hasobject else int(array.nbytes)
    if torch is not None and isinstance(value, getattr(torch, "Tensor", ())):
        tensor: Any = value
        return int(tensor.numel() * tensor.element_size()) if tensor.layout is torch.strided else 0
    return 0


def weights(values: Mapping[str, Any], limit: int | None) -> list[Weight]:
    """What is known of each, the largest first; of what is in lists and tables, with what they say themselves."""
    found = []
    for name, value in values.items():
        size = own_bytes(value) or _said(value)
        found.append(Weight(name, size))
    return sorted(found, key=lambda one: -(limit or 0) if one.size_bytes is None else -one.size_bytes)


def _said(value: Any) -> int | None:
    """What a table, or a container of arrays, says or comes to; None where nothing is known of it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (list, tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        size = sum(own_bytes(part) for part in parts)
        return size or None
    try:
        own = value.nbytes if isinstance(getattr(type(value), "nbytes", None), property) else None
        own = value.memory_usage(deep=False).sum() if own is None and hasattr(value, "memory_usage") else own
        return int(own) if own else None
    except Exception:  # It is only for a sentence.
        return None


def in_words(found: Iterable[Weight]) -> str:
    """The largest, in words."""
    named = [f"{one.name} {size_of(one.size_bytes)}" if one.size_bytes else one.name for one in found]
    return ", ".join(named[:NAMED_MAX])


def size_of(size_bytes: int) -> str:
    """A size for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes} bytes"
