"""What a gVisor sandbox is after it was saved and restored."""

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.gvisor.boxes import Boxes, boxes_of
from tests.leaks import Places
from warmcell.sandbox.backends.gvisor import find
from warmcell.sandbox.errors import (
    SnapshotCorruptError,
    SnapshotError,
    SnapshotIncompatibleError,
    SnapshotNotFoundError,
    UnsupportedOperationError,
)
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.testing.contract.subject import ContractError

pytestmark = pytest.mark.gvisor

BUSY = """
import threading, time
count = 0
def counting():
    global count
    while True:
        count += 1
        time.sleep(0.001)
threading.Thread(target=counting, daemon=True).start()
text = open("/tmp/text", "w+")
text.write("0123456789")
text.seek(4)
with open("/dev/shm/shared", "w") as file:
    file.write("shared")
import socket
here, there = socket.socketpair()
here.sendall(b"on its way")
"""
CLONES = 3
PATIENCE_S = 60


async def _until_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()
    await writer.wait_closed()


@pytest.fixture
async def boxes(places: Places) -> AsyncIterator[Boxes]:
    async with boxes_of(places) as made:
        yield made


async def test_it_goes_on_after_a_snapshot_and_so_do_clones(boxes: Boxes) -> None:
    """Threads, variables, open files and their offsets, what is in a socket: as in the moment of the snapshot."""
    box = await boxes.make()
    kernel = await box.start_kernel()
    assert (await kernel.run(BUSY)).status == "ok"
    before = await kernel.value("count")
    image = await boxes.save(box, kernel)
    source = await box.kernel_again(kernel)
    clones = await asyncio.gather(*(boxes.make(image=image) for _ in range(CLONES)))
    kernels = [source, *(await asyncio.gather(*(clone.kernel_again(kernel) for clone in clones)))]
    for each in kernels:
        async with asyncio.timeout(PATIENCE_S):
            while await each.value("count") <= before:  # Its thread has its turn when the machine has time for it.
                pass
        assert await each.value("text.read()") == "456789"
        assert await each.value('open("/dev/shm/shared").read()') == "shared"
        assert await each.value("there.recv(100).decode()") == "on its way"
        await each.run("text.seek(0); text.write('x')")
    for each in kernels:
        each.client.stop_channels()


async def test_clones_are_apart_and_have_randomness_of_their_own(boxes: Boxes) -> None:
    """What one changes no other sees, and no two draw the same from the system."""
    box = await boxes.make()
    kernel = await box.start_kernel()
    await kernel.run("import os; mine = 0; open('/tmp/mine', 'w').write('0')")
    image = await boxes.save(box, kernel, then="stop")
    await box.instance.stop()
    clones = await asyncio.gather(*(boxes.make(image=image) for _ in range(CLONES)))
    kernels = await asyncio.gather(*(clone.kernel_again(kernel) for clone in clones))
    for number, each in enumerate(kernels):
        await each.run(f"mine = {number}; open('/tmp/mine', 'w').write('{number}')")
    drawn = set()
    for number, each in enumerate(kernels):
        assert await each.value("[mine, open('/tmp/mine').read()]") == [number, str(number)]
        drawn.add(await each.value("os.urandom(16).hex()"))
        each.client.stop_channels()
    assert len(drawn) == CLONES


async def test_suspended_and_resumed_again_and_again(boxes: Boxes) -> None:
    """A sandbox that was restored can be saved like any other."""
    box = await boxes.make()
    kernel = await box.start_kernel()
    await kernel.run("turns = 0; child = __import__('subprocess').Popen(['sleep', '1000'])")
    for turn in range(1, 4):
        await kernel.run("turns += 1")
        image = await boxes.save(box, kernel, then="stop")
        await box.instance.stop()
        box = await boxes.make(image=image)
        kernel = await box.kernel_again(kernel)
        assert await kernel.value("[turns, child.poll()]") == [turn, None]
        assert (await boxes.engine.restore(box.instance, image=image)).pid == kernel.pid
        await boxes.engine.drop(image)
    assert await boxes.engine.images() == []
    kernel.client.stop_channels()


async def test_its_packages_are_in_the_image(boxes: Boxes) -> None:
    """What was installed into the environment is there in a clone, and never on the host."""
    box = await boxes.make()
    kernel = await box.start_kernel()
    site = await kernel.value("__import__('site').getsitepackages()[0]")
    name = f"planted{secrets.token_hex(4)}"
    assert (await kernel.run(f"open('{site}/{name}.py', 'w').write('answer = 42')")).status == "ok"
    image = await boxes.save(box, kernel, then="stop")
    await box.instance.stop()
    clone = await boxes.make(image=image)
    again = await clone.kernel_again(kernel)
    assert await again.value(f"__import__('{name}').answer") == 42
    assert not os.path.exists(f"{site}/{name}.py")
    again.client.stop_channels()


