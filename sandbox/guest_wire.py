"""The bytes between host and guest: how the host finds the guest's socket, and how it reads what comes.

The guest can write the run directory, so nothing in it is trusted: the socket is opened without
following links and what comes from it is checked before it is used.
"""

import asyncio
import contextlib
import json
import math
import os
import re
import reprlib
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import InvalidRequestError, ProtocolError, TransportError, WarmcellError, from_json
from warmcell.sandbox.models import TemplateStatus

RESTART = "Restart the sandbox."
SOCKET_NAME = re.compile(r"[.]?[a-z0-9]+")
SOCKET_NAME_MAX = 32
WORDS_MAX = 1000
"""Characters of a guest's sentence that are shown."""


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
        value = json.loads(line, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("The guest answered something that is not JSON", hint=RESTART) from error
    if not isinstance(value, dict):
        raise ProtocolError("The guest answered something that is no object", hint=RESTART)
    return value


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _no_number(text: str) -> float:
    """What would make an answer of ours one that is not JSON."""
    raise ValueError(f"{text} is no number")


def refusal(answer: Mapping[str, Any]) -> WarmcellError:
    """The error that a guest's answer stands for, with words and a cure whatever it has said."""
    message, hint = (str(answer.get(name) or "")[:WORDS_MAX] for name in ("message", "hint"))
    return from_json({"code": answer.get("code"), "message": message or "The guest refused", "hint": hint or RESTART})


def whole_number(answer: Mapping[str, Any], name: str) -> int:
    """The whole number of that name in what a guest said.

    Raises:
        ProtocolError: There is none.
    """
    value = answer.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ProtocolError(f"The guest said {name} {shown(value)}", hint=RESTART)
    return value


def shown(value: object) -> str:
    """What a guest has said, for an error; as much of it as anybody reads."""
    return reprlib.repr(value)


def socket_name(answer: Mapping[str, Any]) -> str:
    """How the names of a kernel's sockets begin, according to a guest: no path, so that nothing else is meant.

    Raises:
        ProtocolError: It is nothing of the kind.
    """
    name = answer.get("sockets")
    if not isinstance(name, str) or len(name) > SOCKET_NAME_MAX or not SOCKET_NAME.fullmatch(name):
        raise ProtocolError(f"The guest said sockets {shown(name)}", hint=RESTART)
    return name


def is_event(line: Mapping[str, Any]) -> bool:
    """Whether it is an event of a kind that this version knows, and then a sound one."""
    fields = {key: value for key, value in line.items() if key != "event"}
    if line.get("event") == "template":
        try:
            TemplateStatus.from_json(fields)
        except InvalidRequestError as error:
            message = f"The guest told a template that is none: {error.message[:WORDS_MAX]}"
            raise ProtocolError(message, hint=RESTART) from error
        return True
    if line.get("event") != "kernel":
        return False
    whole_number(fields, "pid")
    if fields.get("state") not in ("running", "exited"):
        raise ProtocolError(f"The guest said that a kernel is {shown(fields.get('state'))}", hint=RESTART)
    if fields["state"] == "exited":
        whole_number(fields, "exit_code")
    return True


def gone() -> TransportError:
    """For a guest that does not answer, or no longer."""
    return TransportError("The sandbox does not answer", hint="It has ended or is ending; start it again.")
