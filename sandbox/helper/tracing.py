"""Threads put back as they were, after a criu that was killed has left them in the middle of its own code.

criu saves a process from within: it stops each thread, changes its registers and a few bytes of its code, lets it run
code of criu's, and puts everything back. Killed in between it cannot. So the tree is stopped by SIGSTOP before criu
comes, which the kernel enforces again the moment that a tracer dies, and registers are written down.

A thread is put back only where it is in criu's hands. criu's code in a process goes away by itself when the connection
to criu ends, which is a moment before the tracer does: from then on the first thread runs on as it should, and must
not be taken back to where it was. A thread that criu has just made trap would be ended by that trap: kernels have
a handler for it, at the beginning of which the thread is found then, and never runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import signal
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PTRACE_CONT, PTRACE_DETACH, PTRACE_GETREGSET, PTRACE_SETREGSET = 7, 17, 0x4204, 0x4205
PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_GETSIGMASK, PTRACE_SETSIGMASK = 0x4206, 0x4207, 0x420A, 0x420B
NT_PRSTATUS, NT_X86_XSTATE = 1, 0x202
REGISTERS_BYTES, STATE_BYTES = 27 * 8, 16384
WALL = 0x40000000
CODE_BYTES, CODE_AREAS = 4096, 4
INJECTED_BYTES = 16
"""What criu writes at the beginning of code: a system call, traps and a name."""
BROUGHT = "/memfd:CRIUMFD"
"""Name of the memory that criu brings."""
SYSCALL_AND_TRAP = b"\x0f\x05\xcc"
SYS_CLOSE, SYS_MPROTECT, SYS_MUNMAP = 3, 10, 11
RAX, RDX, RSI, RDI, ORIG_RAX, RIP, RSP = 10, 12, 13, 14, 15, 16, 19
CONTEXT_BYTES = 304
"""What a signal handler gets a pointer to, and after which its information lies."""
ONLY_TRAPS = struct.pack("Q", ((1 << 64) - 1) & ~sum(1 << (one - 1) for one in (5, 9, 19)))
"""The mask of a thread that runs code of criu's or of ours: a trap that was blocked would lose its handler."""
TRIES = 10
REAP_TIMEOUT_S, REAP_LOOK_S = 10.0, 0.001
"""How long the end of a killed thread may take, and how often to look: no event of it tells one thread from another."""
_AREA = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)", re.MULTILINE)
_CODE = re.compile(r"^([0-9a-f]+)-\S+ r-xp ", re.MULTILINE)

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


class _Area:
    __slots__ = ("end", "name", "rights", "start")

    def __init__(self, start: int, end: int, rights: str, name: str) -> None:
        self.start, self.end, self.rights, self.name = start, end, rights, name


class _Thread:
    __slots__ = ("mask", "registers", "state")

    def __init__(self, registers: tuple[int, ...], state: bytes, mask: bytes) -> None:
        self.registers, self.state, self.mask = registers, state, mask


