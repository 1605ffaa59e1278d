"""The guest protocol: one connection per request on `init.sock`, a JSON line, then perhaps a raw stream."""

from __future__ import annotations

import _signal
import os
import sys

from . import processes
from .accept import Acceptors
from .background import background, is_ours
from .endpoint import Endpoint, ignore
from .forward import Forward
from .jsonline import decode, encode
from .kernels import Kernels
from .loop import READ, Loop
from .processes import Execution, kill_group
from .relays import Relays, bound, remove_socket
from .template import Template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, ClassVar

PROTOCOL = 1
LINE_MAX_BYTES = 2**20
RETURN_LOOK_S = 0.003
FIRST_REQUEST_S = 120.0
"""Who has made the sandbox speaks with it at once, unless it was killed just then."""


class Refusal(Exception):
    """A request that gets `{"ok": false}`."""

    def __init__(self, code: str, message: str, hint: str = "Send a request of the guest protocol.") -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


class Server:
    """Answers on `init.sock` in the run directory."""

    def __init__(self, run: str, guest: str, python: str, *, alone: bool) -> None:
        """It is `alone` where all processes that it sees are its sandbox's."""
        self._alone = alone
        self._loop = Loop()
        self._guest = guest
        os.chdir(run)
        self._connections: list[Endpoint] = []
        self._relays = Relays(self._loop, self.admit)
        self._acceptors = Acceptors(self._loop)
        self._template = Template(self._loop, guest=guest, python=python, announce=self._announce)
        self._kernels = Kernels(
            self._loop, self._template, self._relays, guest=guest, python=python, announce=self._announce
        )
        self._listeners: list[Endpoint] = []
        self._executions: dict[int, Execution] = {}
        self._programs: set[int] = set()
        """Those of them that are programs of ours."""
        self._listen()

    def run(self) -> None:
        """Serve until SIGTERM."""
        self._loop.run(first_within_s=FIRST_REQUEST_S)

    def _listen(self) -> None:
        """Bind the socket under another name first, so that who sees `init.sock` can connect to it."""
        self._socket = bound(".init.sock")
        os.rename(".init.sock", "init.sock")
        self._loop.watch(self._socket.fileno(), READ, self._on_connect)
        try:
            waiting = os.open("ready", os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return  # Nobody waits; who comes later finds the socket.
        os.write(waiting, b"\n")
        os.close(waiting)

    def _on_connect(self, events: int) -> None:
        try:
            fd, _ = self._socket._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        Request(self, self._loop, fd)

    def admit(self, connection: Endpoint) -> None:
        """Know a connection, for `leave`."""
        self._connections = [known for known in self._connections if not known.closed]
        self._connections.append(connection)

    def _leave(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        """Have nothing to do with the host until a file appears in the run directory; the end of `connection` says so.

        What is waited for is looked for again and again: what comes back may be in another run directory, and of what
        changes on the host nothing else tells a kernel of the sandbox's own.
        """
        until = _string(request, "until")
        if not until or "/" in until or until.startswith("."):
            raise Refusal("invalid_request", "until must be the name of a file in the run directory")
        answer(ok=True, stream=True)
        self._loop.look(0, lambda: self._go(until, connection))

    def _go(self, until: str, connection: Endpoint) -> None:
        self._loop.forget(self._socket.fileno())
        self._socket.close()
        remove_socket("init.sock")
        self._relays.leave()
        for known in self._connections:
            if known is not connection:
                known.hang_up()
        connection.hang_up()
        self._connections = []
        self._loop.look(RETURN_LOOK_S, lambda: self._come_back(until))

    def _come_back(self, until: str) -> None:
        if not os.path.exists(until):
            return
        self._loop.look(None)
        self._relays.come_back()
        self._listen()

    def _announce(self, event: Mapping[str, Any]) -> None:
        line = encode(event)
        for listener in list(self._listeners):
            listener.write(line)
            if listener.crowded:
                self._listeners.remove(listener)
                listener.close()

    def handle(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        """Do what a request line says.

        Raises:
            Refusal: It cannot be done.
        """
        handler = self._OPERATIONS.get(str(request.get("op")))
        if handler is None:
            raise Refusal("unsupported", f"no operation {request.get('op')!r}")
        handler(self, request, connection, answer)

    def _hello(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        version = ".".join(map(str, sys.version_info[:3]))
        answer(ok=True, pid=os.getpid(), python=version, protocol=PROTOCOL)

    def _events(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        answer(ok=True, stream=True)
        connection.on_data = ignore
        connection.on_end = lambda: self._listeners.remove(connection) if connection in self._listeners else None
        self._listeners.append(connection)
        for event in [self._template.event(), *self._kernels.present()]:
            connection.write(encode(event))

    def _prepare(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        preload = _strings(request, "preload")
        env = _environment(request)
        self._template.prepare(preload, name=_string(request, "name", ""), env=env)
        answer(ok=True)

    def _kernel(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        engine = _string(request, "engine", "template")
        if engine not in ("template", "cold"):
            raise Refusal("invalid_request", f"engine must be template or cold, not {engine!r}")
        env = _environment(request)
        self._kernels.start(
            connection,
            lambda told: answer(**told),
            file=_string(request, "connection"),
            env=env,
            cwd=_directory(request, env),
            engine=engine,
        )

    def _signal(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        pid, signum = _integer(request, "pid"), _integer(request, "signum")
        if not 0 <= signum <= 64:
            raise Refusal("invalid_request", f"{signum} is no signal")
        group = request.get("group") is True
        if pid in self._executions:
            if group:
                kill_group(pid, signum)
            else:
                os.kill(pid, signum)
        elif not self._kernels.signal(pid, signum, group=group):
            raise Refusal("not_found", f"no process of ours has pid {pid}", "It has ended; nothing needs to be done.")
        answer(ok=True)

    def _adopt(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        pid = _integer(request, "pid")
        if pid <= 1 or pid == os.getpid():
            raise Refusal("invalid_request", f"process {pid} is no kernel")
        try:
            self._kernels.adopt(pid)
        except (ProcessLookupError, OverflowError):
            raise Refusal("not_found", f"there is no process {pid}", "The restored kernel has ended.") from None
        answer(ok=True)

    def _background(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        own = {*self._kernels.processes(), *self._programs}
        answer(ok=True, **background(guest=self._guest, own=own, alone=self._alone))

    def _exec(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        argv = _strings(request, "argv")
        if not argv:
            raise Refusal("invalid_request", "argv is empty")
        env = _environment(request)
        started = Execution(
            self._loop,
            connection,
            argv=argv,
            env=env,
            cwd=_directory(request, env),
            pty=request.get("pty") is True,
            size=_size(request.get("size")),
        )
        self._follow(started, ours=is_ours(argv, self._guest))
        answer(ok=True, stream=True, pid=started.pid)

    def _files(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        """As `exec`, of our own program: what it is told to do comes on its standard input."""
        env = _environment({})
        started = Execution(
            self._loop,
            connection,
            argv=[sys.executable, "-I", "-S", self._guest + "/files.py"],
            env=env,
            cwd=_directory({}, env),
            pty=False,
        )
        self._follow(started, ours=True)
        answer(ok=True, stream=True, pid=started.pid)

    def _follow(self, started: Execution, *, ours: bool) -> None:
        """Know a process as long as it runs."""

        def ended() -> None:
            self._executions.pop(started.pid, None)
            self._programs.discard(started.pid)

        self._executions[started.pid] = started
        if ours:
            self._programs.add(started.pid)
        started.on_exit = ended

    def _forward(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        port = _integer(request, "port")
        if not 0 < port < 65536:
            raise Refusal("invalid_request", f"{port} is no port")
        Forward(self._loop, connection, port, answer)

    def _accept(self, request: Mapping[str, Any], connection: Endpoint, answer: Callable[..., None]) -> None:
        port = _integer(request, "port")
        if not 0 < port < 65536:
            raise Refusal("invalid_request", f"{port} is no port")
        if request.get("wait") is False:
            self._acceptors.open(port)
            answer(ok=True)
        else:
            self._acceptors.wait(connection, port, answer)

    _OPERATIONS: ClassVar[Mapping[str, Callable[..., None]]] = {
        "hello": _hello,
        "events": _events,
        "prepare": _prepare,
        "kernel": _kernel,
        "adopt": _adopt,
        "signal": _signal,
        "background": _background,
        "exec": _exec,
        "files": _files,
        "forward": _forward,
        "accept": _accept,
        "leave": _leave,
    }


class Request:
    """A connection until its line has come."""

    def __init__(self, server: Server, loop: Loop, fd: int) -> None:
        self._server = server
        self._line = bytearray()
        self._connection = Endpoint(loop, fd, on_data=self._on_data, duplex=True)
        server.admit(self._connection)

    def _on_data(self, data: bytes) -> None:
        self._line += data
        line, newline, rest = bytes(self._line).partition(b"\n")
        if not newline:
            if len(self._line) > LINE_MAX_BYTES:
                self._answer(ok=False, code="invalid_request", message="the request is longer than 1 MiB")
            return
        self._connection.on_data = ignore
        try:
            self._server.handle(decode(line), self._connection, self._answer)
        except Refusal as error:
            self._answer(ok=False, code=error.code, message=str(error), hint=error.hint)
        except ValueError as error:
            self._answer(ok=False, code="invalid_request", message=str(error))
        except OSError as error:
            self._answer(ok=False, code="backend_error", message=str(error))
        else:
            if rest and self._connection.on_data is not None:
                self._connection.on_data(rest)

    def _answer(self, *, stream: bool = False, **told: Any) -> None:
        self._connection.write(encode(told))
        if not stream:
            self._connection.finish()


def _string(request: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = request.get(name, default)
    if not isinstance(value, str) or "\0" in value:
        raise Refusal("invalid_request", f"{name} must be a string")
    return value


def _integer(request: Mapping[str, Any], name: str) -> int:
    value = request.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refusal("invalid_request", f"{name} must be a whole number")
    return value


def _strings(request: Mapping[str, Any], name: str) -> list[str]:
    value = request.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
        raise Refusal("invalid_request", f"{name} must be a list of strings")
    return value


def _size(value: object) -> Sequence[int]:
    """Rows and columns, or nothing."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 <= n < 1 << 16 for n in value):
        raise Refusal("invalid_request", "size must be rows and columns")
    return value


def _environment(request: Mapping[str, Any]) -> dict[str, str]:
    """Init's own environment with what the request says on top; null takes a variable away."""
    env = dict(os.environ)
    changes = request.get("env")
    if changes is None:
        return env
    if not isinstance(changes, dict):
        raise Refusal("invalid_request", "env must be an object")
    for name, value in changes.items():
        if value is None:
            env.pop(name, None)
        elif isinstance(value, str) and name and "=" not in name and "\0" not in name + value:
            env[name] = value
        else:
            raise Refusal("invalid_request", f"{name!r} in env must be a name with a string or null")
    return env


def _directory(request: Mapping[str, Any], env: Mapping[str, str]) -> str:
    """The directory asked for; the home where none is."""
    cwd = _string(request, "cwd", "") or env.get("HOME", "/")
    if not os.path.isdir(cwd):
        raise Refusal("invalid_request", f"no directory {cwd} in the sandbox", "Choose one inside the workspace.")
    return cwd


def _end_all() -> None:
    """Kill what is left below this process. In a pid namespace of its own the system does that."""
    while True:
        try:
            with open("/proc/thread-self/children") as listing:
                for pid in listing.read().split():
                    os.kill(int(pid), _signal.SIGKILL)
            os.waitpid(-1, 0)
        except (ChildProcessError, FileNotFoundError):
            return


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM, then end everything."""
    options = dict(zip(arguments[::2], arguments[1::2]))
    needed = {"--run", "--guest", "--python"}
    if not needed <= options.keys() <= {*needed, "--namespace", "--umask"}:
        usage = b"usage: init.py --run DIR --guest DIR --python PYTHON [--namespace own|shared] [--umask OCTAL]\n"
        os.write(2, usage)
        return 2
    if "--umask" in options:
        os.umask(int(options["--umask"], 8))
    first = os.getpid() == 1
    own_namespace = options.get("--namespace") == "own"
    if not first:
        processes.be_first(own_namespace=own_namespace)
    Server(options["--run"], options["--guest"], options["--python"], alone=first or own_namespace).run()
    if not first:
        _end_all()
    return 128 + int(_signal.SIGTERM)
