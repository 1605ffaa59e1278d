"""The IPython kernel application as it runs in a sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NoReturn

from .. import magics
from ..magics.api import Api
from . import children, displays, forking, graphics, leaving, newborn, offline, sockets, stack
from .report import Report

CONTROL_END_S = 2.0
CHANNELS = ("shell", "iopub", "stdin", "control", "hb")
"""In the order of the numbers that their Unix sockets have."""


def prepare() -> None:
    """What a kernel's application does alike in every process: its class's set-up and its logger."""
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance()
    app.log.debug("prepared")
    app.init_pdb()  # type: ignore[no-untyped-call]


def run(file: str, report: Report) -> None:
    """Serve a kernel on that connection file until it is told to shut down; `report` is told when it is up."""
    with newborn.reporting(report):
        app = initialized(file)
    serve(app, report)


def serve(app: Any, report: Report) -> NoReturn:
    """Say that the sockets are bound, and serve until it is told to shut down."""
    report.ready(os.path.basename(app.ip))
    app.start()
    _let_control_finish(app)
    leaving.leave(app.shell)


def connection(prefix: str) -> dict[str, Any]:
    """The content of a connection file for Unix sockets at `prefix`, without a key."""
    ports = {f"{name}_port": number for number, name in enumerate(CHANNELS, 1)}
    return {"transport": "ipc", "ip": prefix, "key": "", "signature_scheme": "hmac-sha256", **ports}


def check(file: str) -> dict[str, Any]:
    """The content of a connection file. A kernel would make itself one where there is none, and bind elsewhere.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no connection file.
    """
    with open(file, encoding="utf-8") as opened:
        try:
            content = json.load(opened)
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
    for name, value in connection("").items():
        if name != "signature_scheme" and (not isinstance(content, dict) or type(content.get(name)) is not type(value)):
            raise ValueError(f"{file} is no connection file: its {name!r} is no {type(value).__name__}")
    return dict(content)


def _settled(file: str) -> dict[str, Any]:
    """The content of a connection file, which says where the sockets will be."""
    content = check(file)
    if content["transport"] == "ipc" and (prefix := sockets.at(content["ip"])) != content["ip"]:
        content["ip"] = prefix
        with open(f"{file}.new", "w", encoding="utf-8") as opened:
            json.dump(content, opened)
        os.rename(f"{file}.new", file)
    return content


def _let_control_finish(app: Any) -> None:
    """Let the control thread answer the request to shut down before its output thread is taken away.

    The application closes that first, and a control thread in the middle of a flush then waits for ten seconds.
    """
    thread = getattr(app, "control_thread", None)
    if thread is not None and thread.is_alive():
        thread.stop()
        thread.join(CONTROL_END_S)


def initialized(connection_file: str) -> Any:
    """The application with its sockets bound and its shell made."""
    from ipykernel import ipkernel
    from ipykernel.kernelapp import IPKernelApp
    from IPython.core import shellapp

    content = _settled(connection_file)
    os.environ.pop("JPY_PARENT_PID", None)
    launcher = os.path.dirname(sys.modules["ipykernel"].__path__[0]) + "/ipykernel_launcher.py"
    sys.argv = [launcher, "-f", connection_file]
    app: Any = IPKernelApp.instance()
    app.parse_command_line = lambda argv=None: _configure(app, connection_file)
    from tornado.ioloop import IOLoop

    from . import contexts, iopub, module, saving, travelling

    iopub.install(content["ip"])
    app.log.disabled = True  # It goes to /dev/null, and there are many lines of it.
    if not stack.names:
        app.initialize(sys.argv[1:])
    else:
        with _no_modules_in(ipkernel, shellapp):
            app.initialize(sys.argv[1:])
        app.kernel._kernel_modules = stack.files
        if getattr(app.kernel, "debugger", None) is not None:
            app.kernel.debugger.kernel_modules = stack.files
        app.shell._sys_modules_keys = stack.names
    app.log.disabled = False
    app.kernel._execute_sleep = 0.0  # Half a millisecond for output to get through, whose flush is waited for.
    del app.parse_command_line
    api = os.path.join(os.path.dirname(connection_file), "api.sock")
    magics.register(app.shell, lambda: Api(api))
    magics.register_snapshots(app.shell, lambda: Api(api))
    magics.stay(app.shell)
    travelling.install(app.kernel)
    offline.install()
    graphics.install()
    displays.install(app.shell)
    IOLoop.current()  # The kernel's own; made here so that its poll is known.
    children.let_go_at_fork(content["ip"])
    saving.Saving(app, contexts.installed(app)).install()
    forking.settle(os.path.dirname(connection_file))
    module.offer()
    return app


def _configure(app: Any, connection_file: str) -> None:
    """What parsing the command line comes to, without a parser for some 60 options."""
    from traitlets.config import Config

    app.argv = sys.argv[1:]
    app.cli_config = Config(
        {
            "IPKernelApp": {"connection_file": connection_file},
            # Snapshots and forks of a kernel must not share an open database.
            "HistoryManager": {"enabled": False},
        }
    )
    app.update_config(app.cli_config)
    app.extra_args = []


class _View(ModuleType):
    """The module `sys`, but for what is set on the view itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(sys, name, value)


@contextlib.contextmanager
def _no_modules_in(*modules: ModuleType) -> Iterator[None]:
    """Within this, `modules` find `sys.modules` empty.

    The application notes the name and file of every loaded module, as those that are its own. After a fork that is
    wrong for what the template has imported, and alone it would copy megabytes: a page for each module.
    """
    view = _View("sys")
    view.__dict__["modules"] = {}
    for module in modules:
        vars(module)["sys"] = view
    try:
        yield
    finally:
        for module in modules:
            vars(module)["sys"] = sys
