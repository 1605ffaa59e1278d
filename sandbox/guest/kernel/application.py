"""The IPython kernel application as it runs in a sandbox."""

from __future__ import annotations

import os
import sys

from .report import Report


def run(connection_file: str, report: Report) -> None:
    """Serve a kernel until it is told to shut down, saying on `report` when its sockets are bound."""
    os.environ.pop("JPY_PARENT_PID", None)
    try:
        from ipykernel.kernelapp import IPKernelApp

        sys.argv = [sys.modules["ipykernel"].__path__[0] + "_launcher.py", "-f", connection_file]
        app = IPKernelApp.instance()
        app.initialize([*sys.argv[1:], "--HistoryManager.enabled=False"])  # type: ignore[no-untyped-call]
    except BaseException as error:
        report.failed(error)
        raise
    report.ready()
    app.start()  # type: ignore[no-untyped-call]
