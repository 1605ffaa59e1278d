"""A kernel that nobody in its sandbox looks after yet is followed by its number on the host."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from warmcell.sandbox.following import follow
from warmcell.sandbox.guest.supervisor.adopted import UNKNOWN
from warmcell.sandbox.kernel import KernelProcess


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    """One that ends with the code that it is told."""
    program = "import os, sys; os._exit(int(sys.stdin.readline()))"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", program], stdin=subprocess.PIPE) as made:
        yield made
        made.kill()


def kernel(pid: int) -> KernelProcess:
    return KernelProcess(pid=pid, generation=1, socket_prefix=Path("/nowhere"), started_from="snapshot")


async def test_its_end_is_told_with_its_code(process: "subprocess.Popen[bytes]") -> None:
    """Whether it leaves by itself or is killed."""
    followed = kernel(process.pid)
    work = asyncio.create_task(follow(followed, process.pid, until=asyncio.Event()))
    await asyncio.sleep(0)
    assert followed.alive
    assert process.stdin is not None
    process.stdin.write(b"3\n")
    process.stdin.flush()
    async with asyncio.timeout(30):
        await followed.exited.wait()
        await work
    assert followed.exit_code == 3


async def test_it_is_followed_until_somebody_else_does(process: "subprocess.Popen[bytes]") -> None:
    """Who knows better may say how it ended."""
    followed, until = kernel(process.pid), asyncio.Event()
    work = asyncio.create_task(follow(followed, process.pid, until=until))
    await asyncio.sleep(0)
    until.set()
    async with asyncio.timeout(30):
        await work
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert followed.alive


async def test_another_with_its_number_is_not_taken_for_it(process: "subprocess.Popen[bytes]") -> None:
    """It has ended, and nobody knows how."""
    followed = kernel(process.pid + 1)  # As the guest numbers it; the host's number is another process's by now.
    async with asyncio.timeout(30):
        await follow(followed, process.pid, until=asyncio.Event())
    assert (followed.alive, followed.exit_code) == (False, UNKNOWN)
    await follow(kernel(1), 2**22 - 1, until=asyncio.Event())
