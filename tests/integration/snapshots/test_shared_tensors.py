"""Tensors that processes hand each other are the ones that were meant, also after a restore."""

import json
import os
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import subject_of
from tests.integration.snapshots.notebooks import keeper, notebook
from tests.leaks import Places

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

ASIDE = """
def keep(tensors, told):
    kept = []
    while True:
        tensor = tensors.get()
        if tensor[0] >= 0: kept.append(tensor)
        told.send(int(tensor[0]))

def make(wanted, tensors):
    import torch
    while True:
        tensors.put(torch.full((4,), wanted.recv()))
"""

BEGIN = """
import json, os, torch.multiprocessing, aside
context = torch.multiprocessing.get_context("fork")
there, back = context.Queue(), context.Queue()
said, told = context.Pipe(duplex=False)
wanted, want = context.Pipe(duplex=False)
for each in (context.Process(target=aside.keep, args=(there, told), daemon=True),
             context.Process(target=aside.make, args=(wanted, back), daemon=True)):
    each.start()
kept = []
def exchange(numbers):
    "What the kernel gets that a child makes, and what another child gets that the kernel makes; the positive are kept."
    wrong = []
    for number in numbers:
        want.send(number); got = back.get()
        if number >= 0: kept.append(got)
        there.put(torch.full((4,), number)); theirs = said.recv()
        if (int(got[0]), theirs) != (number, number): wrong.append((number, int(got[0]), theirs))
    print(json.dumps(wrong))
"""

DEVICE = "print(os.stat('/dev/shm').st_dev)"


async def test_a_tensor_of_before_is_never_taken_for_one_of_after(places: Places, tmp_path: Path) -> None:
    """Neither by the kernel nor by a child that was handed it: torch knows the files of tensors by their numbers.

    Those of files begin anew with each restore, and so, where the machine does nothing else, does the device's.
    """
    (tmp_path / "aside.py").write_text(ASIDE)
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        assert await made.run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{BEGIN}") == ""
        devices = [await made.run(DEVICE)]
        for cycle in range(1, 6):
            assert json.loads(await made.run("exchange(range(-100, 0))")) == []
            assert json.loads(await made.run(f"exchange(range({100 * cycle}, {100 * cycle + 10}))")) == []
            await made.do("suspend")
            assert json.loads(await made.run("exchange(range(-100, 0))")) == []
            devices.append(await made.run(DEVICE))
        assert len(set(devices)) == len(devices)


async def test_shared_memory_is_on_another_device_in_each_sandbox_of_a_layer(places: Places) -> None:
    """Also of layers of layers, and although the number of the sandbox before is free."""
    subject = subject_of(places)
    seen: list[int] = []
    layer: Path | None = None
    for number in range(8):
        async with subject.box(layer=layer) as box:
            seen.append(int(await box.says("stat -c %d /dev/shm")))
            await box.says("ls /dev/shm; touch /dev/shm/there")
            saved = subject.folder(f"saved{number}")
            await box.instance.save_layer(saved)
        if layer is not None:
            assert json.loads((saved / "layer.json").read_text())["devices"] == seen
        layer = saved
    assert len(set(seen)) == len(seen)
    assert all(os.major(one) == 0 for one in seen)
