"""The fork server as init sees it: started, followed while it imports, asked for kernels, tried again."""

from __future__ import annotations

import _signal
import _socket
import os
import sys
import time

from .endpoint import Endpoint
from .jsonline import decode, encode
from .loop import Loop
from .processes import close_all, lifeline, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

LAST_WORDS_BYTES = 4096
STEADY_SECONDS = 30.0
"""A fork server that fails later than this after it became ready is started again."""

AT_START = (
    *("HOME", "LANG", "LANGUAGE", "TZ", "GLIBC_TUNABLES", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"),
    *("MPLBACKEND", "MPLCONFIGDIR", "MATPLOTLIBRC"),
)
AT_START_PREFIXES = (
    *("PYTHON", "LD_", "LC_", "MALLOC_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "GOTO_", "BLIS_", "NUMEXPR_", "NUMBA_", "ARROW_"),
    *("TORCH", "PYTORCH_", "TF_", "XLA_", "JAX_"),
)
"""Variables that an interpreter or a library reads once, when it is loaded. A kernel that wants other
values than the template had cannot come from it."""


def read_at_start(env: Mapping[str, str]) -> dict[str, str]:
    """The part of `env` that a process cannot take up later."""
    return {k: v for k, v in env.items() if k in AT_START or k.startswith(AT_START_PREFIXES)}


class Template:
    """At most one fork server, and what is known about it."""

    def __init__(self, loop: Loop, *, guest: str, python: str, announce: Callable[[Mapping[str, Any]], None]) -> None:
        self.on_forked: Callable[[int, int], None] = lambda number, pid: None
        self.on_exited: Callable[[int, int], None] = lambda pid, code: None
        self._loop = loop
        self._guest = guest
        self._python = python
        self._announce = announce
        self._server: _Server | None = None
        self._name = ""
        self._preload: list[str] = []
        self._env: dict[str, str] = {}
        self._left_out: dict[str, str] = {}
        self._state = "none"
        self._importing = ""
        self._unfit = False
        self._since = self._seconds = 0.0
        self._began = 0.0
        self._imported: list[str] = []
        self._failed: dict[str, str] = {}

    def event(self) -> dict[str, Any]:
        """The present state as an event."""
        return {
            "event": "template",
            "state": self._state,
            "name": self._name,
            "importing": self._importing,
            "since": self._since,
            "seconds": round(self._seconds, 3),
            "imported": list(self._imported),
            "failed": dict(self._failed),
        }

    def prepare(self, preload: Sequence[str], *, name: str, env: Mapping[str, str]) -> None:
        """Start a fork server that imports `preload` in turn; an earlier one ends, its kernels live on."""
        self._name = name
        self._preload = list(preload)
        self._env = dict(env)
        self._left_out = {}
        self._start()

    def why_not(self, env: Mapping[str, str]) -> str:
        """Why a kernel with this environment cannot come from the template now; empty if it can."""
        if self._state != "ready" or self._server is None:
            return f"the template is in state {self._state}"
        if self._server.busy:
            return "the template does not take requests"
        wanted, given = read_at_start(env), read_at_start(self._env)
        differing = sorted(k for k in wanted.keys() | given.keys() if wanted.get(k) != given.get(k))
        return f"the template was imported with another {', '.join(differing)}" if differing else ""

    def processes(self) -> list[int]:
        """The fork server, while there is one."""
        return [] if self._server is None else [self._server.pid]

    def fork(self, request: Mapping[str, Any], ready: int) -> None:
        """Ask for a kernel, which says on `ready` when it can be talked to."""
        assert self._server is not None
        self._server.ask(encode(request), ready)

    def _start(self) -> None:
        if self._server is not None:
            self._server.end()
            self._server = None
        self._imported, self._failed = [], dict(self._left_out)
        self._importing = ""
        self._began = self._since = time.time()
        self._seconds = 0.0
        self._state = "importing"
        modules = [name for name in self._preload if name not in self._left_out]
        try:
            self._server = _Server(self, self._loop, self._guest, self._python, self._env, modules)
        except OSError as error:  # No room for a process. Kernels start without it.
            self._state = "failed"
            self._failed["fork server"] = f"it could not start: {error.strerror}"
        self._announce(self.event())

    def told(self, server: _Server, message: Mapping[str, Any]) -> None:
        """A line from a fork server."""
        if "forked" in message:
            self.on_forked(message["forked"], message["pid"])
        elif "exited" in message:
            self.on_exited(message["exited"], message["code"])
        elif server is self._server:
            self._progress(message)
            self._announce(self.event())

    def _progress(self, message: Mapping[str, Any]) -> None:
        self._since = time.time()
        self._seconds = self._since - self._began
        self._importing = str(message.get("importing", ""))
        if "imported" in message:
            self._imported.append(message["imported"])
        elif "failed" in message:
            self._failed[message["failed"]] = message["error"]
        elif "unfit" in message:
            self._left_out[message["unfit"]] = self._failed[message["unfit"]] = message["error"]
            self._unfit = True
        elif "ready" in message:
            self._state = "ready"

    def ended(self, server: _Server, code: int, words: Sequence[str]) -> None:
        """A fork server is gone. One that an import has killed is tried again without that module."""
        if server is not self._server:
            return
        self._server = None
        culprit, self._importing = self._importing, ""
        how = f"was killed by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
        reason = ": ".join([f"the process {how}", *words[-1:]])
        steady = self._state == "ready" and time.time() - self._since > STEADY_SECONDS
        self._state = "failed"
        again = self._unfit or culprit in self._preload or steady
        if self._unfit:
            self._unfit = False
        elif culprit:
            self._left_out[culprit] = reason
            self._failed[culprit] = reason
        else:
            self._failed["fork server"] = reason
        self._announce(self.event())
        if again:
            self._start()


class _Server:
    """One fork server process with its control socket and its last words."""

    def __init__(
        self, template: Template, loop: Loop, guest: str, python: str, env: Mapping[str, str], modules: list[str]
    ) -> None:
        self._template = template
        self._loop = loop
        self._words = bytearray()
        self._partial = bytearray()
        self._code: int | None = None
        ours, theirs = (end.detach() for end in _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM))
        kept, given = [ours], [theirs]
        argv = [python, f"{guest}/enter.py", "kernel.fork_server", str(theirs), str(lifeline()), os.getcwd(), *modules]
        keep = [fd for fd in (theirs, lifeline()) if fd >= 0]
        try:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            kept.append(reading)
            given.append(writing)
            nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            given.append(nothing)
            again = os.dup(ours)
            kept.append(again)
            self.pid = spawn(argv, env=env, cwd="/", stdin=nothing, stdout=nothing, stderr=writing, keep=keep)
        except BaseException:
            close_all(kept)
            raise
        finally:
            close_all(given)
        self._socket = _socket.socket(fileno=again)
        self._control = Endpoint(loop, ours, on_data=self._on_data, on_end=self._on_control_end, duplex=True)
        self._output = Endpoint(loop, reading, on_data=self._on_words)
        loop.adopt(self.pid, self._on_exit)

    @property
    def busy(self) -> bool:
        """Whether it has not taken earlier requests yet."""
        return self._control.closed or self._control.unsent

    def ask(self, line: bytes, fd: int) -> None:
        """Send a request together with a descriptor."""
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
        try:
            sent = self._socket.sendmsg([line], rights)
        except OSError:
            return  # The descriptor's other end tells whoever asked.
        self._control.write(line[sent:])

    def end(self) -> None:
        """Kill it; kernels that came from it are no part of it."""
        if self._code is None:
            os.kill(self.pid, _signal.SIGKILL)

    def _on_data(self, data: bytes) -> None:
        self._partial += data
        *lines, rest = bytes(self._partial).split(b"\n")
        self._partial = bytearray(rest)
        for line in lines:
            try:
                self._template.told(self, decode(line))
            except (ValueError, KeyError, TypeError):
                self.end()  # It runs the user's imports; whatever else comes from there is no protocol.
                return

    def _on_words(self, data: bytes) -> None:
        self._words += data
        del self._words[:-LAST_WORDS_BYTES]

    def _on_control_end(self) -> None:
        self.end()

    def _on_exit(self, code: int) -> None:
        self._code = code
        self._control.read_available(2**20)
        self._control.close()
        self._output.read_available(2**20)
        self._output.close()
        self._socket.close()
        self._template.ended(self, code, bytes(self._words).decode("utf-8", "replace").strip().splitlines()[-1:])
