"""Kernels in a sandbox are such that they can be saved: nothing of them leads outside, nothing kills them later."""

import contextlib
import os
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import folder, subject_of
from tests.integration.bubblewrap.test_guest_offline import kernel_in
from tests.leaks import Places
from warmcell.sandbox.testing.contract import Box

pytestmark = pytest.mark.bubblewrap

DESCRIPTORS = """
import os, socket
def _look(fd):
    to = os.readlink(f"/proc/self/fd/{fd}")
    if not to.startswith("socket:"):
        return to
    with socket.socket(fileno=os.dup(fd)) as one:
        listening = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        try:
            return [one.family.name, bool(listening), one.getsockname(), one.getpeername()]
        except OSError:
            return [one.family.name, bool(listening), one.getsockname(), None]
_all = {}
for fd in os.listdir("/proc/self/fd"):
    try:
        _all[fd] = _look(int(fd))
    except FileNotFoundError:
        pass
"""
DEATH = """
import ctypes
_signal = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(_signal))
"""


async def prepared(box: Box) -> None:
    await box.channel.prepare(["json"], name="test")
    async for event in box.channel.events():
        if event["event"] == "template" and event["state"] == "ready":
            return


def descriptors(pid: int) -> set[str]:
    """What the open descriptors of a process lead to; some may close meanwhile."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


@pytest.mark.parametrize("engine", ["cold", "template"])
async def test_nothing_of_a_kernel_leads_outside(places: Places, engine: str) -> None:
    """Its descriptors are /dev/null, its own pipes, events and polls, and Unix sockets between itself and clients."""
    workspace = folder(places, "w")
    async with subject_of(places).box(workspace=workspace, network="none") as box:
        await prepared(box)
        kernel = await kernel_in(box, str(workspace), engine)
        await kernel.run(DESCRIPTORS + DEATH)
        assert await kernel.value("_signal.value") == 0
        found = await kernel.value("_all")
        prefix = f"{box.instance.guest_run_directory}/{kernel.started.sockets}-"
        for to in found.values():
            if isinstance(to, str):
                assert to == "/dev/null" or to.startswith(("pipe:", "anon_inode:[event")), to
                continue
            family, listening, name, peer = to
            assert family == "AF_UNIX", to
            if listening:
                assert str(name).startswith(prefix)
            else:
                assert str(name or peer).startswith(prefix) or (name, peer) == ("", ""), to
        pid = next(
            pid
            for pid in box.instance.processes()
            if Path(f"/proc/{pid}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1] == str(kernel.pid)
        )
        ends = {to for other in (*box.instance.processes(), os.getpid()) if other != pid for to in descriptors(other)}
        assert not [to for to in found.values() if isinstance(to, str) and to.startswith("pipe:") and to in ends]
        kernel.client.stop_channels()
