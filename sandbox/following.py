"""The end of a kernel that nobody in its sandbox looks after yet, as the host sees it."""

import asyncio
import contextlib
import os

from warmcell.sandbox.guest.supervisor.adopted import UNKNOWN, exit_code_of
from warmcell.sandbox.kernel import KernelProcess


async def follow(kernel: KernelProcess, host_pid: int, *, until: asyncio.Event) -> None:
    """Wait until it has ended, and say so, unless somebody else does from an earlier moment on.

    Args:
        kernel: Which.
        host_pid: Its number on the host, where it may have ended already.
        until: Set once somebody else follows it.
    """
    ending = _opened(kernel.pid, host_pid)
    if ending < 0:
        _ended(kernel, UNKNOWN)
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(ending, gone.set)
    waits = [asyncio.create_task(gone.wait()), asyncio.create_task(until.wait())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if gone.is_set():
            _ended(kernel, exit_code_of(ending, host_pid))
    finally:
        loop.remove_reader(ending)
        os.close(ending)
        for one in waits:
            one.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


def _opened(pid: int, host_pid: int) -> int:
    """A descriptor of the process, -1 if it has ended: its number on the host may be another one's by now."""
    with contextlib.ExitStack() as undo:
        try:
            opened = os.pidfd_open(host_pid)
            undo.callback(os.close, opened)
            with open(f"/proc/{host_pid}/status") as file:
                numbers = next(line.split() for line in file if line.startswith("NSpid:"))
        except (OSError, StopIteration):
            return -1
        if numbers[-1] != str(pid):
            return -1
        undo.pop_all()
        return opened


def _ended(kernel: KernelProcess, code: int) -> None:
    if kernel.alive:
        kernel.exit_code = code
        kernel.exited.set()
