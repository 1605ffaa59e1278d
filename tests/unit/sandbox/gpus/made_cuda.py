"""A driver of the tests' own, below the real parker: a package `cuda` whose processes have their state in files."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.lanes import TOP
from warmcell.sandbox.gpus.base import GpuProcess
from warmcell.sandbox.models import GIB, GpuDevice

COMPILER = shutil.which("cc")
SOURCE = TOP / "tests" / "cuda" / "made_driver.c"

MANAGED = """
import ctypes, mmap
driver = ctypes.CDLL({library!r})
file = open({file!r}, "w+b")
file.write(bytes(2**18))
file.flush()
mapped = mmap.mmap(file.fileno(), 0)
mapped[3 * 2**16 : 3 * 2**16 + 7] = b"managed"
"""
"""A program that has the driver loaded and managed memory, which has the name of the device that it comes from."""

DIVIDED = "GPU-00000000-0000-0000-0000-0000000000ff"

DRIVER = """
import enum
class CUresult(enum.Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100
def cuInit(flags):
    return (CUresult.CUDA_SUCCESS,)
"""

CHECKPOINT = """
import os, pathlib
class CUDAError(Exception): pass
class Process:
    def __init__(self, pid): self.file = pathlib.Path(os.environ["MADE_CUDA"], str(pid))
    @property
    def state(self):
        try: return self.file.read_text()
        except OSError: raise CUDAError("CUDA_ERROR_INVALID_VALUE")
    def _step(self, step, before, after):
        with open(self.file.parent / "log", "a") as log: log.write(f"{step} {self.file.name}\\n")
        faults = self.file.parent / "faults"
        if faults.exists() and f"{step} {self.file.name}" in faults.read_text().splitlines():
            faults.unlink()
            raise CUDAError("CUDA_ERROR_NOT_SUPPORTED")
        if f"die at {step}" in (faults.read_text() if faults.exists() else ""): os._exit(3)
        if self.state != before: raise CUDAError("CUDA_ERROR_ILLEGAL_STATE")
        self.file.write_text(after)
    def lock(self, timeout_ms): self._step("lock", "running", "locked")
    def checkpoint(self): self._step("checkpoint", "locked", "checkpointed")
    def restore(self, mapping):
        self._step("restore", "checkpointed", "locked")
        (self.file.parent / "mapping").write_text(repr(mapping))
    def unlock(self): self._step("unlock", "locked", "running")
"""


def driver_library(place: Path) -> Path:
    """Compile a `libcuda.so.1` into a directory that is made."""
    library = place / "libcuda.so.1"
    place.mkdir()
    build = [str(COMPILER), "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, SOURCE, "-ldl"]
    subprocess.run(build, check=True)
    return library


def managed(place: Path) -> str:
    """A program that has managed memory, by a driver that is made in that directory."""
    return MANAGED.format(library=str(driver_library(place / "lib")), file=str(place / "nvidia-uvm"))


class MadeCuda:
    """The driver, the processes that use it, and the inventory that lists them."""

    problem = ""

    def __init__(self, place: Path, *, count: int = 2, driver_version: str = "580.10") -> None:
        self.states = place / "states"
        package = place / "packages" / "cuda"
        for name, text in (("bindings/driver", DRIVER), ("core/checkpoint", CHECKPOINT)):
            file = package / f"{name}.py"
            file.parent.mkdir(parents=True)
            file.with_name("__init__.py").touch()
            file.write_text(text)
        self.states.mkdir()
        self.environment = {**os.environ, "PYTHONPATH": str(package.parent), "MADE_CUDA": str(self.states)}
        self.commands: dict[int, str] = {}
        self.memory_bytes = 3 * GIB
        self.free: list[int] = []
        """What the next looks find free."""
        self.all = tuple(
            GpuDevice(
                uuid=f"GPU-00000000-0000-0000-0000-00000000000{n}",
                index=n,
                name="A100-SXM4-80GB",
                memory_total_bytes=80 * GIB,
                memory_used_bytes=0,
                driver_version=driver_version,
            )
            for n in range(count)
        )
        library = place / "libcuda.so.1"
        library.write_bytes(b"\0" * 4096)
        self._program = (
            f"import mmap; f = open({str(library)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1)\n"
            "print(flush=True); input()"
        )
        self._children: list[subprocess.Popen[str]] = []

    def process(self) -> int:
        """One that has the driver's library loaded and something on the first device."""
        child = subprocess.Popen(
            [sys.executable, "-c", self._program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        self._children.append(child)
        (self.states / str(child.pid)).write_text("running")
        return child.pid

    def state(self, pid: int) -> str:
        """Of a process."""
        return (self.states / str(pid)).read_text()

    def fail(self, *steps: str) -> None:
        """The next of these steps, as in "checkpoint 42", does not work."""
        (self.states / "faults").write_text("\n".join(steps))

    @property
    def log(self) -> list[str]:
        """What the driver was asked, in order, without the pids."""
        return [line.split()[0] for line in (self.states / "log").read_text().splitlines()]

    async def devices(self) -> Sequence[GpuDevice]:
        """All."""
        return self.all

    async def board_uuids(self) -> Sequence[str]:
        """Of all, and of one that is divided: nobody can lease that, and the driver has it."""
        return [*(device.uuid for device in self.all), DIVIDED]

    async def processes(self, device: GpuDevice) -> Sequence[GpuProcess]:
        """Those that are not parked, and those that were put there."""
        if device != self.all[0]:
            return ()
        found = [GpuProcess(pid=pid, command=command) for pid, command in self.commands.items()]
        for child in self._children:
            if self.state(child.pid) != "checkpointed":
                found.append(GpuProcess(pid=child.pid, command="python", memory_bytes=self.memory_bytes))
        return found

    async def free_bytes(self, device: GpuDevice) -> int | None:
        """As told by the test; else what `devices` leaves."""
        (now,) = (each for each in self.all if each.uuid == device.uuid)
        return self.free.pop(0) if self.free else now.memory_total_bytes - (now.memory_used_bytes or 0)

    def close(self) -> None:
        """End all processes."""
        for child in self._children:
            child.kill()
            child.communicate()
