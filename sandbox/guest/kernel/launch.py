"""A kernel in a fresh interpreter: `enter.py kernel.launch CONNECTION_FILE`."""

from __future__ import annotations

import os
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Become a kernel on the given connection file."""
    from .report import Report

    report = Report(os.dup(2))
    report.silence()
    from . import application

    application.run(arguments[0], report)
