"""Starts from a template that is kept as a snapshot, and from the sandboxes that wait prepared."""

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.keeper.conftest import until
from tests.integration.snapshots.notebooks import Notebook, body, keeper, notebook, page
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.helper.dump import FIRST_PID_OF_TEMPLATES
from warmcell.sandbox.paths import Paths

pytestmark = pytest.mark.criu

PRELOAD = ["json", "decimal"]
OURS = [{"source": sys.prefix}]
"""Where the packages are that `environment` has as well."""


FEW_FAULTS = 500
"""Of some 150. A kernel that was just restored has 2,000, one that imports as little as these do 1,000."""


def faults(places: Places) -> dict[int, int]:
    """How often each process of a template, or restored from one, has got a page of memory."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            of_guest = (entry / "status").read_text().partition("NSpid:")[2].split("\n", 1)[0].split()
            if int(of_guest[-1]) >= FIRST_PID_OF_TEMPLATES and places.root.name in (entry / "mountinfo").read_text():
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[7])
    return found


async def prepared(client: KeeperClient) -> int:
    """How many wait now."""
    return sum(one["prepared"] for one in (await client.get("/templates"))["templates"])


async def until_prepared(client: KeeperClient, count: int, *, timeout_s: float = 100.0) -> None:
    """Wait until so many wait; what fails is tried again for half a minute, and that takes its time as well."""
    deadline = time.monotonic() + timeout_s
    while (found := await prepared(client)) != count:
        assert time.monotonic() < deadline, f"{found} are prepared: {Paths.default().keeper_log.read_text()[-4000:]}"
        await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def first(client: KeeperClient, workspace: Path, **spec: Any) -> AsyncIterator[Notebook]:
    """A notebook from which a template is made."""
    async with notebook(client, workspace, **{"preload": PRELOAD, **spec}) as made:
        yield made


async def started(client: KeeperClient, workspace: Path, **spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is told of a kernel that has just started, and where it is."""
    asked = body(workspace, **{"preload": PRELOAD, **spec})
    info: dict[str, Any] = await client.post("/kernels", asked, timeout=120)
    return info, asked


async def says(asked: dict[str, Any], code: str) -> str:
    """What a cell prints in the kernel of a request."""
    async with page(asked["connection"]) as opened:
        await opened.ready()
        return await opened.run(code)


@pytest.mark.alone
async def test_ten_starts_one_second_apart_all_come_from_the_pool(places: Places, tmp_path: Path) -> None:
    """None waits for a sandbox or a restore, nor does any of a burst when there was one just before.

    Where a machine that does something else takes longer than that second, the next start waits for it.
    """
    async with keeper(places, prepared=1) as client, first(client, tmp_path):
        await until_prepared(client, 1)
        late = []
        for _ in range(10):
            began = time.monotonic()
            info, asked = await started(client, tmp_path)
            assert info["started_from"] == "template"
            assert "pool" in info["phases_ms"], info["phases_ms"]
            assert await client.delete(f"/kernels/{asked['kernel_id']}") is not False
            await asyncio.sleep(max(0.0, began + 1 - time.monotonic()))
            late.append(not await prepared(client))
            async with asyncio.timeout(60):
                while not await prepared(client):  # noqa: ASYNC110 - nobody tells it
                    await asyncio.sleep(0.02)
        assert sum(late) <= 3, late
        await until_prepared(client, 1)
        many = await asyncio.gather(*(started(client, tmp_path) for _ in range(5)))
        assert {info["started_from"] for info, _ in many} == {"template"}
        await until_prepared(client, 5)
        again = await asyncio.gather(*(started(client, tmp_path) for _ in range(5)))
        assert all("pool" in info["phases_ms"] for info, _ in again)
        for _, asked in [*many, *again]:
            await client.delete(f"/kernels/{asked['kernel_id']}")


@pytest.mark.long
async def test_a_while_after_a_burst_no_more_than_one_waits(places: Places, tmp_path: Path) -> None:
    """What demand brought goes when it is forgotten; the unit tests say so with a clock of their own."""
    async with keeper(places, prepared=1) as client, first(client, tmp_path):
        await until_prepared(client, 1)
        many = [await started(client, tmp_path) for _ in range(5)]
        await until_prepared(client, 5)
        for _, asked in many:
            await client.delete(f"/kernels/{asked['kernel_id']}")
        await until_prepared(client, 1, timeout_s=60)


