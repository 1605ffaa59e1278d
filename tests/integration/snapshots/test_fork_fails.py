"""Forks of which a clone fails, or for which a disk is too small: none or all, said why, and nothing is left."""

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

from tests.integration.keeper.conftest import until
from tests.integration.snapshots.notebooks import Notebook, clones, end_all, gone, keeper, notebook, own_disk
from tests.leaks import Places
from warmcell.extension.keeper.kernel_memory import CLONES_MAX
from warmcell.sandbox.backends.processes import descendants
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import CapacityError, SandboxDiedError, WarmcellError
from warmcell.sandbox.paths import Paths

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

OURS = (".pages", ".pins", "store.json")
"""What lies beside images and snapshots."""

ONE_DIES = """
import os, warmcell
@warmcell.after_restore
def die_if_first():
    try:
        os.close(os.open({taken!r}, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os._exit(3)
x = 1
"""
"""Of all that come from this kernel, the first one to see the folder ends; it sees the host's, as its clones do."""


@dataclass(frozen=True)
class Before:
    """What there is beside the forks: a notebook, its processes, its place among the sandboxes."""

    client: KeeperClient
    source: Notebook
    keeper: int
    processes: frozenset[int]

    @classmethod
    async def of(cls, client: KeeperClient, source: Notebook) -> Self:
        """What there is now."""
        pid = int((await client.get("/status"))["pid"])
        return cls(client, source, pid, frozenset(descendants(pid)))

    async def check(self) -> None:
        """There is nothing else: kernels, sandboxes, snapshots, images, processes, directories."""
        told = (await self.client.get("/sandboxes"))["sandboxes"]
        assert [one["id"] for one in told if one["state"] != "failed"] == [self.source.sandbox_id]
        kernels = (await self.client.get("/kernels"))["kernels"]
        assert [one["kernel_id"] for one in kernels] == [self.source.kernel_id]
        assert (await self.client.get("/snapshots"))["snapshots"] == []
        left: list[object] = []

        async def none_left() -> bool:
            left[:] = set(descendants(self.keeper)) - self.processes
            paths = Paths.default()
            left.extend(path for path in paths.sandboxes.iterdir() if path.name != self.source.sandbox_id)
            for folder in (paths.images / "0", paths.snapshots):
                left.extend(path for path in folder.iterdir() if path.name not in OURS)
            return not left

        try:
            await until(none_left)
        except AssertionError:
            raise AssertionError(f"left: {left}") from None
        assert (await self.source.info())["state"] == "running"


async def failed(doing: Any) -> WarmcellError:
    with pytest.raises(WarmcellError) as raised:
        await doing
    assert raised.value.hint
    return raised.value


async def test_one_clone_of_many_dies(places: Places, tmp_path: Path) -> None:
    """The most that can be asked for, one of which ends before it has answered; then the same number of good ones."""
    shared = places.root / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    taken = shared / "taken"
    mounts = [{"source": str(shared), "mode": "rw"}]
    most = CLONES_MAX + 1
    async with (
        keeper(places, mounts=[str(shared)], max_sandboxes=most) as client,
        notebook(client, tmp_path, mounts=mounts) as made,
    ):
        await made.run(ONE_DIES.format(taken=str(taken)))
        before = await Before.of(client, made)
        assert isinstance(await failed(made.do("fork", n=CLONES_MAX)), SandboxDiedError)
        assert taken.exists()
        await before.check()
        told = (await made.do("fork", n=CLONES_MAX))["sandboxes"]
        assert len({one["kernel_id"] for one in told}) == CLONES_MAX
        assert {one["state"] for one in told} == {"running"}
        for one in told:
            await client.delete(f"/kernels/{one['kernel_id']}")
        await before.check()
        assert await made.run("print(x)") == "1"


@pytest.fixture
def few_names(places: Places) -> Iterator[Path]:
    """The runtime directory, a file system of its own."""
    with own_disk(places.runtime, options="size=1g") as runtime:
        yield runtime


def names_left(place: Path, count: int) -> None:
    """Let there be room for so many more files there."""
    found = os.statvfs(place)
    most = found.f_files - found.f_ffree + count
    subprocess.run(["mount", "-o", f"remount,nr_inodes={most}", str(place)], check=True)


async def test_no_room_for_all_clones(places: Places, few_names: Path, tmp_path: Path) -> None:
    """The files that a sandbox needs on the host find room for some of the clones alone."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("x = 1")
        before = await Before.of(client, made)
        free = os.statvfs(few_names).f_ffree
        one = (await made.do("fork", n=1))["sandboxes"][0]
        each = free - os.statvfs(few_names).f_ffree
        await client.delete(f"/kernels/{one['kernel_id']}")
        await before.check()
        for some in (0, each // 2, 2 * each + each // 2, 6 * each - 1):
            names_left(few_names, some)
            error = await failed(made.do("fork", n=6))
            assert isinstance(error, CapacityError), (some, error)
            await before.check()
            assert await made.run("print(x)") == "1"
        names_left(few_names, 20 * each)
        async with clones(made, 2) as forked:
            assert [await clone.run("print(x)") for clone in forked] == ["1", "1"]
        await end_all(client)
        await gone(client, signum=signal.SIGTERM)


@pytest.fixture
def small_disk(places: Places) -> Iterator[Path]:
    """The state directory, a file system of its own with 100 MiB."""
    with own_disk(places.state, options="size=100m") as state:
        yield state


async def test_no_room_for_files_or_memory(places: Places, small_disk: Path, tmp_path: Path) -> None:
    """A disk that has room for the kernel's files and not for its memory, or not even for those."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        await made.run("import os; x = 1")
        before = await Before.of(client, made)
        for files, memory in ((110, 0), (50, 80)):
            await made.run(f"made = open('/tmp/files', 'wb'); made.write(os.urandom({files} << 20)); made.close()")
            await made.run(f"held = os.urandom({memory} << 20)")
            assert isinstance(await failed(made.do("fork", n=4)), CapacityError)
            await before.check()
            assert await made.run("print(x, os.path.getsize('/tmp/files') >> 20)") == f"1 {files}"
        await made.run("os.unlink('/tmp/files'); held = None")
        async with clones(made, 2) as forked:
            assert [await clone.run("print(x)") for clone in forked] == ["1", "1"]
        await end_all(client)
        await gone(client, signum=signal.SIGTERM)
