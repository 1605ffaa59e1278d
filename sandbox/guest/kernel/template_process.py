"""A template's process that serves many sandboxes: imports once, then forks kernels that enter them.

`enter.py kernel.template_process FD FILTER RUN UMASK MODULE...`; FD is a socket to the keeper, FILTER a file with the
system call filter of kernels, RUN the run directory of every sandbox, UMASK what kernels have. Over the socket go JSON
lines as from the fork server, `{"forked": number}` and `{"cannot": number, "error": e}`; what comes is one `REQUEST` at
a time, with descriptors: the first process of a sandbox, the socket on which the kernel will be asked, and the control
groups to join.

It lives outside of all sandboxes and has no rights but to enter them. It never reads what a kernel is asked for: what
it knows, all kernels after it know.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import struct
from array import array
from collections.abc import Sequence

from . import fork_server, newborn, places, spare

LATE = 1
REQUEST = struct.Struct("<BII")
"""Flags, a number, and RLIMIT_NPROC, 0 for none of its own."""
FDS_MAX = 16

# Mount, cgroup, uts, ipc, user, pid and network namespace.
_ALL_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_CLONE_PARENT = 0x8000
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 22, 38, 47
_SECCOMP_MODE_FILTER = 2
_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """`struct sock_fprog` of seccomp(2)."""

    _fields_ = [("size", ctypes.c_ushort), ("steps", ctypes.c_void_p)]


def main(arguments: Sequence[str]) -> None:
    """Import, serve, and in each child become a kernel; so this returns in children only."""
    control, wanted, run, umask, *modules = arguments
    os.umask(int(umask, 8))
    with open(int(wanted), "rb") as file:
        steps = file.read()
    os.closerange(3, int(control))
    os.closerange(int(control) + 1, 2**16)
    TemplateProcess(socket.socket(fileno=int(control)), steps, run).serve_all(modules)()


class TemplateProcess(fork_server.Importer):
    """Imports, and forks at the word of the keeper; ends when that does."""

    def __init__(self, control: socket.socket, steps: bytes, run: str) -> None:
        super().__init__(control)
        self._run = run
        self._why = ""
        self._steps = ctypes.create_string_buffer(steps, len(steps))
        self._clone = _SYS_CLONE[os.uname().machine]

    def serve_all(self, modules: Sequence[str]) -> fork_server.Becoming:
        """Import `modules`, then fork for each request. Returns in every kernel, and never here."""
        self.import_all(modules)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The system reaps; who follows a kernel has a pidfd of it.
        self._tell({"ready": True})
        while True:
            data, ancillary, _, _ = self._control.recvmsg(REQUEST.size, socket.CMSG_SPACE(FDS_MAX * 4))
            if len(data) != REQUEST.size:
                os._exit(0)
            fds = [fd for _, _, content in ancillary for fd in array("i", content)]
            flags, number, most = REQUEST.unpack(data)
            become = self._fork_into(fds, most, late=bool(flags & LATE))
            if become is not None:
                return become
            for fd in fds:
                os.close(fd)
            self._tell({"cannot": number, "error": self._why} if self._why else {"forked": number})

    def _fork_into(self, fds: Sequence[int], most: int, *, late: bool) -> fork_server.Becoming | None:
        """Fork a kernel into a sandbox; in that kernel, what it is to do. It is confined when this returns here."""
        first, waiting, *groups = fds
        reading, writing = os.pipe()
        if os.fork():
            os.close(writing)
            with open(reading, "rb") as told:
                self._why = told.read().decode(errors="replace")  # To its end: nobody who could say more is left.
            return None
        os.close(reading)
        self._control.close()
        try:
            for group in groups:
                os.write(group, b"0")
                os.close(group)
            _call("enter the sandbox", libc.setns(first, _ALL_NAMESPACES))
            os.close(first)
            # Only a child is in the pid namespace. Our parent becomes its own, so this process need not stay.
            if _call("fork", libc.syscall(self._clone, _CLONE_PARENT | int(signal.SIGCHLD), 0, 0, 0, 0)):
                os._exit(0)
            if most:
                resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
            self._confine()
        except OSError as error:
            os.write(writing, f"{error.strerror}".encode())
            os._exit(1)
        os.close(writing)
        return lambda: self._become(socket.socket(fileno=waiting), late=late)

    def _confine(self) -> None:
        """Give up every right, for good, as the sandbox's own processes have."""
        capability = 0
        while libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
            capability += 1
        _call("drop ambient capabilities", libc.prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0))
        header, sets = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
        _call("drop capabilities", libc.capset(header, sets))
        _call("set no-new-privileges", libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _call("be like others", libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0))
        program = _Program(len(self._steps) // 8, ctypes.addressof(self._steps))
        _call("load the filter", libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))

    def _become(self, waiting: socket.socket, *, late: bool) -> None:
        newborn.settle(-1)
        places.complete()
        if late or not spare.nothing_of_the_user_runs():
            spare.live_late(waiting)
        else:
            spare.live(waiting, self._run)


def _call(step: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{step}: {os.strerror(number)}")
    return result
