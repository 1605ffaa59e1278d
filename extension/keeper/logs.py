"""The keeper's log: `keeper.log` in the state directory, and the one before it."""

import logging
import logging.handlers
import os
import sys
from pathlib import Path

MAX_BYTES = 4 * 2**20
"""Of one file; there are two at most."""

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class KeeperLog(logging.handlers.RotatingFileHandler):
    """A file that does not grow without bound, and that also gets what is written to stdout and stderr."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=1, encoding="utf-8", errors="backslashreplace")
        self._redirect()

    def doRollover(self) -> None:
        """Begin a new file (logging's hook)."""
        super().doRollover()
        self._redirect()

    def _redirect(self) -> None:
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None:
                stream.flush()
        assert self.stream is not None
        for fd in (1, 2):
            os.dup2(self.stream.fileno(), fd)


def begin(path: Path | None) -> None:
    """Log to this file; None: to stderr, for a keeper in the foreground."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if path is None else KeeperLog(path)
    logging.basicConfig(handlers=[handler], level=logging.INFO, format=FORMAT, force=True)
