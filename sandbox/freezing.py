"""Stopping all processes of a sandbox where they are, and having them go on; for machines that cannot save memory."""

import contextlib
import os
import signal
from collections.abc import Callable, Sequence

from warmcell.sandbox.errors import UnsupportedOperationError

ROUNDS_MAX = 100
"""A process may start another one before it is stopped itself; one that does it faster than this is not stopped."""


def freeze(processes: Callable[[], Sequence[int]]) -> None:
    """Stop them all, also those that appear meanwhile. Blocks for some milliseconds.

    Args:
        processes: Lists them as they are now.

    Raises:
        UnsupportedOperationError: One is not ours to stop, or there are ever more; all go on.
    """
    stopped: set[int] = set()
    for _ in range(ROUNDS_MAX):
        running = [pid for pid in processes() if pid not in stopped]
        if not running:
            return
        for pid in running:
            try:
                os.kill(pid, signal.SIGSTOP)
            except ProcessLookupError:
                pass
            except PermissionError as error:
                thaw(processes)
                raise UnsupportedOperationError(
                    "The sandbox's processes belong to its engine and cannot be stopped from here",
                    hint="Have it end when its time is over: on_timeout='kill'.",
                ) from error
            stopped.add(pid)
    thaw(processes)
    raise UnsupportedOperationError(
        "The sandbox starts processes faster than they can be stopped", hint="Kill it, or limit its processes."
    )


def thaw(processes: Callable[[], Sequence[int]]) -> None:
    """Have them go on, the first process last: who waits for others then finds them as they were. Idempotent."""
    for pid in reversed(processes()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGCONT)
