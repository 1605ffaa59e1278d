"""Tensors of torch on their way between kernels: their memory as a buffer, and back on the rank's own device."""

from __future__ import annotations

import pickle
import sys
from typing import Any


def reduce(value: Any) -> tuple[Any, ...] | None:
    """How a tensor is pickled; None for all else, and for tensors that torch pickles better itself."""
    torch = sys.modules.get("torch")
    if torch is None or type(value) is not getattr(torch, "Tensor", None):
        return None
    plain = value.layout is torch.strided and not value.is_quantized and value.device.type in ("cpu", "cuda")
    if not plain or not value.is_leaf or value._backward_hooks or value.numel() == 0 or value.is_conj():
        return None
    array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    dtype = str(value.dtype).rpartition(".")[2]
    return rebuild, (pickle.PickleBuffer(array), dtype, tuple(value.shape), value.device.type, value.requires_grad)


def rebuild(buffer: Any, dtype: str, shape: tuple[int, ...], device: str, requires_grad: bool) -> Any:
    """The tensor again; one of a GPU is on this kernel's first GPU if it has one."""
    import torch

    if memoryview(buffer).readonly:
        buffer = bytearray(buffer)
    tensor = torch.frombuffer(buffer, dtype=getattr(torch, dtype)).reshape(shape)
    if device == "cuda" and torch.cuda.is_available():
        tensor = tensor.to("cuda")
    return tensor.requires_grad_(requires_grad)
