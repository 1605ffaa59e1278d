"""One sandbox stands in for another only where nothing is missed there."""

import asyncio
import time

from warmcell.sandbox.testing.contract.layers import has_layers, saved
from warmcell.sandbox.testing.contract.subject import GUEST_TIMEOUT_S, Box, Register, Subject, expect

check = Register()

BEGIN = "mkdir -p ~/of && echo one > ~/of/template && ln -s there ~/of/link && echo two > /tmp/template"
"""What both have from the layer that they begin with."""

MANY = 300
"""More files than are worth looking at; but those of the workspace, wherever that lies, are not."""

LEFT_AND_TAKEN_BACK = (
    ("touch /tmp/new", "rm /tmp/new"),
    ("touch /dev/shm/new", "rm /dev/shm/new"),
    ("mkdir ~/of/new", "rmdir ~/of/new"),
    ("rm /tmp/template", "echo two > /tmp/template"),
    ("echo six > /tmp/template", "echo two > /tmp/template"),
    ("chmod 600 /tmp/template", "chmod 644 /tmp/template"),
    ("chmod 700 ~/of", "chmod 755 ~/of"),
    ("ln -sf elsewhere ~/of/link", "ln -sf there ~/of/link"),
    ("mkfifo /tmp/new", "rm /tmp/new"),
    ("ln /tmp/template /tmp/new", "rm /tmp/new"),
    ("truncate -s 1G /tmp/new", "rm /tmp/new"),
)


async def replaceable(box: Box, other: Box, *, fork_server: bool = False) -> bool:
    """Whether `other` can take the place of a sandbox."""
    return await box.instance.can_be_replaced_by(other.instance, fork_server=fork_server)


@check(isolated=True, needs=has_layers)
async def what_is_left_in_a_sandbox_is_missed_in_another(subject: Subject) -> None:
    folder = subject.folder("given")
    for number in range(MANY):
        (folder / f"given-{number}").touch()
    async with subject.box(workspace=folder) as box:
        await box.says(f"umask 022; {BEGIN}")
        layer = await saved(subject, box, "layer")
    async with subject.box(workspace=folder, layer=layer) as box, subject.box(workspace=folder, layer=layer) as other:
        expect(await replaceable(box, other), "two sandboxes of one layer are not alike")
        if not box.instance.workspace_note:
            await box.says(f"echo here > {folder}/new")
        expect(await replaceable(box, other), "what is in the workspace is in both")
        for leave, take_back in LEFT_AND_TAKEN_BACK:
            await box.says(f"umask 022; {leave}")
            expect(not await replaceable(box, other), f"nobody misses {leave!r}")
            expect(not await replaceable(other, box), f"nobody is surprised by {leave!r}")
            await box.says(f"umask 022; {take_back}")
            expect(await replaceable(box, other), f"after {take_back!r} they are not alike")
        async with box.channel.exec_stream(["sleep", "600"]):
            expect(not await replaceable(box, other), "nobody misses a process")
        site = await box.run(subject.python, "-I", "-c", "import site; print(site.getsitepackages()[0])")
        if (await box.shell(f"touch {site.stdout.strip()}/new")).exit_code == 0:
            expect(not await replaceable(box, other), "nobody misses a package")


@check(isolated=True, needs=has_layers)
async def another_folder_or_layer_is_another_sandbox(subject: Subject) -> None:
    folder = subject.folder("given")
    async with subject.box(workspace=folder) as box:
        await box.says(BEGIN)
        first, second = await saved(subject, box, "first"), await saved(subject, box, "second")
        async with subject.box(workspace=folder, layer=first) as other:
            expect(not await replaceable(box, other), "one without a layer is like one with a layer")
            async with subject.box(workspace=folder, layer=second) as third:
                expect(not await replaceable(other, third), "two layers are taken for one")
            folder.rename(folder.with_name("before"))
            folder.mkdir()
            async with subject.box(workspace=folder, layer=first) as third:
                expect(not await replaceable(other, third), "a folder that took the other's place is taken for it")


@check(isolated=True, needs=has_layers)
async def what_init_keeps_is_not_missed_where_that_is_said(subject: Subject) -> None:
    async with subject.box() as box, subject.box() as other:
        for one in (box, other):
            await one.channel.prepare(["json"], name="kept")
        deadline = time.monotonic() + GUEST_TIMEOUT_S
        while not await replaceable(box, other, fork_server=True):  # In both a kernel comes up.
            expect(time.monotonic() < deadline, "a fork server, or the kernel that has come up there, is missed")
            await asyncio.sleep(0.05)
        expect(not await replaceable(box, other), "nobody misses a fork server that was not told of")
        async with box.channel.exec_stream(["sleep", "600"]):
            expect(not await replaceable(box, other, fork_server=True), "nobody misses a process beside it")
        await box.says("setsid sleep 600 >/dev/null 2>&1 &")
        expect(not await replaceable(box, other, fork_server=True), "nobody misses a process that has lost its parent")


@check(isolated=False, programs=True)
async def without_isolation_nothing_stands_in_for_another(subject: Subject) -> None:
    async with subject.box() as box, subject.box() as other:
        expect(not await replaceable(box, other), "its files are the host's own, and so is what it shares with others")