async def test_a_kernel_that_waits_has_done_what_every_kernel_does_first(places: Places, tmp_path: Path) -> None:
    """Of the memory that it writes up to its first reply next to nothing is still to come; nobody sees it otherwise."""
    async with keeper(places, prepared=1) as client, first(client, tmp_path):
        await until_prepared(client, 1)
        before = faults(places)
        _, asked = await started(client, tmp_path)
        async with page(asked["connection"]) as opened:
            await opened.ready()
            told = await opened.run("print(len(In), len(Out), _ == __ == '', get_ipython().execution_count, end='')")
            assert max(now - before[pid] for pid, now in faults(places).items() if pid in before) < FEW_FAULTS
            assert told == "2 0 True 2"
            asked_by = {each["parent_header"].get("session") for each in opened.heard}
            assert asked_by <= {None, opened.client.session.session}
        await client.delete(f"/kernels/{asked['kernel_id']}")


async def test_what_runs_cells_of_others_is_a_kernel_of_its_own(places: Places, tmp_path: Path) -> None:
    """Kernels from one template, each in the sandbox of a `%%remote`, differ in entropy and have its environment."""
    cell = "%%remote\nimport os, random\nprint(random.random(), os.getcwd(), os.environ['WISHED'])"
    async with keeper(places, prepared=1) as client, first(client, tmp_path, env={"WISHED": "yes"}):
        await until_prepared(client, 1)
        asked = [(await started(client, tmp_path, env={"WISHED": "yes"}))[1] for _ in range(2)]
        said = [await says(each, cell) for each in asked]
        assert all("template" in one.splitlines()[0] for one in said), said
        numbers, folders, wishes = zip(*(one.splitlines()[-1].split() for one in said), strict=True)
        assert len(set(numbers)) == 2
        assert set(folders) == {str(tmp_path)}
        assert set(wishes) == {"yes"}
        for each in asked:
            await client.delete(f"/kernels/{each['kernel_id']}")


async def test_a_restart_says_what_itself_took(places: Places, tmp_path: Path) -> None:
    """Not what the start before it spent its time on."""
    async with keeper(places, prepared=1) as client, first(client, tmp_path):
        await until_prepared(client, 1)
        info, asked = await started(client, tmp_path)
        assert "pool" in info["phases_ms"]
        await says(asked, "open('/tmp/left', 'w')")  # So that it stays in its sandbox.
        await client.post(f"/kernels/{asked['kernel_id']}/end", {"grace_s": 0})
        again = await client.post("/kernels", asked, timeout=120)
        assert (again["id"], again["started_from"], set(again["phases_ms"])) == (
            info["id"],
            "template",
            {"restore", "ready"},
        )


def restore_has_failed() -> bool:
    """Whether the helper has refused one."""
    return re.search(r"op='restore' .* snapshot_\w+:", Paths.default().keeper_log.read_text()) is not None


async def test_a_template_that_cannot_be_had_for_a_moment_is_tried_again(places: Places, tmp_path: Path) -> None:
    """What waits comes from the template all the same: what has imported the modules itself is of no use to a start."""
    async with keeper(places, prepared=1) as client, first(client, tmp_path):
        await until_prepared(client, 1)
        (image,) = (Paths.default().images / str(os.getuid())).glob("[a-z0-9]*")
        away = image.rename(image.with_name(f".{image.name}"))
        try:
            _, asked = await started(client, tmp_path)
            await until(lambda: asyncio.to_thread(restore_has_failed))
        finally:
            away.rename(image)
        await until_prepared(client, 1)
        info, again = await started(client, tmp_path)
        assert "pool" in info["phases_ms"], info["phases_ms"]
        for each in (asked, again):
            await client.delete(f"/kernels/{each['kernel_id']}")


async def test_prepared_sandboxes_never_exceed_their_memory(places: Places, tmp_path: Path) -> None:
    """As many as fit wait, whatever was asked for."""
    async with keeper(places, prepared=1, prepared_memory=0.08) as client, first(client, tmp_path):
        await until_prepared(client, 1)
        many = await asyncio.gather(*(started(client, tmp_path) for _ in range(8)))
        began, most = time.monotonic(), 0
        while (took := time.monotonic() - began) < 10 or (most == 0 and took < 60):
            (template,) = (await client.get("/templates"))["templates"]
            assert template["prepared_bytes"] <= 0.08 * 2**30
            most = max(most, template["prepared"])
            await asyncio.sleep(0.1)
        assert 1 <= most < 8
        for _, asked in many:
            await client.delete(f"/kernels/{asked['kernel_id']}")


