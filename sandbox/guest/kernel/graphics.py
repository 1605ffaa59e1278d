"""What torch is told of this kernel's GPUs, and asked to let go of, without ever making it use one."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

CUDA = "torch.cuda"
FRACTION = "WARMCELL_GPU_MEMORY_FRACTION"
"""How much of its GPU's memory is this kernel's, where the GPU is shared."""


def install() -> None:
    """Have torch keep to this kernel's share, if it has one, from when it first uses a GPU, imported now or later."""
    if FRACTION not in os.environ:
        return
    cuda = sys.modules.get(CUDA)
    if cuda is not None:
        _when_used(cuda)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def renew() -> None:
    """The share may be another one now."""
    install()
    cuda = sys.modules.get(CUDA)
    if cuda is not None and cuda.is_initialized():
        keep_to_share()


def let_go() -> None:
    """Give back the memory that torch has of the GPU and does not use: it need not be saved or parked."""
    cuda = sys.modules.get(CUDA)
    if cuda is not None and cuda.is_initialized():
        cuda.empty_cache()


def keep_to_share() -> None:
    """Bound torch's own allocations by the share; other users of the GPU in this process are not bound by it."""
    share = os.environ.get(FRACTION)
    cuda: Any = sys.modules.get(CUDA)
    if share is None or cuda is None:
        return
    for device in range(cuda.device_count()):
        cuda.set_per_process_memory_fraction(float(share), device)


def _when_used(cuda: Any) -> None:
    later = getattr(cuda, "_lazy_call", None)  # Calls it at once where a GPU is used already.
    if later is not None and not getattr(cuda, "_warmcell_told", False):
        cuda._warmcell_told = True
        later(keep_to_share)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `torch.cuda` as everybody would, and hears of its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See the base."""
        if fullname != CUDA:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads as another loader does."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """See the base."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """See the base."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _when_used(module)
