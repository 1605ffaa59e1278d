"""The template process: imports once, then forks a kernel per request.

`enter.py kernel.fork_server FD LIFELINE MODULE...`; FD is a socket to init, LIFELINE a pipe that ends with init, or -1
where the system ends all with init anyway. What goes over the socket are JSON lines:

    to init     {"importing": m} {"imported": m} {"failed": m, "error": e} {"unfit": m, "error": e} {"ready": true}
                {"forked": number, "pid": p} {"exited": p, "code": c}
    from init   {"kernel": number, "connection": file, "env": {}, "cwd": d}, with the kernel's reporting pipe beside it

It must have one thread when it forks, so nothing here or in what it imports may leave one running.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import select
import signal
import socket
import time
import traceback
from array import array
from collections.abc import Sequence
from typing import Any

from . import application, leaving, newborn, preload, stack, threads
from .report import Report

UNFIT_EXIT_CODE = 3
THREADS_END_SECONDS = 0.5
"""How long the threads of an import may take to end after it."""


class Birth:
    """What a fresh child is to become."""

    def __init__(self, request: dict[str, Any], report: Report) -> None:
        self.connection = str(request["connection"])
        self.env: dict[str, str] = request["env"]
        self.cwd = str(request["cwd"])
        self.report = report


def main(arguments: Sequence[str]) -> None:
    """Import, serve, and in each child become a kernel; so this returns in children only."""
    birth = ForkServer(socket.socket(fileno=int(arguments[0]))).serve(arguments[2:])
    with newborn.reporting(birth.report):
        newborn.die_with(int(arguments[1]))
        newborn.settle(env=birth.env, cwd=birth.cwd)
    application.run(birth.connection, birth.report)


class ForkServer:
    """Imports and forks at the word of init; ends when init does."""

    def __init__(self, control: socket.socket) -> None:
        control.set_inheritable(False)
        self._control = control
        self._incoming = bytearray()
        self._rights: list[int] = []
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def serve(self, modules: Sequence[str]) -> Birth:
        """Import `modules`, then fork for each request. Returns in every child, and never here."""
        with preload.noting_environment(), threads.held():
            self._tell({"importing": "ipykernel"})
            stack.load()
            application.prepare()
            with preload.disguised():
                self._import_all(modules)
        threads.remember()
        leaving.disown_imports()
        gc.collect()
        gc.freeze()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._woken)
        self._tell({"ready": True})
        poll = select.poll()
        for fd in (self._control.fileno(), self._wake):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._wake:
                    os.read(self._wake, 4096)
                    self._reap()
                    continue
                for request, pipe in self._requests():
                    birth = self._fork(request, pipe)
                    if birth is not None:
                        return birth

    def _import_all(self, modules: Sequence[str]) -> None:
        shell = preload.ShellWatch()
        for name in modules:
            self._tell({"importing": name})
            if not _installed(name):
                continue
            try:
                with shell.watching():
                    importlib.import_module(name)
            except BaseException as error:
                words = traceback.format_exception_only(type(error), error)[-1].strip()
                self._tell({"failed": name, "error": words})
                continue
            why = _unfit(shell)
            if why:
                # It cannot be taken back; init starts another process that leaves it out.
                self._tell({"unfit": name, "error": why})
                os._exit(UNFIT_EXIT_CODE)
            self._tell({"imported": name})

    def _requests(self) -> list[tuple[dict[str, Any], int]]:
        """Requests that have come whole, each with its pipe. The end of the socket is our end."""
        space = socket.CMSG_SPACE(16 * array("i").itemsize)
        data, ancillary, _, _ = self._control.recvmsg(64 * 1024, space)
        if not data:
            os._exit(0)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._rights.extend(array("i", content))
        self._incoming += data
        *lines, rest = bytes(self._incoming).split(b"\n")
        self._incoming = bytearray(rest)
        return [(json.loads(line), self._rights.pop(0)) for line in lines]

    def _fork(self, request: dict[str, Any], pipe: int) -> Birth | None:
        report = Report(pipe)
        try:
            pid = os.fork()
        except OSError as error:
            report.failed(error)
            return None
        if pid == 0:
            signal.set_wakeup_fd(-1)
            self._control.close()
            os.close(self._wake)
            os.close(self._woken)
            return Birth(request, report)
        os.close(pipe)
        self._tell({"forked": request["kernel"], "pid": pid})
        return None

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            self._tell({"exited": pid, "code": code})

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            os._exit(0)  # Init is gone.


def _installed(name: str) -> bool:
    """Whether there is such a module; finding it may import its parents."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
    except Exception:
        return True  # A parent is there and broken; importing it says how.


def _unfit(shell: preload.ShellWatch) -> str:
    """Why kernels could not be forked from this process after that import; empty if they can."""
    if shell.asked:
        return "it looks for the running notebook when it is imported, and there is none before the fork"
    deadline = time.monotonic() + THREADS_END_SECONDS
    while len(os.listdir("/proc/self/task")) > 1:
        if time.monotonic() > deadline:
            return "it starts a thread when it is imported, and a process with threads cannot be forked"
        time.sleep(0.005)
    if newborn.cuda_initialized():
        return "it initialises CUDA when it is imported, and a CUDA context cannot be forked"
    return ""
