"""A kernel that is up before anybody asks for it: forked as soon as none lives, finished in the moment of the request.

All that a kernel does on its way up is done in advance, its sockets bound under a name of their own. What is left is
its environment, its directory, and its connection file. It is made only where nothing of the user's would run too
early, and handed out only where the request changes nothing that was decided.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import sys
from array import array
from collections.abc import Mapping
from typing import Any

from . import application, displays, newborn, preload, sockets
from .decided import DECIDED
from .report import Report

REQUEST_MAX_BYTES = 2**20


class Spare:
    """What the fork server knows of one: its process and the socket on which it waits."""

    def __init__(self, pid: int, waiting: socket.socket) -> None:
        self.pid = pid
        self._waiting = waiting

    def give(self, request: Mapping[str, Any], pipe: int) -> bool:
        """Let it be the kernel of that request; whether it has taken it."""
        data = json.dumps(request).encode()
        try:
            self._waiting.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [pipe]))])
        except OSError:
            return False
        finally:
            self._waiting.close()
        return True

    def forget(self) -> None:
        """It is not needed; it ends by itself."""
        self._waiting.close()


def nothing_of_the_user_runs() -> bool:
    """Whether IPython comes up without configuration and startup files."""
    from IPython.core.application import ENV_CONFIG_DIRS, SYSTEM_CONFIG_DIRS
    from IPython.paths import get_ipython_dir

    if os.environ.get("PYTHONSTARTUP"):
        return False
    profile = os.path.join(get_ipython_dir(), "profile_default")
    for directory in (profile, *ENV_CONFIG_DIRS, *SYSTEM_CONFIG_DIRS):
        for name in ("ipython_config", "ipython_kernel_config"):
            if any(os.path.exists(os.path.join(directory, name + ending)) for ending in (".py", ".json")):
                return False
        with contextlib.suppress(OSError):
            if any(name.endswith((".py", ".ipy")) for name in os.listdir(os.path.join(directory, "startup"))):
                return False
    return True


def suits(request: Mapping[str, Any]) -> bool:
    """Whether that kernel can come of one that was made in this process's environment."""
    given = request["env"]
    differing = {name for name in given.keys() | os.environ.keys() if given.get(name) != os.environ.get(name)}
    if any(name.startswith(DECIDED) for name in differing) or not nothing_of_the_user_runs():
        return False
    try:
        with open(request["connection"], encoding="utf-8") as file:
            content = json.load(file)
        return bool(content["transport"] == "ipc" and content["key"] == "" and "curve_publickey" not in content)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # Another way up says what is wrong with it.


def prefix_of(pid: int, run: str) -> str:
    """How the names of its sockets begin."""
    return sockets.at(os.path.join(run, f".e{pid}"))


def live(waiting: socket.socket, run: str) -> None:
    """Come up, wait for the request, and be the kernel that it asks for."""
    before = dict(os.environ)
    prefix = prefix_of(os.getpid(), run)
    file = f"{run}/.e{os.getpid()}.json"
    try:
        with open(file, "w", encoding="utf-8") as opened:
            json.dump(application.connection(prefix), opened)
        app = application.initialized(file)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file)
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    asked = _wait(waiting)
    if asked is None:
        remove(prefix)
        os._exit(0)
    request, report = asked
    with newborn.reporting(report):
        newborn.move(env={**preload.environment(request["env"]), **changed}, cwd=request["cwd"])
        _name(app, prefix, request["connection"])
        _resettle(app.shell)
    application.serve(app, report)


def live_late(waiting: socket.socket) -> None:
    """Wait for the request, come up, and be the kernel that it asks for."""
    asked = _wait(waiting)
    if asked is None:
        os._exit(0)
    request, report = asked
    with newborn.reporting(report):
        newborn.move(env=preload.environment(request["env"]), cwd=request["cwd"])
    application.run(request["connection"], report)


def _wait(waiting: socket.socket) -> tuple[dict[str, Any], Report] | None:
    """The request; None where there will be none. A packet is one request, however long."""
    data, ancillary, _, _ = waiting.recvmsg(REQUEST_MAX_BYTES, socket.CMSG_SPACE(array("i").itemsize))
    waiting.close()
    return (json.loads(data), Report(array("i", ancillary[0][2])[0])) if data else None


def _name(app: Any, prefix: str, file: str) -> None:
    """Let the connection file say where the sockets are, and all that knows its name know the new one.

    The sockets keep their names: one that was renamed cannot be saved with the kernel.
    """
    application.check(file)
    written = f"{file}.new"
    with open(written, "w", encoding="utf-8") as opened:
        json.dump(application.connection(prefix), opened)
    os.rename(written, file)
    sys.argv[2] = file
    app.argv = sys.argv[1:]
    app.connection_file = file
    for holder in (app, app.kernel, app.shell):
        holder.config.IPKernelApp.connection_file = file
    app.cli_config.IPKernelApp.connection_file = file


def _resettle(shell: Any) -> None:
    """What IPython has worked out from directory and environment."""
    shell.starting_dir = os.getcwd()
    shell.history_manager.dir_hist[:] = [pathlib.Path.cwd()]
    name = os.environ.get("JPY_SESSION_NAME")
    if name:
        shell.user_ns["__session__"] = shell.user_ns_hidden["__session__"] = name
    displays.install(shell)


def remove(prefix: str) -> None:
    """Remove the sockets of one that is not needed."""
    for number in range(1, len(application.CHANNELS) + 2):  # The last is that of the kernel's children.
        with contextlib.suppress(OSError):
            os.unlink(f"{prefix}-{number}")
