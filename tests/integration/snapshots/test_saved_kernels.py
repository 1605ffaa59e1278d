"""Real kernels of the template through a real dump and restore: they answer, and nothing that they print is lost."""

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.integration.process.guest import CHANNELS
from tests.integration.process.test_guest_saving import PRINTER, Line
from tests.integration.snapshots.boxes import Box, Boxes, boxes_of
from tests.leaks import Places
from warmcell.sandbox import guest_files
from warmcell.sandbox.channel import KernelStarted
from warmcell.sandbox.errors import SnapshotError
from warmcell.sandbox.models import StartedFrom

pytestmark = pytest.mark.criu

FIRST, SECOND = "a" * 12, "b" * 12

ECHO = "def echo(pipe):\n    while True: pipe.send(pipe.recv() + 1)\n"
CHILDREN = {
    "none": ("pass", "42"),
    "subprocess": (
        "import subprocess as s; child = s.Popen(['cat'], stdin=s.PIPE, stdout=s.PIPE, text=True, bufsize=1)",
        "(child.stdin.write('42\\n'), int(child.stdout.readline()))[1]",
    ),
    "fork": (
        f"{ECHO}import multiprocessing as m; c = m.get_context('fork'); here, there = c.Pipe()\n"
        "child = c.Process(target=echo, args=(there,), daemon=True); child.start()",
        "(here.send(41), here.recv())[1]",
    ),
    "pool": (
        "import multiprocessing as m; pool = m.get_context('fork').Pool(2); pool.map(abs, [1, 2])",
        "pool.map(abs, [-42])[0]",
    ),
}


@dataclass
class Saved:
    """A kernel in a sandbox, and a line to it."""

    box: Box
    started: KernelStarted
    line: Line


@pytest.fixture
async def boxes(places: Places) -> AsyncIterator[Boxes]:
    async with boxes_of(places) as made:
        yield made
    for directory in made.paths.sandboxes.iterdir():
        directory.rmdir()


async def kernel_of(boxes: Boxes, engine: StartedFrom = "template") -> Saved:
    """A kernel that can be saved."""
    box = await boxes.fresh(enrolled=True)
    if engine == "template":
        await box.channel.prepare(["json"], name="test")
        async for event in box.channel.events():
            if event["event"] == "template" and event["state"] == "ready":
                break
    ports = "".join(f'"{name}_port": {number}, ' for number, name in enumerate(CHANNELS, 1))
    guest = box.instance.guest_run_directory
    with guest_files.create(box.instance.run_directory / "k1.json") as file:
        file.write(f'{{{ports} "transport": "ipc", "ip": "{guest}/k1", "key": ""}}'.encode())
    started = await box.channel.start_kernel(f"{guest}/k1.json", env={}, engine=engine)
    assert started.started_from == engine
    box.kernel = started.pid
    return Saved(box, started, await called(boxes, box, started))


async def called(boxes: Boxes, box: Box, started: KernelStarted) -> Line:
    line = Line(f"{box.instance.run_directory}/{started.sockets}")
    boxes.stack.callback(line.hang_up)
    await line.until(lambda: bool(line.of("iopub_welcome")))
    return line


async def dumped(boxes: Boxes, saved: Saved, image: str, *, then: str) -> None:
    """Pause it, hang up and dump it, as soon as it has noticed that nobody is there any more."""
    assert (await saved.line.pause(image))["status"] == "ok"
    saved.line.hang_up()
    deadline = time.monotonic() + 60
    while True:
        try:
            await boxes.dump(saved.box, image, then=then)
            return
        except SnapshotError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)


async def came_back(boxes: Boxes, image: str, saved: Saved) -> Saved:
    """The kernel in another sandbox, spoken to as before."""
    box = await boxes.restored(image)
    await box.channel.adopt(box.kernel)
    line = await called(boxes, box, saved.started)
    assert (await line.welcome(image))["status"] == "ok"
    return Saved(box, saved.started, line)


def numbers(line: Line) -> list[int]:
    return [int(word) for word in re.findall(r"^\d+$", line.printed(), re.M)]


@pytest.mark.parametrize("children", CHILDREN)
async def test_a_kernel_comes_back_with_its_threads_and_children(boxes: Boxes, children: str) -> None:
    """What a thread prints through dump and restore has no gap and no duplicate; children live and answer."""
    begin, proof = CHILDREN[children]
    source = await kernel_of(boxes)
    reply = await source.line.run(f"{begin}\n{PRINTER}\nkept = 5")
    assert reply["status"] == "ok", reply
    await source.line.until(lambda: len(numbers(source.line)) > 20)
    await dumped(boxes, source, FIRST, then="stop")
    before = numbers(source.line)
    copy = await came_back(boxes, FIRST, source)
    assert await copy.line.value(f"[kept, {proof}]") == [5, 42]
    await copy.line.until(lambda: len(numbers(copy.line)) > 20)
    await copy.line.run("_on = False")
    await copy.line.run("print('end')")
    everything = [*before, *numbers(copy.line)]
    assert everything == list(range(len(everything)))


async def test_its_end_is_told_by_the_init_that_adopted_it(boxes: Boxes) -> None:
    """A restored kernel is signalled and its exit code told like any other; its sockets go with it."""
    source = await kernel_of(boxes, "cold")
    await dumped(boxes, source, FIRST, then="stop")
    copy = await came_back(boxes, FIRST, source)
    channel = copy.box.channel

    async def end() -> int:
        async for event in channel.events():
            if event["event"] == "kernel" and event["state"] == "exited":
                return int(event["exit_code"])
            if event["event"] == "kernel":
                assert event["pid"] == source.started.pid
                await channel.signal(event["pid"], 9, group=True)
        raise AssertionError("init is gone")

    async with asyncio.timeout(60):
        assert await end() == 137


async def test_the_original_goes_on_and_clones_differ(boxes: Boxes) -> None:
    """After a dump that does not stop it the original's output has no gap either; clones draw numbers of their own."""
    source = await kernel_of(boxes)
    await source.line.run(f"{PRINTER}\nimport random; random.seed(1)")
    await dumped(boxes, source, FIRST, then="go_on")
    copies = [await came_back(boxes, FIRST, source) for _ in range(2)]
    await source.line.call_again()
    await source.line.go_on()
    drawn = [await each.line.value("random.random()") for each in (source, *copies)]
    assert len(set(drawn)) == 3
    assert drawn[0] == 0.13436424411240122
    for each in (source, *copies):
        await each.line.until(lambda each=each: len(numbers(each.line)) > 20)
        await each.line.run("_on = False")
        await each.line.run("print('end')")
    assert numbers(source.line) == list(range(len(numbers(source.line))))
    for copy in copies:
        first = numbers(copy.line)[0]
        assert numbers(copy.line) == list(range(first, first + len(numbers(copy.line))))


async def test_it_is_saved_again_after_it_has_come_back(boxes: Boxes) -> None:
    """Dump, restore, dump, restore: with the same name of its sockets each time."""
    source = await kernel_of(boxes)
    await source.line.run("count = 1")
    await dumped(boxes, source, FIRST, then="stop")
    second = await came_back(boxes, FIRST, source)
    await second.line.run("count += 1")
    await dumped(boxes, second, SECOND, then="stop")
    third = await came_back(boxes, SECOND, source)
    assert await third.line.value("count") == 2
