"""Namespaces without Warmcell in them, and CRIU run there by hand: to test images alone."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.lanes import bwrap
from warmcell.sandbox.helper import program
from warmcell.sandbox.snapshots.criu import helper_environment

HUGE_PAGES = 12
PROGRAM = Path(__file__).with_name("odd_memory.py")
OPTIONS = ("--tcp-close", "--file-locks", "--link-remap", "--manage-cgroups=ignore", "--no-default-config")


@cache
def criu() -> list[str]:
    """The command line of the CRIU that Warmcell would use."""
    found = program.find(helper_environment())
    if not found.loader:
        return [found.path]
    return [found.loader, "--library-path", ":".join(found.libraries), "--argv0", "criu", found.path]


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Have the machine reserve enough pages of 2 MiB for a small tree, and what it is restored as."""
    reserve = Path("/proc/sys/vm/nr_hugepages")
    before = int(reserve.read_text())
    reserve.write_text(str(before + HUGE_PAGES))
    try:
        if int(reserve.read_text()) < before + HUGE_PAGES:
            pytest.skip("this machine has no huge pages to spare")
        yield
    finally:
        reserve.write_text(str(max(0, int(reserve.read_text()) - HUGE_PAGES)))  # Others may have reserved some as well.


@dataclass
class Box:
    """A pid, mount and ipc namespace of its own over the host's files. Needs root."""

    directory: Path
    _process: "subprocess.Popen[bytes] | None" = None
    _started: "list[subprocess.Popen[bytes]]" = field(default_factory=list)
    first_pid: int = 0

    def start(self) -> "Box":
        binary = bwrap()
        assert binary is not None
        argv = [binary, "--unshare-pid", "--unshare-ipc", "--die-with-parent"]
        for entry in sorted(Path("/").iterdir()):
            if entry.is_symlink():
                argv += ["--symlink", os.readlink(entry), str(entry)]
            elif entry.name not in ("proc", "dev", "sys"):
                argv += ["--bind", str(entry), str(entry)]
        reader, writer = os.pipe()
        argv += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/.warmcell", "--info-fd", str(writer)]
        argv += ["sh", "-c", "echo up; exec sleep 600"]
        self._process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, pass_fds=[writer], cwd="/"
        )
        os.close(writer)
        with open(reader) as info:
            self.first_pid = json.load(info)["child-pid"]
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n"
        return self

    def inside(self, *argv: str) -> list[str]:
        return ["nsenter", "-t", str(self.first_pid), "-m", "-p", "-i", *argv]

    def run(self, *argv: str) -> None:
        done = subprocess.run(self.inside(*argv), capture_output=True, text=True, timeout=60, cwd="/")
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"

    def start_odd(self, *kinds: str) -> int:
        """Start the process with odd memory; its pid as it sees it."""
        subprocess.run(
            ["nsenter", "-t", str(self.first_pid), "-p", "sh", "-c", "echo 1000 > /proc/sys/kernel/ns_last_pid"],
            check=True,
            timeout=60,
        )
        ready = self.directory / "ready"
        os.mkfifo(ready)
        command = [sys.executable, "-I", "-S", str(PROGRAM), str(self.directory), *kinds]
        script = f'exec "$@" </dev/null >/dev/null 2>{self.directory}/errors'
        argv = self.inside("setsid", "sh", "-c", script, "sh", *command)
        self._started.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, cwd="/"))
        _read(ready)
        return next(pid for pid in self.pids() if pid >= 1000)

    def pids(self) -> list[int]:
        """Processes of the box by their pid in it."""
        return sorted(self.outer_pids())

    def outer_pids(self) -> dict[int, int]:
        """Their pids outside by those in it."""
        return {
            _inner_pid(int(entry.name)): int(entry.name) for entry in Path("/proc").glob("[0-9]*") if self._has(entry)
        }

    def kill(self, pid: int) -> None:
        """End a process and wait until it is gone."""
        descriptor = os.pidfd_open(self.outer_pids()[pid])
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            assert select.select([descriptor], [], [], 10)[0]
        finally:
            os.close(descriptor)

    def _has(self, entry: Path) -> bool:
        try:
            return (entry / "ns/pid").readlink() == Path(f"/proc/{self.first_pid}/ns/pid").readlink()
        except OSError:
            return False

    def ask(self, pid: int, what: str) -> Any:
        """What the process says."""
        fifo = self.directory / f"answer-{pid}"
        if not fifo.exists():
            os.mkfifo(fifo)
        (self.directory / f"ask-{pid}").write_text(what)
        self.run("kill", "-USR1", str(pid))
        answer = json.loads(_read(fifo))
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def dump(self, pid: int, image: Path) -> float:
        """Dump and end the tree at `pid`; the seconds it took."""
        image.mkdir()
        took = self._criu("dump", image, "-t", str(pid))
        ended = {int(core.stem.removeprefix("core-")) for core in image.glob("core-*.img")}
        deadline = time.monotonic() + 60
        while ended & self.outer_pids().keys():  # Their numbers are free only once somebody has waited for them.
            assert time.monotonic() < deadline, ended
            time.sleep(0.005)
        return took

    def save(self, pid: int, image: Path) -> None:
        """Dump the tree at `pid` into a directory, and leave it stopped."""
        self._criu("dump", image, "-t", str(pid), "--leave-stopped")

    def restore(self, image: Path, page_files: dict[str, Path]) -> float:
        """Restore with these page files in place; the seconds it took."""
        for name, path in page_files.items():
            place = f"/.warmcell/{name}"
            self.run("sh", "-c", f"test -e {place} || {{ : > {place}; mount --bind -o ro {path} {place}; }}")
        return self._criu("restore", image, "-d")

    def _criu(self, verb: str, image: Path, *options: str) -> float:
        log = f"{verb}-{time.monotonic_ns()}.log"
        argv = self.inside(*criu(), verb, "-D", str(image), *OPTIONS, "-o", log, "-v2", *options)
        began = time.perf_counter()
        done = subprocess.run(argv, capture_output=True, text=True, timeout=100, cwd="/")
        took = time.perf_counter() - began
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{(image / log).read_text()[-3000:]}"
        return took

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=60)
            assert self._process.stdout is not None
            self._process.stdout.close()
        for started in self._started:
            started.kill()  # nsenter stops as well when what it has started is stopped.
            started.wait(timeout=60)


def _inner_pid(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])


def _read(fifo: Path) -> str:
    """All that is written to a fifo by whoever opens it next; at most 60 seconds."""
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        parts: list[bytes] = []
        deadline = time.monotonic() + 60
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        while poll.poll(max(0, deadline - time.monotonic()) * 1000):
            part = os.read(descriptor, 1 << 16)
            if not part:
                return b"".join(parts).decode()
            parts.append(part)
        raise TimeoutError(f"nothing in {fifo}")
    finally:
        os.close(descriptor)
