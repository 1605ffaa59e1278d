"""Snapshots that nobody has used for long take less, memory included, and come back as they were."""

import asyncio
import json
import os
import pty
import re
import sys
from pathlib import Path

import pytest

from tests.integration.keeper.conftest import until
from tests.integration.snapshots.notebooks import Notebook, keeper, notebook
from tests.integration.snapshots.test_archives import cli
from tests.lanes import TOP
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import ConflictError, WarmcellError

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

STATE = "data = [number % 1000 for number in range(3_000_000)]; noise = __import__('os').urandom(1 << 20); count = 41"
SUM = "print(sum(data), hash(noise))"


async def compressed(client: KeeperClient, ref: str) -> list[dict[str, object]]:
    """The lines that are answered, once the snapshot is on the disk and nobody looks at it any more."""
    said: list[dict[str, object]] = []

    async def done() -> bool:
        try:
            async with client.stream("POST", f"/snapshots/{ref}/compress", json={}, timeout=60) as answer:
                said[:] = [json.loads(line) async for line in answer.aiter_lines()]
        except ConflictError:
            return False
        return "error" not in said[-1]

    await until(done, timeout=120)
    return said


async def test_a_snapshot_is_compressed_until_it_is_used(places: Places, tmp_path: Path) -> None:
    """It says how far it is, what it takes then and that it is compressed; what is restored is what was saved.

    While a kernel that came from it runs it cannot be compressed; suspended, that can be, and its cell brings it back.
    """
    async with keeper(places) as client, notebook(client, tmp_path) as book:
        await book.run(STATE)
        said = await book.run(SUM)
        saved = await book.do("snapshot", name="mine")
        lines = await compressed(client, "mine")
        assert [sorted(line) for line in lines[:-1]] == [["done", "of"]] * (len(lines) - 1)
        assert lines[:-1]
        (listed,) = (await cli("ls"))["snapshots"]
        assert listed == lines[-1]["snapshot"]
        assert (listed["image_compressed"], listed["image_bytes"] < saved["image_bytes"] / 2) == (True, True)
        assert on_disk(places, saved["id"]) <= listed["image_bytes"]
        assert [one["state"] for one in (await cli("verify"))["snapshots"]] == ["whole"]
        await book.run("count, data = 0, []")
        await book.do("restore", snapshot="mine")
        assert (await book.run("count += 1; print(count)"), await book.run(SUM)) == ("42", said)
        (listed,) = (await cli("ls"))["snapshots"]
        assert not listed["image_compressed"]
        assert listed["image_bytes"] > saved["image_bytes"] / 2
        assert (await cli("compress", "mine", code=1))["error"]["code"] == "conflict"
        assert (await cli("compress", "--older", "0s"))["snapshots"] == []
        await asleep(client, book, said)


async def compressed_on_a_terminal(ref: str) -> str:
    """What the command shows there, once nobody looks at the snapshot any more."""
    shown = b""

    async def done() -> bool:
        nonlocal shown
        own, its = pty.openpty()
        with open(own, "rb", buffering=0) as terminal:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "warmcell.extension.cli", "snapshots", "compress", ref),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=its,
                cwd=TOP,
            )
            os.close(its)
            code = await asyncio.wait_for(process.wait(), 120)
            shown = terminal.read(1 << 16)  # All of it is there, and little; without a line it would say that it ended.
        return code == 0

    await until(done, timeout=120)
    return shown.decode()


async def asleep(client: KeeperClient, book: Notebook, said: str) -> None:
    """A suspended kernel, whose image shares its memory with that of before: both are compressed, and come back."""
    asleep = (await book.do("suspend"))["snapshot"]
    shown = await compressed_on_a_terminal(asleep)
    assert re.search(rf"Compressing {asleep} \[[# ]{{30}}\] +\d+% of \d", shown), shown
    infos = {one["id"]: one["image_compressed"] for one in (await cli("ls"))["snapshots"]}
    assert set(infos.values()) == {True}
    assert await book.run(SUM) == said
    assert await book.run("count += 1; print(count)") == "43"


def on_disk(places: Places, image: str) -> int:
    """What an image's memory takes there."""
    files = (places.state / "images" / str(os.getuid()) / image / "memory").iterdir()
    return sum(file.stat().st_blocks * 512 for file in files)


async def test_what_is_not_said_is_refused(places: Places) -> None:
    """Neither which nor how old; and what is not there."""
    async with keeper(places) as client:
        for arguments in ((), ("mine", "--older", "1d"), ("--older", "soon")):
            assert (await cli("compress", *arguments, code=1))["error"]["code"] == "invalid_request"
        with pytest.raises(WarmcellError, match="no snapshot"):
            await client.post("/snapshots/nothing/compress", {})
