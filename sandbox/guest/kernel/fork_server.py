"""The template process: imports once, then forks a kernel per request.

`enter.py kernel.fork_server FD LIFELINE RUN MODULE...`; FD is a socket to init, LIFELINE a pipe that ends with init
(-1 where the system ends all with init anyway), RUN the run directory. What goes over the socket are JSON lines:

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
from collections.abc import Callable, Sequence
from typing import Any

from . import application, leaving, newborn, preload, stack, threads
from . import spare as spares
from .report import Report
from .spare import Spare

UNFIT_EXIT_CODE = 3
THREADS_END_SECONDS = 0.5
"""How long the threads of an import may take to end after it."""


Becoming = Callable[[], None]
"""What a fresh child does, and does not return from."""


def main(arguments: Sequence[str]) -> None:
    """Import, serve, and in each child become a kernel; so this returns in children only."""
    control, lifeline, run, *modules = arguments
    become = ForkServer(socket.socket(fileno=int(control)), int(lifeline), run).serve(modules)
    become()


class Importer:
    """Imports what kernels are to have, and tells whoever asked for it."""

    def __init__(self, control: socket.socket) -> None:
        control.set_inheritable(False)
        self._control = control
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def import_all(self, modules: Sequence[str]) -> None:
        """Import them such that a fork finds all as if it had done that itself."""
        with preload.noting_environment(), threads.held():
            self._tell({"importing": "ipykernel"})
            stack.load()
            application.prepare()
            with preload.disguised():
                self._import_all(modules)
        threads.remember()
        leaving.disown_imports()
        gc.collect()
        threads.trim()
        gc.freeze()

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

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._control.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            os._exit(0)  # Init is gone.


class ForkServer(Importer):
    """Imports and forks at the word of init; ends when init does."""

    def __init__(self, control: socket.socket, lifeline: int, run: str) -> None:
        super().__init__(control)
        self._lifeline = lifeline
        self._run = run
        self._kernels: set[int] = set()
        self._spare: Spare | None = None
        self._spares_die = False
        self._incoming = bytearray()
        self._rights: list[int] = []
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self, modules: Sequence[str]) -> Becoming:
        """Import `modules`, then fork for each request. Returns in every child, and never here."""
        self.import_all(modules)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._woken)
        self._tell({"ready": True})
        poll = select.poll()
        for fd in (self._control.fileno(), self._wake):
            poll.register(fd, select.POLLIN)
        while True:
            become = self._make_spare()
            for fd, _ in poll.poll() if become is None else ():
                if fd == self._wake:
                    os.read(self._wake, 4096)
                    self._reap()
                    continue
                requests = self._requests()
                while requests and become is None:
                    become = self._start(*requests.pop(0))
                if become is not None:
                    for _, pipe in requests:  # Those are the parent's to serve.
                        os.close(pipe)
                    return become
            if become is not None:
                return become

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

    def _start(self, request: dict[str, Any], pipe: int) -> Becoming | None:
        """Start the kernel of a request; in the child, what it is to do."""
        spare, self._spare = self._spare, None
        if spare is not None and spares.suits(request) and spare.give(request, pipe):
            pid = spare.pid
        else:
            if spare is not None:
                spare.forget()
            try:
                pid = self._fork()
            except OSError as error:
                Report(pipe).failed(error)
                return None
            if pid == 0:
                return lambda: self._become(request, Report(pipe))
        os.close(pipe)
        self._kernels.add(pid)
        self._tell({"forked": request["kernel"], "pid": pid})
        return None

    def _make_spare(self) -> Becoming | None:
        """Where no kernel lives, let the next one come up already; in the child, what it is to do."""
        if self._kernels or self._spare is not None or self._spares_die or not spares.nothing_of_the_user_runs():
            return None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = self._fork()
        except OSError:
            self._spares_die = True
            return None
        if pid == 0:
            ours.close()
            newborn.settle(self._lifeline)
            return lambda: spares.live(theirs, self._run)
        theirs.close()
        self._spare = Spare(pid, ours)
        return None

    def _become(self, request: dict[str, Any], report: Report) -> None:
        with newborn.reporting(report):
            newborn.settle(self._lifeline)
            newborn.move(env=preload.environment(request["env"]), cwd=request["cwd"])
        application.run(request["connection"], report)

    def _fork(self) -> int:
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            self._control.close()
            os.close(self._wake)
            os.close(self._woken)
            if self._spare is not None:
                self._spare.forget()
        return pid

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid not in self._kernels:
                spares.remove(spares.prefix_of(pid, self._run))
            if self._spare is not None and pid == self._spare.pid:
                self._spare.forget()
                self._spare = None
                self._spares_die = True  # Whatever it died of, the next one might too.
                continue
            self._kernels.discard(pid)
            code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            self._tell({"exited": pid, "code": code})


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
    while not threads.alone():
        if time.monotonic() > deadline:
            return "it starts a thread when it is imported, and a process with threads cannot be forked"
        time.sleep(0.005)
    if newborn.cuda_initialized():
        return "it initialises CUDA when it is imported, and a CUDA context cannot be forked"
    return ""
