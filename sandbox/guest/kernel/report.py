"""How a starting kernel tells init that it can be talked to, or why it never will."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping


class Report:
    """The writing end of the pipe on which init waits."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._fd = fd

    @staticmethod
    def silence() -> None:
        """Put the standard streams on /dev/null; what a kernel prints goes through its sockets."""
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(nothing, fd)
        if nothing > 2:
            os.close(nothing)

    def ready(self, sockets: str) -> None:
        """The sockets are bound, in the run directory and with names that begin so."""
        self._tell({"ready": os.getpid(), "sockets": sockets})

    def failed(self, error: BaseException) -> None:
        """It cannot come up, because of `error`, whose last place is told too."""
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
        told = {"failed": f"{type(error).__name__}: {error}{where}"}
        if isinstance(error, ModuleNotFoundError):
            told["hint"] = f"In this notebook's environment, run: {sys.executable} -m pip install ipykernel"
        self._tell(told)

    def _tell(self, message: Mapping[str, object]) -> None:
        try:
            os.write(self._fd, b"\n" + json.dumps(message).encode() + b"\n")
            os.close(self._fd)
        except OSError:
            return  # Nobody waits for it any more.
