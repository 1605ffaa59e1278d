"""What a kernel has that the driver cannot park is found before the driver is asked."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import reductions

from tests.unit.sandbox.gpus.made_cuda import COMPILER, driver_library, managed
from warmcell.sandbox.guest.kernel.gpu_memory import check, shares

CHECK = """
from warmcell.sandbox.guest.kernel.gpu_memory import check
try: check()
except Exception as error: print(type(error).__name__, error)
"""


def said(program: str) -> str:
    """What a process of its own finds after it has done that."""
    done = subprocess.run([sys.executable, "-c", program + CHECK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(COMPILER is None, reason="not here: cc")
def test_managed_memory_is_found_wherever_it_is(tmp_path: Path) -> None:
    """Also behind a hole in its mapping; once it has gone, and where all that the device gave is the driver's own,
    nothing stands in the way.
    """
    having = managed(tmp_path)
    assert said(having).startswith("UnsupportedOperationError The kernel has managed memory (UVM)")
    assert said(having + "mapped[3 * 2**16] = 0") == ""
    assert said(having + "mapped.close(); file.close()") == ""


@pytest.mark.skipif(COMPILER is None, reason="not here: cc")
def test_a_driver_that_has_another_name_for_it_stands_in_nobodys_way(tmp_path: Path) -> None:
    """Memory of other files is not the driver's to judge."""
    library = driver_library(tmp_path / "lib")
    other = tmp_path / "data"
    other.write_bytes(b"managed" * 1000)
    loads = f"import ctypes, mmap; ctypes.CDLL({str(library)!r}); file = open({str(other)!r}, 'rb')\n"
    assert said(loads + "mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)") == ""


def test_where_no_driver_is_loaded_nothing_is_asked() -> None:
    """As in most kernels."""
    check()


def test_only_what_is_shared_on_that_kind_of_device_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that a loader's workers sent are on the CPU; what nobody has any more is shared with nobody."""
    monkeypatch.setattr(reductions, "shared_cache", reductions.SharedCache())
    tensor = torch.ones(3)
    assert not shares(torch, "cpu")
    reductions.shared_cache["handle"] = reductions.StorageWeakRef(tensor.untyped_storage())
    assert shares(torch, "cpu")
    assert not shares(torch, "cuda")
    del tensor
    assert not shares(torch, "cpu")
