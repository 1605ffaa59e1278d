"""Who may read and write what a notebook makes is its user's to say, wherever its kernel comes from."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.helper.keeping import MADE
from tests.integration.snapshots.notebooks import Notebook, gone, keeper, page
from tests.integration.snapshots.test_restarts import from_pool, restart
from tests.integration.snapshots.test_warm_pool import first
from tests.leaks import Places
from warmcell import AsyncSandbox

pytestmark = [pytest.mark.bubblewrap, pytest.mark.root, pytest.mark.criu]

EXPECTED = {0o077: "600 600 700", 0o002: "664 664 775"}


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """That of whoever starts a keeper."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("snapshots", ["auto", "none"])
@pytest.mark.parametrize("umask", [0o077, 0o002], indirect=True)
async def test_notebooks_of_root_have_that_of_who_started_the_keeper(
    places: Places, tmp_path: Path, umask: int, snapshots: str
) -> None:
    """In its first kernel, one of a template, one that was restarted, one that was suspended; sandboxes of code not."""
    expected = EXPECTED[umask]
    async with keeper(places, prepared=1, snapshots=snapshots) as client:
        async with first(client, tmp_path) as made, from_pool(client, tmp_path) as pooled:
            assert await made.run(f"{MADE}made('first')") == expected
            assert (await pooled.info())["started_from"] == "template"
            assert await pooled.run(f"{MADE}made('pooled')") == expected
            await restart(pooled)
            assert await pooled.run(f"{MADE}made('restarted')") == expected
            if snapshots == "auto":
                await pooled.run("os.umask(0o037)")
                await pooled.do("suspend")
                assert await pooled.run("made('of-its-own')") == "640 640 740"
        async with AsyncSandbox(preload=(), workspace=tmp_path) as box:
            said = await box.exec("sh", "-c", "touch plain && mkdir folder && stat -c %a plain folder", cwd="/tmp")
            assert said.stdout.split() == ["644", "755"], said


@pytest.mark.parametrize("umask", [0o077], indirect=True)
async def test_a_restart_keeps_the_files_also_where_the_next_keeper_has_another(
    places: Places, tmp_path: Path, umask: int
) -> None:
    """What a sandbox has from who started its keeper stays with it: another one would not have what was installed."""
    async with keeper(places) as client, first(client, tmp_path) as made:
        assert await made.run("open('/tmp/kept', 'w').write('it is there');") == ""
        await gone(client, signum=signal.SIGTERM)
        os.umask(0o022)
        async with keeper(places) as after, page(made.body["connection"]) as opened:
            again = Notebook(after, made.body, made.sandbox_id, opened)
            assert await again.run("1 + 1") == "2"
            info = await restart(again)
            assert info["id"] == again.sandbox_id
            await opened.ready()
            said = await again.run(f"print(open('/tmp/kept').read())\n{MADE}made('after')")
            assert said == "it is there\n600 600 700"
