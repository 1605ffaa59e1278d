"""Two sandboxes of one keeper: what they share is a workspace, if that was asked for, and nothing else."""

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.security.conftest import BACKENDS, OF_THE_HOSTS_KERNEL, writable_folder
from warmcell.sandbox.testing.contract import Box, Subject

Pair = tuple[Box, Box]

SERVE = """
import mmap, os, socket, sys, time
tcp = socket.create_server(("127.0.0.1", 45454))
abstract = socket.socket(socket.AF_UNIX); abstract.bind("\\0warmcell-neighbour"); abstract.listen()
path = socket.socket(socket.AF_UNIX); path.bind("/tmp/neighbour.sock"); path.listen()
open("/dev/shm/neighbour", "w").write("secret"); open("/tmp/neighbour", "w").write("secret")
open(os.path.expanduser("~/neighbour"), "w").write("secret")
print("up", flush=True); sys.stdin.read()
"""
REACH = """
import ctypes, errno, os, socket, sys
def tried(call):
    try: call()
    except OSError as error: return errno.errorcode.get(error.errno, "?")
    return "reached"
def unix(name):
    client = socket.socket(socket.AF_UNIX); client.connect(name)
print(tried(lambda: socket.create_connection(("127.0.0.1", 45454), timeout=3)))
for name in ("\\0warmcell-neighbour", "/tmp/neighbour.sock"):
    print(tried(lambda: unix(name)))
for path in ("/dev/shm/neighbour", "/tmp/neighbour", os.path.expanduser("~/neighbour")):
    print(tried(lambda: open(path)))
"""


@pytest.fixture
async def pair(subject: Subject) -> AsyncIterator[Pair]:
    """Two sandboxes with the same workspace."""
    shared = writable_folder(subject, "shared")
    async with subject.box(workspace=shared) as one, subject.box(workspace=shared) as other:
        yield one, other


async def test_sockets_and_memory_of_the_other_are_not_reached(pair: Pair, subject: Subject) -> None:
    """TCP, abstract and named sockets, shared memory, temporary files, home."""
    one, other = pair
    async with one.channel.exec_stream([subject.python, "-c", SERVE]) as serving:
        assert await anext(serving.output()) == ("stdout", b"up\n")
        own = await one.run(subject.python, "-c", REACH)
        assert own.stdout.split() == ["reached"] * 6, own.stderr
        foreign = await other.run(subject.python, "-c", REACH)
        assert "reached" not in foreign.stdout
        assert len(foreign.stdout.split()) == 6, foreign.stderr


async def test_processes_of_the_other_are_not_seen_and_not_signalled(pair: Pair) -> None:
    """Not even by the pid that the host has for them."""
    one, other = pair
    async with one.channel.exec_stream(["sleep", "4242.4242"]):
        seen = await other.says("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        assert "4242" not in seen
        for pid in one.instance.processes():
            assert (await other.shell(f"kill -0 {pid}")).exit_code != 0 or await other.says(f"cat /proc/{pid}/comm")
            assert "sleep" not in (await other.shell(f"cat /proc/{pid}/comm")).stdout


async def test_the_workspace_is_what_they_share(pair: Pair, subject: Subject) -> None:
    """What one writes there the other reads."""
    one, other = pair
    await one.says(f"echo hello > {subject.folder('shared')}/note.txt")
    assert await other.says(f"cat {subject.folder('shared')}/note.txt") == "hello"


async def test_the_run_directory_of_the_other_is_nowhere(pair: Pair) -> None:
    """Its init would run any command."""
    one, other = pair
    await one.says("touch /run/warmcell/mine")
    seen = (await other.says("ls -A /run/warmcell")).split()
    assert "init.sock" in seen
    assert "mine" not in seen
    assert (await other.shell(f"ls {one.directory}")).exit_code != 0
    assert (await other.shell(f"ls {one.directory.parent}")).exit_code != 0


@pytest.mark.parametrize("subject", OF_THE_HOSTS_KERNEL, indirect=True)
async def test_system_v_memory_and_message_queues_are_separate(pair: Pair) -> None:
    """Their namespaces of inter-process communication differ."""
    one, other = pair
    made = await one.says("ipcmk -M 4096 | grep -o '[0-9]*$'")
    assert made
    assert await one.says("ipcs -m | grep -c 4096") == "1"
    assert (await other.shell("ipcs -m | grep 4096")).exit_code != 0
    assert os.readlink("/proc/self/ns/ipc") != await one.says("readlink /proc/self/ns/ipc")


@pytest.mark.parametrize("subject", [BACKENDS["bubblewrap"]], indirect=True)
async def test_a_package_installed_in_one_is_not_in_the_other(pair: Pair) -> None:
    """Each has its own layer over the same environment."""
    one, other = pair
    site = Path(sys.prefix, "lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
    planted = await one.shell(f"echo 'answer = 42' > {site}/neighbour.py")
    if planted.exit_code:
        pytest.skip(f"this environment is read-only: {planted.stderr}")
    assert (await other.run(sys.executable, "-c", "import neighbour")).exit_code != 0
    assert not (site / "neighbour.py").exists()
