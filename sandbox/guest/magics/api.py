"""The keeper's API over a Unix socket, with the standard library alone (docs: the keeper's API)."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ..values import dumps, loads
from . import doors

BASE = "/warmcell/api/v1"
ANSWER_TIMEOUT_S = 30.0
"""For requests that the keeper answers at once. Creating a sandbox and running a cell take as long as they take."""

MESSAGES_MAX = 1000
"""How many may wait to be shown; beyond that the remote cell waits."""


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

    def create(self, *, gpu: str | None) -> dict[str, Any]:
        """A new sandbox, as a SandboxInfo.

        Raises:
            KeeperError: There is none, or nobody answers.
        """
        spec = {**self._spec, **({"gpu": gpu} if gpu else {})}
        return self._json("POST", "/sandboxes", {"spec": spec}, timeout=None)

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

    def fork(self, token: str, n: int) -> None:
        """Ask for clones of this kernel; where the answer will be has the token in its name."""
        self._json("POST", "/sandboxes/self/fork", {"token": token, "n": n})

    @property
    def run_directory(self) -> str:
        """Where the keeper leaves its answers to those who cannot wait for them on a connection."""
        return os.path.dirname(self._path)

    def snapshot(self, name: str, token: str) -> None:
        """Ask for a snapshot of this sandbox, which is taken at once; where the answer will be has the token."""
        self._json("POST", "/sandboxes/self/snapshot", {"name": name, "token": token})

    def restore(self, name: str, *, cell: str) -> dict[str, Any]:
        """Ask for this sandbox to be as it was in a snapshot. The cell that asks, a msg_id, is ended by that."""
        return self._json("POST", "/sandboxes/self/restore", {"name": name, "cell": cell})

    def snapshots(self) -> list[dict[str, Any]]:
        """The snapshots that this sandbox may be restored from."""
        found = json.loads(self._answer("GET", "/snapshots") or b"[]")
        return list(found["snapshots"] if isinstance(found, dict) else found)

    def interrupt(self, sandbox_id: str) -> None:
        """Interrupt the cell that runs in one."""
        self._json("POST", f"/sandboxes/{sandbox_id}/interrupt", {})

    def run(self, sandbox_id: str, code: str, *, send: Mapping[str, Any], get: Sequence[str]) -> Run:
        """Begin to run a cell; the result tells what comes of it.

        Raises:
            CannotTravelError: A variable of `send` cannot be pickled.
        """
        data = dumps(send) if send else b""
        head = json.dumps({"code": code, "send": len(data), "get": list(get)}).encode() + b"\n"
        return Run(self._connection(None), f"{BASE}/sandboxes/{sandbox_id}/run", head, data)

    def _json(
        self, method: str, path: str, body: object = None, *, timeout: float | None = ANSWER_TIMEOUT_S
    ) -> dict[str, Any]:
        answer = self._answer(method, path, body, timeout=timeout)
        return dict(json.loads(answer)) if answer else {}

    def _answer(
        self, method: str, path: str, body: object = None, *, timeout: float | None = ANSWER_TIMEOUT_S
    ) -> bytes:
        try:
            with doors.passing(timeout), contextlib.closing(self._connection(timeout)) as connection:
                content = None if body is None else json.dumps(body).encode()
                connection.request(method, BASE + path, content, {"Content-Type": "application/json"})
                with contextlib.closing(connection.getresponse()) as response:
                    answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(error) from error
        if response.status >= 400:
            raise _failure(answer)
        return answer

    def _connection(self, timeout: float | None) -> _UnixConnection:
        return _UnixConnection(self._path, timeout)


class Run:
    """A cell that runs in a sandbox: its messages as they come, then how it ended.

    The connection belongs to a thread, so that an interrupt of the waiting one cannot tear a message apart.
    """

    def __init__(self, connection: _UnixConnection, path: str, head: bytes, data: bytes) -> None:
        self.done: dict[str, Any] = {}
        """The last line; empty until the messages have ended."""
        self._values = b""
        self._connection = connection
        self._aborted = ""
        self._messages: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue(MESSAGES_MAX)
        threading.Thread(target=self._talk, args=(path, head, data), daemon=True, name="warmcell-remote").start()

    def next(self) -> dict[str, Any] | None:
        """The next message of the cell's output; None when it has ended.

        Raises:
            KeeperError: The sandbox or the keeper is gone, or the run was aborted.
        """
        message = self._messages.get()
        if isinstance(message, BaseException):
            raise KeeperError(self._aborted, code="aborted") if self._aborted else message
        return message

    def values(self) -> dict[str, Any]:
        """What was brought back, once `next` has given None.

        Raises:
            CannotTravelError: It cannot be unpickled here.
        """
        return loads(self._values) if self._values else {}

    def abort(self, why: str) -> None:
        """Give up waiting: `next` raises a KeeperError that says `why`. Callable from any thread."""
        self._aborted = why
        self.close()

    def close(self) -> None:
        """Let go; a cell that still runs is interrupted by the keeper. Idempotent."""
        with contextlib.suppress(OSError, AttributeError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(queue.Empty):
            while True:
                self._messages.get_nowait()

    def _talk(self, path: str, head: bytes, data: bytes) -> None:
        with doors.passing(None), contextlib.closing(self._connection):
            try:
                self._exchange(path, head, data)
                self._messages.put(None)
            except (OSError, EOFError, http.client.HTTPException, ValueError) as error:
                self._messages.put(_unreachable(error))
            except KeeperError as error:
                self._messages.put(error)

    def _exchange(self, path: str, head: bytes, data: bytes) -> None:
        connection = self._connection
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", "application/octet-stream")
        connection.putheader("Content-Length", str(len(head) + len(data)))
        connection.endheaders()
        with contextlib.suppress(BrokenPipeError):  # Refused before all was sent; the answer says why.
            connection.send(head)
            connection.send(data)
        response = connection.getresponse()
        if response.status != 200:
            raise _failure(response.read())
        while True:
            line = response.readline()
            if not line:
                raise EOFError("the answer ended early")
            message = json.loads(line)
            if message.get("done"):
                break
            self._messages.put(message)
        failure = message.get("failure")
        if failure:
            raise KeeperError(failure.get("message", ""), failure.get("hint", ""), failure.get("code", ""))
        self._values = response.read(message.get("get") or 0)
        self.done = message


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("keeper", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _failure(answer: bytes) -> KeeperError:
    try:
        told = json.loads(answer)
        return KeeperError(str(told["message"]), str(told.get("hint", "")), str(told.get("code", "")))
    except (ValueError, KeyError, TypeError):
        return KeeperError("The keeper refused, without saying why", "Look into its log: `warmcell doctor` names it.")


def _unreachable(error: BaseException) -> KeeperError:
    if isinstance(error, FileNotFoundError):
        return KeeperError(
            "No other sandbox can be asked for from here",
            "%%remote works in notebooks whose kernel Warmcell's keeper started; restart this one in Jupyter.",
            "unreachable",
        )
    return KeeperError(
        f"The keeper cannot be reached ({error})", "It may have been stopped; restart this kernel.", "unreachable"
    )