async def test_the_workspace_of_a_clone_is_the_hosts_folder(boxes: Boxes, places: Places) -> None:
    """It is no part of an image."""
    folder = places.root / "work"
    folder.mkdir()
    spec = boxes.spec(workspace=folder)
    box = await boxes.make(spec)
    kernel = await box.start_kernel()
    await kernel.run(f"open('{folder}/made', 'w').write('before')")
    image = await boxes.save(box, kernel, then="stop")
    await box.instance.stop()
    (folder / "made").write_text("after")
    clone = await boxes.make(spec, image=image)
    again = await clone.kernel_again(kernel)
    assert await again.value(f"open('{folder}/made').read()") == "after"
    again.client.stop_channels()


async def test_another_runsc_is_refused_by_name(boxes: Boxes, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made, with what was expected and what was found; the right one serves afterwards."""
    image = await boxes.image()
    runsc = find()
    other = places.root / "runsc"
    other.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec echo runsc version 0.0~20990101.0\nexec {runsc.path} "$@"\n'
    )
    other.chmod(0o755)
    monkeypatch.setenv("WARMCELL_RUNSC", str(other))
    with pytest.raises(SnapshotIncompatibleError) as refused:
        await boxes.make(image=image)
    assert refused.value.details == {"expected": {"runsc": runsc.version}, "found": {"runsc": "0.0~20990101.0"}}
    monkeypatch.delenv("WARMCELL_RUNSC")
    again = await boxes.make(image=image)
    assert (await again.channel.exec(["echo", "back"])).stdout == "back\n"


async def test_an_image_of_another_kind_of_sandbox_is_refused(boxes: Boxes, places: Places) -> None:
    """A folder that the saved one did not have, say."""
    image = await boxes.image()
    folder = places.root / "work"
    folder.mkdir()
    with pytest.raises(SnapshotIncompatibleError):
        await boxes.make(boxes.spec(workspace=folder), image=image)


async def test_an_image_that_is_gone_or_not_whole_is_refused(boxes: Boxes) -> None:
    """By a name for each."""
    image = await boxes.image()
    path = boxes.engine.kept.path(image)
    with (path / "pages.img").open("r+b") as pages:
        pages.truncate(4096)
    with pytest.raises(SnapshotCorruptError):
        await boxes.make(image=image)
    shutil.rmtree(path)
    with pytest.raises(SnapshotNotFoundError):
        await boxes.make(image=image)


async def test_what_fails_while_it_stands_still_leaves_it_as_it_was(boxes: Boxes) -> None:
    """It goes on, and there is no image."""
    box = await boxes.make()
    kernel = await box.start_kernel()
    await kernel.run("kept = 'kept'")
    kernel.client.stop_channels()

    async def failing() -> None:
        raise ContractError("no room")

    with pytest.raises(ContractError):
        await boxes.engine.dump(
            box.instance, pid=kernel.pid, image=SnapshotId("a" * 12), then="stop", while_frozen=failing
        )
    again = await box.kernel_again(kernel)
    assert await again.value("kept") == "kept"
    assert await boxes.engine.images() == []
    assert [path.name for path in boxes.engine.kept.path(SnapshotId("x")).parent.iterdir()] == []
    again.client.stop_channels()


async def test_a_connection_with_the_host_is_a_reason_and_no_harm(boxes: Boxes, places: Places) -> None:
    """A cell that is connected with a socket in its folder cannot be saved; it goes on, and once it lets go it can."""
    folder = places.root / "work"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    server = await asyncio.start_unix_server(_until_the_end, folder / "host.sock")
    (folder / "host.sock").chmod(0o666)
    box = await boxes.make(boxes.spec(workspace=folder))
    kernel = await box.start_kernel()
    held = f"import socket; out = socket.socket(socket.AF_UNIX); out.connect('{folder}/host.sock')"
    assert (await kernel.run(held)).status == "ok"
    with pytest.raises(SnapshotError) as refused:
        await boxes.save(box, kernel)
    assert refused.value.hint
    kernel = await box.kernel_again(kernel)
    assert (await kernel.run("out.close()")).status == "ok"
    await boxes.save(box, kernel)
    server.close()
    await server.wait_closed()


async def test_only_its_own_sandboxes_are_saved_and_restored(boxes: Boxes) -> None:
    """Anything else is refused before anything is done."""
    box = await boxes.make()
    kernel = await box.start_kernel()
    image = await boxes.save(box, kernel)
    with pytest.raises(UnsupportedOperationError):
        await boxes.engine.restore(box.instance, image=image)
    assert (await boxes.engine.restore((await boxes.make(image=image)).instance, image=image)).pid == kernel.pid


async def test_the_probe_tries_it_once(boxes: Boxes) -> None:
    """A small sandbox is saved and restored, nothing is left, and the second probe knows."""
    first = await boxes.engine.probe()
    assert first.ready, first.why_not
    assert await boxes.engine.images() == []
    began = asyncio.get_running_loop().time()
    assert (await boxes.engine.probe()).ready
    assert asyncio.get_running_loop().time() - began < 0.1
    assert not [path for path in Path("/tmp").glob("warmcell-probe-*") if path.stat().st_uid == os.getuid()]
