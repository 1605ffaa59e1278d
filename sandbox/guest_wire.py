"""The bytes between host and guest: how the host finds the guest's socket, and how it reads what comes.

The guest can write the run directory, so nothing in it is trusted: the socket is opened without
following links and what comes from it is checked before it is used.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import InvalidRequestError, ProtocolError, TransportError
from warmcell.sandbox.models import TemplateStatus

RESTART = "Restart the sandbox."
SOCKET_NAME = re.compile(r"[.]?[a-z0-9]+")
SOCKET_NAME_MAX = 32


async def connect(run_directory: Path) -> socket.socket:
    """Connect to `init.sock` itself: a link that the guest has put there is refused.

    Raises:
        TransportError: Nothing listens there.
    """
    try:
        found = os.open(run_directory / "init.sock", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise gone() from error
    try:
        if not stat.S_ISSOCK(os.fstat(found).st_mode):
            raise ProtocolError("init.sock in the run directory is no socket", hint=RESTART)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, f"/proc/self/fd/{found}")
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                raise gone() from error
            raise
    finally:
        os.close(found)
    return connection


async def wait_for_socket(run_directory: Path) -> None:
    """Wait for the socket: init opens the FIFO `ready`, if there is one, after the socket is there."""
    fifo = run_directory / "ready"
    try:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(fifo)
        reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ProtocolError(f"`ready` in the run directory cannot be used: {error.strerror}", hint=RESTART) from error
    try:
        if not stat.S_ISFIFO(os.fstat(reading).st_mode):
            raise ProtocolError("`ready` in the run directory is no FIFO", hint=RESTART)
        # The guest may run under another uid; the run directory itself is closed to everybody else.
        os.fchmod(reading, 0o622)
        if not _is_socket(run_directory / "init.sock"):
            await _readable(reading)
    finally:
        os.close(reading)
        fifo.unlink(missing_ok=True)


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return False


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


def read_object(line: bytes) -> Mapping[str, Any]:
    """The JSON object in what a guest said.

    Raises:
        ProtocolError: It is something else.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("The guest answered something that is not JSON", hint=RESTART) from error
    if not isinstance(value, dict):
        raise ProtocolError("The guest answered something that is no object", hint=RESTART)
    return value


def whole_number(answer: Mapping[str, Any], name: str) -> int:
    """The whole number of that name in what a guest said.

    Raises:
        ProtocolError: There is none.
    """
    value = answer.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ProtocolError(f"The guest said {name} {value!r}", hint=RESTART)
    return value


def socket_name(answer: Mapping[str, Any]) -> str:
    """How the names of a kernel's sockets begin, according to a guest: no path, so that nothing else is meant.

    Raises:
        ProtocolError: It is nothing of the kind.
    """
    name = answer.get("sockets")
    if not isinstance(name, str) or len(name) > SOCKET_NAME_MAX or not SOCKET_NAME.fullmatch(name):
        raise ProtocolError(f"The guest said sockets {str(name)[:SOCKET_NAME_MAX]!r}", hint=RESTART)
    return name


def is_event(line: Mapping[str, Any]) -> bool:
    """Whether it is an event of a kind that this version knows, and then a sound one."""
    fields = {key: value for key, value in line.items() if key != "event"}
    if line.get("event") == "template":
        try:
            TemplateStatus.from_json(fields)
        except InvalidRequestError as error:
            raise ProtocolError(f"The guest told a template that is none: {error.message}", hint=RESTART) from error
        return True
    if line.get("event") != "kernel":
        return False
    whole_number(fields, "pid")
    if fields.get("state") not in ("running", "exited"):
        raise ProtocolError(f"The guest said that a kernel is {fields.get('state')!r}", hint=RESTART)
    if fields["state"] == "exited":
        whole_number(fields, "exit_code")
    return True


def gone() -> TransportError:
    """For a guest that does not answer, or no longer."""
    return TransportError("The sandbox does not answer", hint="It has ended or is ending; start it again.")
