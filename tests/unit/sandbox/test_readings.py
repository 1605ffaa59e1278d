"""What the kernel's files say of processes and the machine."""

import os
import time
from pathlib import Path

import pytest

from warmcell.sandbox.readings import read, read_machine

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def process(proc: Path, pid: int, *, ticks: tuple[int, int, int, int], pss_kib: int | None) -> None:
    """Files of a process whose name has a bracket, as any user may choose."""
    here = proc / str(pid)
    here.mkdir()
    before = " ".join(["S", *["0"] * 10])
    (here / "stat").write_text(f"{pid} (a) b) {before} {' '.join(map(str, ticks))} 20 0\n")
    (here / "statm").write_text("900 30 20 1 0 5 0\n")
    if pss_kib is not None:
        (here / "smaps_rollup").write_text(f"Rss: 999 kB\nPss:       {pss_kib} kB\nPss_Dirty: 7 kB\n")


def test_times_and_shares_of_several_processes_are_added(tmp_path: Path) -> None:
    """With those of ended children. Where the share may not be read the resident set counts; who is gone does not."""
    process(tmp_path, 7, ticks=(1 * TICK, 2 * TICK, 3 * TICK, 4 * TICK), pss_kib=64)
    process(tmp_path, 8, ticks=(TICK, 0, 0, 0), pss_kib=None)
    found = read((7, 8, 9), proc=tmp_path)
    assert (found.cpu_s, found.memory_bytes) == (11.0, 64 * 1024 + 30 * PAGE)


def test_this_process_uses_what_it_uses() -> None:
    """The real files: processor time grows with work, memory with what is allocated and written."""
    before = read((os.getpid(),))
    kept = bytearray(os.urandom(32 * 2**20))
    ended = time.process_time() + 0.05
    while time.process_time() < ended:
        pass
    after = read((os.getpid(),))
    assert after.cpu_s > before.cpu_s
    assert after.memory_bytes - before.memory_bytes > len(kept) // 2


def test_the_machine(tmp_path: Path) -> None:
    """Idle and waiting for the disk are no work; what can be had back is not used."""
    (tmp_path / "stat").write_text(f"cpu  {TICK} {TICK} {TICK} 99 99 0 0 {TICK} 5 5\ncpu0 1\n")
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemFree: 1 kB\nMemAvailable:   60 kB\nHugePages_Total: 0\n")
    found = read_machine(proc=tmp_path)
    assert (found.cpu_s, found.memory_used_bytes, found.memory_total_bytes) == (4.0, 40 * 1024, 100 * 1024)
    real = read_machine()
    assert real.cpus >= 1
    assert real.cpu_s > 0
    assert 0 < real.memory_used_bytes < real.memory_total_bytes


@pytest.mark.parametrize("text", ["", "7 (x", "7 (x) S"])
def test_a_file_that_is_cut_off_counts_for_nothing(tmp_path: Path, text: str) -> None:
    """As of a process that ends while it is read."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text(text)
    (tmp_path / "7" / "statm").write_text("9 9\n")
    assert read((7,), proc=tmp_path).cpu_s == 0.0
