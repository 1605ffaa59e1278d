"""`warmcell snapshots ls` and `rm`: what is listed, what goes, and what goes only by force."""

from pathlib import Path

import pytest

from benchmarks.pages import held_bytes, page_files
from tests.integration.keeper.conftest import until
from tests.integration.snapshots.notebooks import keeper, notebook
from tests.integration.snapshots.test_archives import cli, printed
from tests.leaks import Places

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]


async def test_what_is_removed_is_gone(places: Places, tmp_path: Path) -> None:
    """Its memory and files go, those of others stay; the last state of a suspended kernel goes by force alone."""
    images = places.state / "images" / "0"
    async with keeper(places) as client, notebook(client, tmp_path) as book:
        await book.run("x = 1; data = bytearray(__import__('os').urandom(1 << 24))")
        first = await book.do("snapshot", name="first")
        await book.run("x = 2")
        second = await book.do("snapshot", name="second")
        table = (await printed("ls")).splitlines()
        assert table[0].split()[:3] == ["SNAPSHOT", "NAME", "KIND"]
        assert [line.split()[:3] for line in table[1:3]] == [
            [second["id"], "second", "named"],
            [first["id"], "first", "named"],
        ]
        assert held_bytes(page_files(images / first["id"])) > 1 << 24

        assert await cli("rm", "first") == {"removed": ["first"]}
        assert [one["name"] for one in (await cli("ls"))["snapshots"]] == ["second"]
        assert not (places.state / "snapshots" / first["id"]).exists()

        async def image_gone() -> bool:
            return not (images / first["id"]).exists()

        await until(image_gone)
        error = (await cli("rm", "first", code=1))["error"]
        assert (error["code"], bool(error["hint"])) == ("snapshot_not_found", True)

        asleep = (await book.do("suspend"))["snapshot"]
        error = (await cli("rm", asleep, code=1))["error"]
        assert (error["code"], "--force" in error["hint"]) == ("conflict", True)
        assert await book.run("x += 1; print(x, len(data))") == f"3 {1 << 24}"

        asleep = (await book.do("suspend"))["snapshot"]
        assert await cli("rm", "--force", asleep) == {"removed": [asleep]}
        said = await book.page.done(book.page.send("print(x)"), timeout=60)
        assert (said["status"], said["ename"]) == ("error", "SnapshotNotFoundError")
        await book.do("restore", snapshot="second")
        assert await book.run("print(x, len(data))") == f"2 {1 << 24}"
