"""A bubblewrap that comes no further than to where its inner process waits for the outer one."""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lanes import bwrap
from warmcell.sandbox.backends.processes import children_of, descendants

HALTED_S = 60.0
SCRIPT = """#!/bin/sh
exec {bwrap} --info-fd 9 "$@" 9>{full}
"""
"""What the outer one is to say of the inner one before it lets that begin does not go into a full pipe."""


@contextlib.contextmanager
def halting(folder: Path) -> Iterator[Path]:
    """Such a program, made in that folder."""
    full, program = folder / "full", folder / "bwrap"
    os.mkfifo(full)
    full.chmod(0o666)
    program.write_text(SCRIPT.format(bwrap=bwrap(), full=full))
    program.chmod(0o755)
    held = os.open(full, os.O_RDWR | os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(held, bytes(4096))
        yield program
    finally:
        os.close(held)


async def halted(above: int) -> list[int]:
    """The host pids of its outer and its inner process, once both are there, below that process."""
    deadline = time.monotonic() + HALTED_S
    while time.monotonic() < deadline:
        for pid in descendants(above):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(os.fsencode(f"{bwrap()}\0--info-fd")) and (
                    inner := children_of(pid)
                ):
                    return [pid, *inner]
        await asyncio.sleep(0.01)
    raise AssertionError("bubblewrap does not start")
