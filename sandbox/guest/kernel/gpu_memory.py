"""What this process has that the NVIDIA driver cannot take off a GPU.

The driver finds that in the middle of its work, and does not promise that the process is as before then. So it is
looked for first, while nothing has been touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from .refused import UnsupportedOperationError

IS_MANAGED = 8
"""CU_POINTER_ATTRIBUTE_IS_MANAGED of cuPointerGetAttribute."""

STEP, MOST_LOOKS = 64 * 1024, 4096
"""Small managed arrays lie in one mapping, which may begin with a hole. The driver answers in a microsecond."""

MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) .*/nvidia-uvm$")
"""Of managed memory, and of a few pages that each program with CUDA has."""


def check() -> None:
    """See that the driver can take all that it has off the GPU; touches nothing.

    Raises:
        UnsupportedOperationError: It has managed memory, or tensors that it shares with other processes.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:  # Nobody here has loaded it.
        return
    if _managed(driver):
        raise UnsupportedOperationError(
            "The kernel has managed memory (UVM), which the NVIDIA driver cannot take off a GPU",
            "Delete what has it (of RAPIDS, cupy or bitsandbytes), or restart the kernel. It is as it was.",
        )
    torch: Any = sys.modules.get("torch")
    if torch is not None and shares(torch, "cuda"):
        raise UnsupportedOperationError(
            "Tensors on the GPU are shared with other processes (CUDA IPC), which the NVIDIA driver cannot park",
            "End these processes, or delete what is shared. The kernel is as it was.",
        )


def shares(torch: Any, kind: str) -> bool:
    """Whether tensors on devices of this kind were sent to other processes, or came from them, and are still here."""
    reductions = sys.modules.get("torch.multiprocessing.reductions")
    there = {one.cdata for one in list(getattr(reductions, "shared_cache", {}).values()) if not one.expired()}
    # All objects are looked through only where something is shared, for that takes long. Those of a loader's workers
    # are on the CPU, and in nobody's way.
    return bool(there) and not there.isdisjoint(_storages(torch, kind))


def _storages(torch: Any, kind: str) -> set[int]:
    found = set()
    # No generator: it would be among the objects, and hold all of them if it were left half-way.
    for one in gc.get_objects():
        with contextlib.suppress(RuntimeError, NotImplementedError):  # Some have no storage.
            if issubclass(type(one), torch.Tensor) and one.device.type == kind:
                found.add(one.untyped_storage()._cdata)
    return found


def _managed(driver: Any) -> bool:
    ask = getattr(driver, "cuPointerGetAttribute", None)
    if ask is None:
        return False
    value, looks = ctypes.c_uint(), 0
    for start, end in _mappings():
        for address in range(start, end, STEP):
            if looks == MOST_LOOKS:
                return False
            looks += 1
            # It says no as well of what it does not know.
            if ask(ctypes.byref(value), IS_MANAGED, ctypes.c_uint64(address)) == 0 and value.value:
                return True
    return False


def _mappings() -> Iterator[tuple[int, int]]:
    with open("/proc/self/maps", errors="replace") as lines:
        for line in lines:
            if found := MAPPING.match(line.rstrip()):
                yield int(found[1], 16), int(found[2], 16)
