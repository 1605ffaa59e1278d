"""The same restarts where memory cannot be saved: what waits has a kernel that was forked and came up ahead."""

from pathlib import Path

import pytest

from tests.integration.snapshots.notebooks import keeper
from tests.integration.snapshots.test_restarts import LEFT, PLACE, from_pool, prepared, restart, until_some_wait
from tests.integration.snapshots.test_warm_pool import first
from tests.leaks import Places

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root]


async def test_nothing_left_means_a_prepared_sandbox(places: Places, tmp_path: Path) -> None:
    """Under its own id and with its folder; variables are gone, and no output is lost."""
    async with keeper(places, prepared=1, snapshots="none") as client, prepared(client, tmp_path) as made:
        place = await made.run(PLACE)
        assert await made.run("x = 1; open('written', 'w').write('by the kernel before'); print(x)") == "1"
        before = await made.info()
        for generation in (1, 2, 3):
            await until_some_wait(client)
            info = await restart(made)
            assert (info["id"], info["generation"]) == (made.sandbox_id, before["generation"] + generation)
            assert (info["started_from"], info["created_at"]) == ("template", before["created_at"])
            assert await made.run("print('x' in globals(), open('written').read())") == "False by the kernel before"
            before_it, place = place, await made.run(PLACE)
            assert place != before_it
            assert await made.run("for n in range(2000): print(n)") == "\n".join(map(str, range(2000)))
        assert len((await client.get("/sandboxes"))["sandboxes"]) == 2  # Its own, and the first.


async def test_what_a_kernel_has_left_is_there_after_every_restart(places: Places, tmp_path: Path) -> None:
    """The next kernels come up in the same sandbox, and what waits goes on waiting."""
    async with keeper(places, prepared=1, snapshots="none") as client, first(client, tmp_path):
        for leave, look in LEFT.items():
            async with from_pool(client, tmp_path) as made:
                place = await made.run(PLACE)
                assert await made.run(f"{leave}\nNone") == ""
                for _ in range(2):
                    info = await restart(made)
                    assert (info["id"], info["started_from"]) == (made.sandbox_id, "template"), leave
                    assert await made.run(PLACE) == place, leave
                    assert "kept" in await made.run(look), leave
                await client.delete(f"/kernels/{made.kernel_id}")


async def test_restarts_faster_than_sandboxes_are_prepared(places: Places, tmp_path: Path) -> None:
    """Whoever finds none that waits gets its kernel in the same sandbox; cells that were sent meanwhile are run."""
    async with keeper(places, prepared=1, snapshots="none") as client, prepared(client, tmp_path) as made:
        for number in range(6):
            sent = made.page.send("print('before')")
            assert (await made.page.done(sent))["status"] == "ok"
            assert (await restart(made))["id"] == made.sandbox_id
            assert await made.run(f"print({number})") == str(number)
