"""Threads put back as they were, after a criu that was killed has left them in the middle of its own code.

criu saves a process from within: it stops each thread, changes its registers and a few bytes of its code, lets it run
code of criu's, and puts everything back. Killed in between it cannot. So the tree is stopped by SIGSTOP before criu
comes, which the kernel enforces again the moment that a tracer dies, and registers are written down.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PTRACE_CONT, PTRACE_DETACH, PTRACE_GETREGSET, PTRACE_SETREGSET = 7, 17, 0x4204, 0x4205
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_GETSIGMASK, PTRACE_SETSIGMASK = 0x4206, 0x4207, 0x420A, 0x420B
NT_PRSTATUS, NT_X86_XSTATE = 1, 0x202
REGISTERS_BYTES, STATE_BYTES = 27 * 8, 16384
WALL = 0x40000000
CODE_BYTES, CODE_AREAS = 4096, 4
SYSCALL_AND_TRAP = b"\x0f\x05\xcc"
SYS_CLOSE, SYS_MUNMAP = 3, 11
RAX, RSI, RDI, ORIG_RAX, RIP = 10, 13, 14, 15, 16
TRIES = 10
_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class Saved:
    """Registers, signal masks, first code, descriptors and areas of processes that are stopped."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._processes: dict[int, _Process] = {}
        if os.uname().machine == "x86_64":
            for pid in pids:
                with contextlib.suppress(OSError):
                    self._processes[pid] = _Process(pid)

    def put_back(self) -> None:
        """Write everything back. The processes stay stopped."""
        for process in self._processes.values():
            with contextlib.suppress(OSError):
                process.put_back()


class _Process:
    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._code, self._areas = _areas(pid)
        self._descriptors = set(os.listdir(f"/proc/{pid}/fd"))
        self._threads = {thread: _looked_at(thread) for thread in map(int, os.listdir(f"/proc/{pid}/task"))}

    def put_back(self) -> None:
        _write(self._pid, self._code)
        with contextlib.suppress(OSError):
            self._remove_what_is_new()
        for thread, (registers, state, mask) in self._threads.items():
            with contextlib.suppress(OSError):
                _put_back(thread, registers, state, mask)

    def _remove_what_is_new(self) -> None:
        """Let it close and unmap itself what criu has brought: nobody else can."""
        calls = [(SYS_CLOSE, int(fd), 0) for fd in set(os.listdir(f"/proc/{self._pid}/fd")) - self._descriptors]
        for start, end in _areas(self._pid)[1]:
            if all(end <= low or start >= high for low, high in self._areas):
                calls.append((SYS_MUNMAP, start, end - start))
        if not calls or not self._code:
            return
        at, code = self._code[0]
        registers = list(struct.unpack("27Q", self._threads[self._pid][0]))
        _write(self._pid, [(at, SYSCALL_AND_TRAP)])
        try:
            with _traced(self._pid):
                for number, first, second in calls:
                    registers[RAX], registers[ORIG_RAX], registers[RIP] = number, (1 << 64) - 1, at
                    registers[RDI], registers[RSI] = first, second
                    _set(self._pid, NT_PRSTATUS, struct.pack("27Q", *registers))
                    _run_to_trap(self._pid)
        finally:
            _write(self._pid, [(at, code)])


def _areas(pid: int) -> tuple[list[tuple[int, bytes]], list[tuple[int, int]]]:
    """The beginnings of its first areas of code, and where all of its areas are."""
    with open(f"/proc/{pid}/maps") as file:
        found = [match for match in map(_AREA.match, file) if match]
    areas = [(int(one.group(1), 16), int(one.group(2), 16)) for one in found]
    starts = [int(one.group(1), 16) for one in found if one.group(3) == "r-xp"][:CODE_AREAS]
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return [(start, os.pread(memory, CODE_BYTES, start)) for start in starts], areas
    finally:
        os.close(memory)


def _write(pid: int, areas: list[tuple[int, bytes]]) -> None:
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        for start, code in areas:
            if os.pread(memory, len(code), start) != code:
                os.pwrite(memory, code, start)
    finally:
        os.close(memory)


def _run_to_trap(thread: int) -> None:
    for _ in range(TRIES):
        _ptrace(PTRACE_CONT, thread, 0, 0)
        _, ended = os.waitpid(thread, WALL)
        if not os.WIFSTOPPED(ended):
            return
        if ended >> 8 == signal.SIGTRAP:
            return


def _looked_at(thread: int) -> tuple[bytes, bytes, bytes]:
    with _traced(thread):
        mask = ctypes.create_string_buffer(8)
        _ptrace(PTRACE_GETSIGMASK, thread, 8, ctypes.addressof(mask))
        return _get(thread, NT_PRSTATUS, REGISTERS_BYTES), _get(thread, NT_X86_XSTATE, STATE_BYTES), mask.raw


def _put_back(thread: int, registers: bytes, state: bytes, mask: bytes) -> None:
    with _traced(thread):
        _set(thread, NT_PRSTATUS, registers)
        _set(thread, NT_X86_XSTATE, state)
        kept = ctypes.create_string_buffer(mask, 8)
        _ptrace(PTRACE_SETSIGMASK, thread, 8, ctypes.addressof(kept))


@contextlib.contextmanager
def _traced(thread: int) -> Iterator[None]:
    _ptrace(PTRACE_SEIZE, thread, 0, 0)
    try:
        _ptrace(PTRACE_INTERRUPT, thread, 0, 0)
        os.waitpid(thread, WALL)
        yield
    finally:
        _ptrace(PTRACE_DETACH, thread, 0, 0)


def _get(thread: int, kind: int, size: int) -> bytes:
    room = ctypes.create_string_buffer(size)
    vector = _Vector(ctypes.addressof(room), size)
    _ptrace(PTRACE_GETREGSET, thread, kind, ctypes.addressof(vector))
    return room.raw[: vector.length]


def _set(thread: int, kind: int, content: bytes) -> None:
    room = ctypes.create_string_buffer(content, len(content))
    vector = _Vector(ctypes.addressof(room), len(content))
    _ptrace(PTRACE_SETREGSET, thread, kind, ctypes.addressof(vector))


def _ptrace(request: int, thread: int, address: int, data: int) -> None:
    if _libc.ptrace(request, thread, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