class _Process:
    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._maps = _maps(pid)
        self._code = _code(pid, self._maps)
        self._descriptors = set(os.listdir(f"/proc/{pid}/fd"))
        self._threads = {thread: _looked_at(thread) for thread in map(int, os.listdir(f"/proc/{pid}/task"))}

    def put_back(self) -> None:
        _write(self._pid, self._code)
        for thread, saved in self._threads.items():
            if thread != self._pid:  # The first one last: it removes the code in which the others may stand.
                with contextlib.suppress(OSError), _traced(thread):
                    self._mend(thread, saved)
        with _traced(self._pid):
            self._mend(self._pid, self._threads[self._pid], clean=True)

    def _mend(self, thread: int, saved: _Thread, *, clean: bool = False) -> None:
        """Let a thread that is traced go on from where it should, with nothing left of criu."""
        found = _read(thread)
        _set_mask(thread, ONLY_TRAPS)
        _take_trap(thread)
        held = self._is_held(found.registers)
        if held or found.registers == saved.registers:
            found = saved
        elif found.mask == ONLY_TRAPS:
            found.mask = saved.mask
        try:
            if clean:
                with contextlib.suppress(OSError):
                    self._remove_what_is_new(found.registers, everything=held)
        finally:
            _set(thread, NT_PRSTATUS, struct.pack("27Q", *found.registers))
            _set(thread, NT_X86_XSTATE, found.state)
            _set_mask(thread, found.mask)

    def _is_held(self, registers: tuple[int, ...]) -> bool:
        """Whether a thread would run code of criu's, or is where the trap at the end of such code has led it."""
        at = registers[RIP]
        if any(start <= at < start + INJECTED_BYTES for start, _ in self._code):
            return True
        if any(area.start <= at < area.end and area.name.startswith(BROUGHT) for area in _areas(_maps(self._pid))):
            return True
        handler = signal.SIGTRAP, registers[RSP] + 8, registers[RSP] + 8 + CONTEXT_BYTES
        return (registers[RDI], registers[RDX], registers[RSI]) == handler

    def _remove_what_is_new(self, base: tuple[int, ...], *, everything: bool) -> None:
        """Let it close and unmap itself what criu has brought: nobody else can."""
        calls = []
        for fd in set(os.listdir(f"/proc/{self._pid}/fd")) - self._descriptors:
            if everything or os.readlink(f"/proc/{self._pid}/fd/{fd}").startswith(BROUGHT):
                calls.append((SYS_CLOSE, int(fd), 0, 0))
        before = _areas(self._maps)
        closed = [area for area in before if area.rights == "---p"]
        for area in _areas(_maps(self._pid)):
            new = all(area.end <= one.start or area.start >= one.end for one in before)
            if new and (everything or area.name.startswith(BROUGHT)):
                calls.append((SYS_MUNMAP, area.start, area.end - area.start, 0))
            if area.rights == "r--p":  # criu reads what nobody may read, and takes that right away again.
                inside = [(max(one.start, area.start), min(one.end, area.end)) for one in closed]
                calls += [(SYS_MPROTECT, low, high - low, 0) for low, high in inside if low < high]
        if not calls or not self._code:
            return
        at, code = self._code[0]
        _write(self._pid, [(at, SYSCALL_AND_TRAP)])
        try:
            for number, *arguments in calls:
                registers = list(base)
                registers[RAX], registers[ORIG_RAX], registers[RIP] = number, (1 << 64) - 1, at
                registers[RDI], registers[RSI], registers[RDX] = arguments
                _set(self._pid, NT_PRSTATUS, struct.pack("27Q", *registers))
                _run_to_trap(self._pid)
        finally:
            _write(self._pid, [(at, code)])


def _maps(pid: int) -> str:
    with open(f"/proc/{pid}/maps", errors="surrogateescape", newline="\n") as file:
        return file.read()


def _areas(maps: str) -> list[_Area]:
    """What is read of it only where something is to be mended: a kernel has hundreds."""
    found = _AREA.finditer(maps)
    return [_Area(int(one.group(1), 16), int(one.group(2), 16), one.group(3), one.group(4)) for one in found]


def _code(pid: int, maps: str) -> list[tuple[int, bytes]]:
    """The beginnings of its first areas of code."""
    starts = (int(one.group(1), 16) for one in _CODE.finditer(maps))
    return [(start, _memory(pid, start, CODE_BYTES)) for start in itertools.islice(starts, CODE_AREAS)]


def _memory(pid: int, start: int, size: int) -> bytes:
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(memory, size, start)
    except OSError:
        return b""
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


def _take_trap(thread: int) -> None:
    """A trap that nobody has seen yet, and that would be the thread's end, is over."""
    for _ in range(TRIES):
        with open(f"/proc/{thread}/status", errors="surrogateescape") as file:
            pending = next(int(line.split()[1], 16) for line in file if line.startswith("SigPnd:"))
        if not pending & 1 << (signal.SIGTRAP - 1):
            return
        _ptrace(PTRACE_CONT, thread, 0, 0)
        os.waitpid(thread, WALL)


def _looked_at(thread: int) -> _Thread:
    with _traced(thread):
        return _read(thread)


def _read(thread: int) -> _Thread:
    mask = ctypes.create_string_buffer(8)
    _ptrace(PTRACE_GETSIGMASK, thread, 8, ctypes.addressof(mask))
    registers = struct.unpack("27Q", _get(thread, NT_PRSTATUS, REGISTERS_BYTES))
    return _Thread(registers, _get(thread, NT_X86_XSTATE, STATE_BYTES), mask.raw)


def _set_mask(thread: int, mask: bytes) -> None:
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
        try:
            _ptrace(PTRACE_DETACH, thread, 0, 0)
        except OSError:
            _reap(thread)
            raise


def _reap(thread: int) -> None:
    """One that was killed while it was traced stays there, and its end unheard, until its tracer takes note."""
    deadline = time.monotonic() + REAP_TIMEOUT_S
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(thread, WALL | os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            time.sleep(REAP_LOOK_S)


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
