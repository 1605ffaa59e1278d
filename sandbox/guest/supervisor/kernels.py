"""Kernels: from the fork server or in a fresh interpreter, answered once their sockets are bound."""

from __future__ import annotations

import _signal
import os

from .adopted import exit_code_of, signal_adopted
from .endpoint import Endpoint
from .jsonline import decode
from .loop import READ, Loop
from .processes import close_all, kill_group, spawn
from .relays import OWN, Relays
from .template import Template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Report = Callable[[Mapping[str, Any]], None]

LAST_WORDS_BYTES = 4096
"""How much of what a failing start has printed is kept."""
ENDED_KEPT = 8
"""Who begins to listen is told of so many that have ended: it may have listened before, and missed the end."""


class Kernel:
    """One kernel process, from the request for it until it is reaped."""

    def __init__(self, number: int, answer: Report, *, file: str, env: Mapping[str, str], cwd: str) -> None:
        self.number = number
        self.answer = answer
        self.file = file
        self.env = env
        self.cwd = cwd
        self.started_from = "cold"
        self.sockets = ""
        self.why = ""
        self.pid = 0
        self.exit_code: int | None = None
        self.starting = True
        self.running = False
        self.words = bytearray()
        self.telling: Endpoint | None = None


class Kernels:
    """All kernels that were started and have not ended."""

    def __init__(
        self, loop: Loop, template: Template, relays: Relays, *, guest: str, python: str, announce: Report
    ) -> None:
        self._loop = loop
        self._relays = relays
        self._template = template
        self._guest = guest
        self._python = python
        self._announce = announce
        self._count = 0
        self._asked: dict[int, Kernel] = {}
        self._adopted: dict[int, int] = {}
        self._alive: dict[int, Kernel] = {}
        self._ended: dict[int, int] = {}
        template.on_forked = self._on_forked
        template.on_exited = self._on_exited

    def present(self) -> list[dict[str, Any]]:
        """An event for each living kernel, and for those that have ended last."""
        ended = [_exited(pid, code) for pid, code in self._ended.items() if pid not in self._alive]
        return [*ended, *(_running(pid) for pid, kernel in self._alive.items() if kernel.running)]

    def processes(self) -> list[int]:
        """All kernels, and the fork server, below which one may be that nobody has asked for."""
        return [*self._alive, *self._template.processes()]

    def start(
        self, connection: Endpoint, answer: Report, *, file: str, env: Mapping[str, str], cwd: str, engine: str
    ) -> None:
        """Start a kernel and answer once it can be talked to. It is killed if the asker leaves before that.

        Args:
            connection: Whose end withdraws the request.
            answer: Told how it went.
            file: The kernel's connection file.
            env: Its whole environment.
            cwd: Its directory.
            engine: `template`, or `cold` for a fresh interpreter in any case.
        """
        self._count += 1
        kernel = Kernel(self._count, answer, file=file, env=env, cwd=cwd)
        connection.on_end = lambda: self._withdraw(kernel)
        if engine == "template":
            kernel.why = self._template.why_not(env)
            if not kernel.why:
                self._fork(kernel)
                return
        self._spawn(kernel)

    def adopt(self, pid: int) -> None:
        """Take on a kernel that was restored here, which may be nobody's child of ours. Idempotent.

        Raises:
            ProcessLookupError: There is no such process.
        """
        if pid in self._alive:
            return
        kernel = Kernel(0, lambda told: None, file="", env={}, cwd="")
        kernel.starting, kernel.running, kernel.pid = False, True, pid
        ending = os.pidfd_open(pid)
        self._alive[pid] = kernel
        self._adopted[pid] = ending
        self._loop.watch(ending, READ, lambda events: self._on_adopted_end(pid))
        self._loop.adopt(pid, lambda code: self._on_exited(pid, code))  # Where this is process 1, it is its child.
        self._announce(_running(pid))

    def _on_adopted_end(self, pid: int) -> None:
        self._loop.reap()
        if pid in self._adopted:
            self._on_exited(pid, exit_code_of(self._adopted[pid], pid))

    def signal(self, pid: int, signum: int, *, group: bool) -> bool:
        """Signal a kernel (and its process group); whether there is one of that pid."""
        if pid not in self._alive:
            return False
        if pid in self._adopted:
            signal_adopted(self._adopted[pid], pid, signum, group=group)
        elif group:
            kill_group(pid, signum)
        else:
            os.kill(pid, signum)
        return True

    def _listen(self, kernel: Kernel) -> int:
        """A pipe on which the kernel says when it can be talked to; the end for the kernel."""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        kernel.telling = Endpoint(
            self._loop,
            reading,
            on_data=lambda data: self._on_words(kernel, data),
            on_end=lambda: self._on_silence(kernel),
        )
        return writing

    def _fork(self, kernel: Kernel) -> None:
        kernel.started_from = "template"
        self._asked[kernel.number] = kernel
        telling = self._listen(kernel)
        request = {"kernel": kernel.number, "connection": kernel.file, "env": kernel.env, "cwd": kernel.cwd}
        self._template.fork(request, telling)
        os.close(telling)

    def _spawn(self, kernel: Kernel) -> None:
        kernel.started_from = "cold"
        argv = [self._python, f"{self._guest}/enter.py", "kernel.launch", kernel.file]
        opened: list[int] = []
        try:
            opened.append(self._listen(kernel))
            opened.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
            telling, nothing = opened
            pid = spawn(argv, env=kernel.env, cwd=kernel.cwd, stdin=nothing, stdout=nothing, stderr=telling)
        except OSError as error:
            self._fail(kernel, f"The kernel could not start: {error.strerror}", "End what else runs in the sandbox.")
            return
        finally:
            close_all(opened)
        self._born(kernel, pid)

    def _on_forked(self, number: int, pid: int) -> None:
        kernel = self._asked.pop(number, None)
        if kernel is None:
            return
        self._born(kernel, pid)
        if not kernel.starting and not kernel.pid:
            kill_group(pid, _signal.SIGKILL)  # Withdrawn before it was born.

    def _born(self, kernel: Kernel, pid: int) -> None:
        """Known by its pid from now on. Its parent is init, or the fork server as long as that lives."""
        self._alive[pid] = kernel
        self._loop.adopt(pid, lambda code: self._on_exited(pid, code))
        if kernel.starting:
            kernel.pid = pid

    def _on_words(self, kernel: Kernel, data: bytes) -> None:
        """What a starting kernel says: the line of JSON that ends it, after noise if any."""
        kernel.words += data
        if not kernel.words.endswith(b"\n"):
            return
        try:
            said = decode(bytes(kernel.words).splitlines()[-1])
        except ValueError:
            del kernel.words[:-LAST_WORDS_BYTES]
            return
        if "ready" in said:
            self._on_ready(kernel, int(said["ready"]), str(said.get("sockets", "")))
        elif "failed" in said:
            self._fail(kernel, f"The kernel could not start: {said['failed']}", str(said.get("hint", "")))

    def _on_ready(self, kernel: Kernel, pid: int, sockets: str) -> None:
        if kernel.starting:
            if pid not in self._alive:
                # Quicker than the fork server's report, which may never come.
                self._asked.pop(kernel.number, None)
                self._born(kernel, pid)
            kernel.starting = False
            kernel.running = True
            kernel.sockets = sockets
            self._relays.add(sockets)
            self._hang_up(kernel)
            told = {"ok": True, "pid": pid, "started_from": kernel.started_from, "why": kernel.why}
            kernel.answer({**told, "sockets": sockets})
            self._announce(_running(pid))

    def _on_silence(self, kernel: Kernel) -> None:
        """The pipe ended without an answer: the process is gone, or never came to be."""
        if kernel.started_from == "template" and not kernel.pid:
            self._asked.pop(kernel.number, None)
            kernel.why = "the template ended"
            self._spawn(kernel)
            return
        self._loop.reap()
        words = bytes(kernel.words).decode("utf-8", "replace").strip()
        ended = "" if kernel.exit_code is None else f" with exit code {kernel.exit_code}"
        self._fail(kernel, f"The kernel ended{ended} before its sockets were bound. {words}".strip())

    def _fail(self, kernel: Kernel, message: str, hint: str = "") -> None:
        if kernel.starting:
            told = {"ok": False, "code": "sandbox_start", "message": message}
            kernel.answer({**told, "hint": hint} if hint else told)
            self._withdraw(kernel)

    def _withdraw(self, kernel: Kernel) -> None:
        if kernel.starting:
            kernel.starting = False
            self._hang_up(kernel)
            if kernel.pid in self._alive:
                kill_group(kernel.pid, _signal.SIGKILL)

    def _hang_up(self, kernel: Kernel) -> None:
        if kernel.telling is not None:
            kernel.telling.close()
            kernel.telling = None

    def _on_exited(self, pid: int, code: int) -> None:
        self._loop.disown(pid)
        ending = self._adopted.pop(pid, None)
        if ending is not None:
            self._loop.close(ending)
        kernel = self._alive.pop(pid, None)
        if kernel is not None:
            kernel.exit_code = code
            self._relays.remove(kernel.sockets)
            for directory in (".", OWN):
                _remove_sockets(directory, kernel.sockets or f".e{pid}")
            if kernel.running:
                self._ended.pop(pid, None)
                self._ended[pid] = code
                while len(self._ended) > ENDED_KEPT:
                    del self._ended[next(iter(self._ended))]
                self._announce(_exited(pid, code))


def _remove_sockets(directory: str, name: str) -> None:
    """Remove what a kernel has bound; one that was killed leaves it below the run directory, where init is."""
    for path in [] if "/" in name or not os.path.isdir(directory) else os.listdir(directory):
        if path.startswith(f"{name}-"):
            try:
                os.unlink(f"{directory}/{path}")
            except OSError:
                continue


def _running(pid: int) -> dict[str, Any]:
    return {"event": "kernel", "pid": pid, "state": "running"}


def _exited(pid: int, code: int) -> dict[str, Any]:
    return {"event": "kernel", "pid": pid, "state": "exited", "exit_code": code}
