"""The keeper's API over a Unix socket, with the standard library alone (docs: the keeper's API)."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import socket
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

from . import doors, stopping
from .run import Inbox, Run

BASE = "/warmcell/api/v1"
ANSWER_TIMEOUT_S = 30.0
"""For requests that the keeper answers at once. Creating a sandbox and running a cell take as long as they take."""

MEANWHILE_S = 1.0
"""How often whoever waits for GPUs hears where it stands."""
IDLE_MAX = 8
"""Connections that are kept for what comes next."""

_OK = b"HTTP/1.1 200"

PIECE_BYTES = 4 * 2**20
"""How much of a large buffer is sent at a time."""


class KeeperError(Exception):
    """What the keeper refused or could not do, shown as a sentence with its cure."""

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(f"{message.rstrip('.')}. {hint}".strip() if hint else message)
        self.code = code

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class Api:
    """Requests to the keeper at `path`."""

    def __init__(self, path: str, *, spec: Mapping[str, Any] | None = None) -> None:
        """Use the socket at `path`; `spec` is what every sandbox asked for here has."""
        self._path = path
        self._spec = dict(spec or {})
        self._idle: list[UnixConnection] = []
        self._keeps = spec is None
        """A sandbox's own socket goes with it; elsewhere the keeper would stay for a connection that is only kept."""
        doors.before_shutting(self._hang_up)

    def create(self, wanted: Mapping[str, Any], *, waits: Callable[[Mapping[str, Any]], None] | None) -> dict[str, Any]:
        """A new sandbox for ranks, as a SandboxInfo, with these fields of a spec.

        Args:
            wanted: The fields.
            waits: Told now and then where it stands in the queue for its GPUs, as a QueuePlace. None: it does not wait.

        Raises:
            KeeperError: There is none, or nobody answers.
            KeyboardInterrupt: As it comes; nothing is left then.
        """
        spec = {**self._spec, **wanted}
        if "image" in wanted and "python" in spec:
            spec["python"] = ""  # That of the image.
        body = {"spec": spec, "ranks": True, "wait": waits is not None}
        if waits is None or "gpu" not in wanted:
            return self._json("POST", "/sandboxes", body, timeout=None)
        before = {str(one["id"]) for one in self._json("GET", "/sandboxes")["sandboxes"]}
        coming = _Coming(self._connection(None), lambda way: self._json("POST", "/sandboxes", body, way=way))
        try:
            return coming.result(lambda: waits(self._place(before)))
        except BaseException:
            for made in coming.leave():
                self.delete(str(made["id"]))
            raise

    def _place(self, before: Container[str]) -> Mapping[str, Any]:
        """Where the one that was not there before stands in the queue; empty where it does not."""
        with contextlib.suppress(KeeperError):
            found = self._json("GET", "/sandboxes")["sandboxes"]
            for one in found:
                if one["id"] not in before and one.get("owner") == "remote" and one.get("queue"):
                    return dict(one["queue"])
        return {}

    def remote(self) -> dict[str, Any]:
        """What `%%remote` begins with: `defaults`, and `values_bytes`, how much may be sent."""
        return self._json("GET", "/remote")

    def gpus(self) -> list[dict[str, Any]]:
        """The machine's GPUs, each with its `lease`, which is None while it is free."""
        return list(self._json("GET", "/gpus")["gpus"])

    def info(self, sandbox_id: str) -> dict[str, Any]:
        """The SandboxInfo of one."""
        return self._json("GET", f"/sandboxes/{sandbox_id}")

    def delete(self, sandbox_id: str, *, timeout: float = ANSWER_TIMEOUT_S) -> None:
        """Stop and remove one; none of that name is no error."""
        self._json("DELETE", f"/sandboxes/{sandbox_id}", timeout=timeout)

    def result(self, sandbox_id: str) -> bytes | None:
        """What a clone has handed over; None while it has not.

        Raises:
            KeeperError: It ended without that, or nobody answers.
        """
        return self._answer("GET", f"/sandboxes/{sandbox_id}/result") or None

    def fork(self, token: str, n: int, *, ranks: bool = False) -> None:
        """Ask for clones of this kernel, which may be the ranks of a cell; the token says where the answer will be."""
        self._json("POST", "/sandboxes/self/fork", {"token": token, "n": n, **({"ranks": True} if ranks else {})})

    @property
    def run_directory(self) -> str:
        """Where the keeper leaves its answers to those who cannot wait for them on a connection."""
        return os.path.dirname(self._path)

    def snapshot(self, name: str, token: str) -> None:
        """Ask for a snapshot of this sandbox, which is taken at once; where the answer will be has the token."""
        self._json("POST", "/sandboxes/self/snapshot", {"name": name, "token": token})

    def change_gpu(self, gpu: str | None, token: str) -> None:
        """Ask for another GPU for this kernel, or none; where the answer will be has the token in its name."""
        self._json("POST", "/sandboxes/self/gpu", {"gpu": gpu, "token": token})

    def restore(self, name: str, *, cell: str) -> dict[str, Any]:
        """Ask for this sandbox to be as it was in a snapshot. The cell that asks, a msg_id, is ended by that."""
        return self._json("POST", "/sandboxes/self/restore", {"name": name, "cell": cell})

    def snapshots(self) -> list[dict[str, Any]]:
        """The snapshots that this sandbox may be restored from."""
        found = json.loads(self._answer("GET", "/snapshots") or b"[]")
        return list(found["snapshots"] if isinstance(found, dict) else found)

    def interrupt(self, sandbox_id: str, rank: int | None = None) -> None:
        """Interrupt the cells that run in one: on all ranks, or on one."""
        self._json("POST", f"/sandboxes/{sandbox_id}/interrupt", {} if rank is None else {"rank": rank})

    def run(self, sandbox_id: str, head: Mapping[str, Any], body: bytes, inbox: Inbox) -> Run:
        """A cell that is to run, in the form of the keeper's API; what comes of it goes into `inbox`."""
        path = f"{BASE}/sandboxes/{sandbox_id}/run"
        return Run(self._kept_connection, path, head, body, inbox, _told, lambda one: self._keep(one, sandbox_id))

    def is_connected(self, sandbox_id: str) -> bool:
        """Whether a connection is still open that a cell of this sandbox has used last: it ends with the sandbox."""
        return any(one.used_for == sandbox_id and _is_open(one) for one in list(self._idle))

    def put_values(
        self, sandbox_id: str, number: int, pieces: Iterable[bytes | memoryview], size: int
    ) -> Iterator[int]:
        """Put values where all ranks of a sandbox can map them; gives how many bytes have gone so far.

        Raises:
            KeeperError: They do not fit, or nobody answers.
        """
        try:
            with doors.passing(None), contextlib.closing(self._connection(None)) as connection:
                connection.putrequest("PUT", f"{BASE}/sandboxes/{sandbox_id}/values/{number}")
                connection.putheader("Content-Length", str(size))
                connection.endheaders()
                sent = 0
                with contextlib.suppress(BrokenPipeError):  # Refused before all was sent; the answer says why.
                    for piece in pieces:
                        view = memoryview(piece)
                        for start in range(0, view.nbytes, PIECE_BYTES):
                            part = view[start : start + PIECE_BYTES]
                            stopping.check()
                            connection.sock.sendall(part)
                            sent += part.nbytes
                            yield sent
                with contextlib.closing(connection.getresponse()) as response:
                    answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(error) from error
        if response.status >= 400:
            raise _failure(answer)

    @contextlib.contextmanager
    def new_values(self, sandbox_id: str, number: int, size: int) -> Iterator[int]:
        """A descriptor to write so many bytes of values with, of which nothing stays if that fails.

        Raises:
            KeeperError: They would not fit, or nobody answers; `unsupported`: the keeper hands over none here.
        """
        with self._descriptor("POST", sandbox_id, number, size) as (fd, connection):
            yield fd
            with contextlib.suppress(OSError):  # Then the sandbox has gone, as what comes next will say.
                connection.sendall(b"\n")

    @contextlib.contextmanager
    def written_values(self, sandbox_id: str, number: int) -> Iterator[int]:
        """A descriptor to read values with that were written; raises as `new_values`."""
        with self._descriptor("GET", sandbox_id, number) as (fd, _):
            yield fd

    @contextlib.contextmanager
    def _descriptor(
        self, method: str, sandbox_id: str, number: int, size: int = 0
    ) -> Iterator[tuple[int, socket.socket]]:
        lines = [
            f"{method} {BASE}/sandboxes/{sandbox_id}/values/{number} HTTP/1.1",
            *("Host: keeper", "Connection: close", "Content-Length: 0", f"Warmcell-Bytes: {size}", "", ""),
        ]
        with doors.passing(ANSWER_TIMEOUT_S), contextlib.ExitStack() as stack:
            try:
                connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                connection.settimeout(ANSWER_TIMEOUT_S)
                connection.connect(self._path)
                connection.sendall("\r\n".join(lines).encode())
                answer, found, _, _ = socket.recv_fds(connection, 2**16, 1)
                for fd in found:
                    stack.callback(os.close, fd)
                if not found and not answer.startswith(_OK):
                    while more := connection.recv(2**16):
                        answer += more
            except OSError as error:
                raise _unreachable(error) from error
            if not found:
                refused = _failure(answer.partition(b"\r\n\r\n")[2])
                raise KeeperError("Nothing was handed over", code="unsupported") if answer.startswith(_OK) else refused
            yield found[0], connection

    def delete_values(self, sandbox_id: str, number: int) -> None:
        """Remove them; a rank that has mapped them keeps them."""
        self._json("DELETE", f"/sandboxes/{sandbox_id}/values/{number}")

    def _json(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        timeout: float | None = ANSWER_TIMEOUT_S,
        way: UnixConnection | None = None,
    ) -> dict[str, Any]:
        answer = self._answer(method, path, body, timeout=timeout, way=way)
        return dict(json.loads(answer)) if answer else {}

    def _answer(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        timeout: float | None = ANSWER_TIMEOUT_S,
        way: UnixConnection | None = None,
    ) -> bytes:
        try:
            with doors.passing(timeout), contextlib.closing(way or self._connection(timeout)) as connection:
                content = None if body is None else json.dumps(body).encode()
                connection.request(method, BASE + path, content, {"Content-Type": "application/json"})
                with contextlib.closing(connection.getresponse()) as response:
                    answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(error) from error
        if response.status >= 400:
            raise _failure(answer)
        return answer

    def _connection(self, timeout: float | None) -> UnixConnection:
        return UnixConnection(self._path, timeout)

    def _kept_connection(self) -> UnixConnection:
        """One that has no time limit, which may have been used before and is still good."""
        with contextlib.suppress(IndexError):
            while True:
                connection = self._idle.pop()
                if _is_open(connection):
                    return connection
                connection.close()
        return self._connection(None)

    def _keep(self, connection: UnixConnection, used_for: str) -> None:
        connection.used_for = used_for
        if connection.sock is None or not self._keeps or len(self._idle) >= IDLE_MAX:
            connection.close()
        else:
            self._idle.append(connection)

    def _hang_up(self) -> None:
        """Close those that are kept."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


class _Coming:
    """A request that takes long, made in a thread, so that whoever waits for it can be told things, and interrupted."""

    def __init__(self, way: UnixConnection, ask: Callable[[UnixConnection], dict[str, Any]]) -> None:
        self._way = way
        self._over = threading.Event()
        self._made: list[dict[str, Any]] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._work, args=(ask,), daemon=True, name="warmcell-asks").start()

    def result(self, meanwhile: Callable[[], None]) -> dict[str, Any]:
        """The answer; `meanwhile` is called now and then."""
        while not self._over.wait(MEANWHILE_S):
            meanwhile()
        if self._error is not None:
            raise self._error
        return self._made[0]

    def leave(self) -> list[dict[str, Any]]:
        """Have it not be; what has come of it all the same."""
        with contextlib.suppress(OSError, AttributeError):
            self._way.sock.shutdown(socket.SHUT_RDWR)
        self._over.wait(ANSWER_TIMEOUT_S)
        return self._made

    def _work(self, ask: Callable[[UnixConnection], dict[str, Any]]) -> None:
        try:
            self._made.append(ask(self._way))
        except BaseException as error:
            self._error = error
        finally:
            self._over.set()


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("keeper", timeout=timeout)
        self.used_for = ""
        """The sandbox of the cell that has used it last."""
        self._path = path

    def connect(self) -> None:
        """Connect (the base's hook)."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _is_open(connection: UnixConnection) -> bool:
    """Whether one that nobody uses is good: all that can come is its end."""
    try:
        return not select.select([connection.sock], [], [], 0)[0]
    except (OSError, ValueError):  # It was closed here.
        return False


def _failure(answer: bytes) -> KeeperError:
    try:
        told = json.loads(answer)
        return KeeperError(str(told["message"]), str(told.get("hint", "")), str(told.get("code", "")))
    except (ValueError, KeyError, TypeError):
        return KeeperError("The keeper refused, without saying why", "Look into its log: `warmcell doctor` names it.")


def _told(what: bytes | Mapping[str, Any] | BaseException) -> BaseException:
    """The error for what came instead of a cell's end."""
    if isinstance(what, bytes):
        return _failure(what)
    if isinstance(what, Mapping):
        return KeeperError(str(what.get("message", "")), str(what.get("hint", "")), str(what.get("code", "")))
    if isinstance(what, (OSError, EOFError, http.client.HTTPException, ValueError)):
        return _unreachable(what)
    return what


def _unreachable(error: BaseException) -> KeeperError:
    if isinstance(error, FileNotFoundError):
        return KeeperError(
            "No other sandbox can be asked for from here",
            "%%remote works in notebooks whose kernel Warmcell's keeper started, and one level deep in remote cells.",
            "unreachable",
        )
    return KeeperError(
        f"The keeper cannot be reached ({error})", "It may have been stopped; restart this kernel.", "unreachable"
    )
