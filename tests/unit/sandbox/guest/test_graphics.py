"""torch is told of a kernel's share of a GPU when it first uses one, whenever it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORCH = """
calls, queued, used = [], [], False
def _lazy_call(what):
    what() if used else queued.append(what)
def is_initialized(): return used
def device_count(): return 2
def empty_cache(): calls.append("empty_cache")
def set_per_process_memory_fraction(fraction, device): calls.append((fraction, device))
def init():
    global used
    used = True
    for each in queued: each()
"""


@pytest.mark.parametrize("order", ["import torch; graphics.install()", "graphics.install(); import torch"])
@pytest.mark.parametrize("share", ["0.5", ""])
def test_torch_is_told_when_it_first_uses_a_gpu(tmp_path: Path, order: str, share: str) -> None:
    """Not before: that would make a context where none is wanted. Without a share it is told nothing."""
    (tmp_path / "torch" / "cuda").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("from . import cuda")
    (tmp_path / "torch" / "cuda" / "__init__.py").write_text(TORCH)
    program = f"""
from warmcell.sandbox.guest.kernel import graphics
graphics.let_go()
{order}
import os, sys
print(torch.cuda.calls, torch.cuda.__spec__.loader is torch.cuda.__loader__, len(sys.meta_path))
graphics.let_go(); graphics.renew()
torch.cuda.init()
print(torch.cuda.calls)
torch.cuda.calls.clear()
os.environ[graphics.FRACTION] = "0.25"
graphics.renew(); graphics.let_go()
print(torch.cuda.calls)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("WARMCELL_GPU_MEMORY_FRACTION", None)
    if share:
        environment["WARMCELL_GPU_MEMORY_FRACTION"] = share
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    before, first, later = done.stdout.splitlines()
    assert before.startswith("[] True")
    assert first == ("[(0.5, 0), (0.5, 1)]" if share else "[]")
    assert later.endswith("(0.25, 0), (0.25, 1), 'empty_cache']")