async def until_renewed(client: KeeperClient, before: str) -> None:
    """Wait until there is another template than the one that there was, and a sandbox waits that comes from it."""
    deadline = time.monotonic() + 60
    while before in (known := await templates(client)) or not known:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    await until_prepared(client, 1)


async def test_an_environment_that_has_changed_gets_a_new_template(places: Places, tmp_path: Path) -> None:
    """Not even a prepared sandbox of the old one is used, and the old one goes."""
    python, packages = environment(tmp_path / "venv")
    (packages / "thing.py").write_text("VERSION = 1\n")
    workspace = tmp_path / "work"
    workspace.mkdir()
    spec = {"python": python, "preload": ["thing"], "mounts": OURS}
    async with keeper(places, prepared=1, mounts=[sys.prefix]) as client, first(client, workspace, **spec) as source:
        await until_prepared(client, 1)
        (before,) = await templates(client)
        assert await source.run("import thing; print(thing.VERSION)") == "1"
        (packages / "thing.py").unlink()
        (packages / "thing.py").write_text("VERSION = 22\n")
        info, asked = await started(client, workspace, **spec)
        assert info["started_from"] != "template"
        assert await says(asked, "import thing; print(thing.VERSION)") == "22"
        await until_renewed(client, before)
        info, asked = await started(client, workspace, **spec)
        assert info["started_from"] == "template"
        assert await says(asked, "import thing; print(thing.VERSION)") == "22"


async def test_a_template_outlives_its_keeper(places: Places, tmp_path: Path) -> None:
    """The first kernel of the next keeper comes from it; until somebody asks for one nothing is prepared."""
    async with keeper(places, prepared=1) as client, first(client, tmp_path):
        await until_prepared(client, 1)
    await gone(places)
    async with keeper(places, prepared=1) as client:
        assert await prepared(client) == 0
        info, _ = await started(client, tmp_path)
        assert info["started_from"] == "template"
        assert {"create", "restore"} <= set(info["phases_ms"])


@pytest.mark.parametrize("warmup", ["import thing; thing.load()", "thing:load"])
async def test_a_warm_up_is_run_once_for_all_kernels(places: Places, tmp_path: Path, warmup: str) -> None:
    """What it has loaded is there, and its names are not."""
    python, packages = environment(tmp_path / "venv")
    (packages / "thing.py").write_text("loaded = []\ndef load():\n    loaded.append('model')\n")
    workspace = tmp_path / "work"
    workspace.mkdir()
    spec = {"python": python, "preload": ["thing"], "warmup": warmup, "mounts": OURS}
    async with keeper(places, prepared=1, mounts=[sys.prefix]) as client, first(client, workspace, **spec):
        await until_prepared(client, 1)
        info, asked = await started(client, workspace, **spec)
        assert info["started_from"] == "template"
        assert await says(asked, "print('thing' in globals()); import thing; print(thing.loaded)") == "False\n['model']"


async def test_a_warm_up_that_fails_is_told(places: Places, tmp_path: Path) -> None:
    """Kernels come from the template without it, and it says why."""
    spec = {"warmup": "1 / 0"}
    async with keeper(places, prepared=1) as client, first(client, tmp_path, **spec):
        await until_prepared(client, 1)
        info, asked = await started(client, tmp_path, **spec)
        assert info["started_from"] == "template"
        assert info["template"]["failed"] == {"warm-up": "ZeroDivisionError: division by zero"}
        assert await says(asked, "print(6 * 7)") == "42"


async def templates(client: KeeperClient) -> list[str]:
    """Ids of the templates that are kept."""
    return [one["id"] for one in (await client.get("/snapshots"))["snapshots"] if one["kind"] == "template"]


async def gone(places: Places) -> None:
    """Wait until the keeper that nobody needs has ended."""
    deadline = time.monotonic() + 60
    while any(places.runtime.glob("keeper.sock")):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def environment(place: Path) -> tuple[str, Path]:
    """A virtual environment that has all that this one has, and a place for more: its interpreter and that place."""
    packages = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    packages.mkdir(parents=True)
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "ours.pth").write_text("\n".join(ours) + "\n")
    (place / "bin").mkdir()
    python = place / "bin" / "python"
    real = Path(sys.executable).resolve()
    python.symlink_to(real)
    (place / "pyvenv.cfg").write_text(f"home = {real.parent}\ninclude-system-site-packages = false\n")
    return str(python), packages
