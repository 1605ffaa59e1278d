"""Restarts in containers where memory cannot be saved: one that waits, with what it has imported, is taken whole."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.server import end_keeper
from tests.engines import Dockerd
from tests.integration.docker.test_snapshots import OURS, folder
from tests.integration.snapshots.notebooks import keeper
from tests.integration.snapshots.test_restarts import PLACE, prepared, restart, until_some_wait
from tests.leaks import Places

pytestmark = [pytest.mark.docker, pytest.mark.timeout(240)]

__all__ = ["folder"]

LEFT = {
    "open('/tmp/left', 'w').write('kept')": "print(open('/tmp/left').read())",
    "import subprocess; subprocess.Popen(['sleep', '987'], start_new_session=True)": (
        "import subprocess; print('kept' if '987' in subprocess.getoutput('cat /proc/[0-9]*/cmdline') else 'gone')"
    ),
}


@pytest.fixture(autouse=True)
def ended(places: Places, docker: Dockerd) -> Iterator[None]:
    """The keeper ends before its containers are looked for."""
    yield
    end_keeper(places)


async def test_a_restart_takes_a_container_that_waits(places: Places, docker: Dockerd, folder: Path) -> None:
    """Under its own id and with its folder; variables are gone, and what was printed is not."""
    settings = {"prepared": 1, "snapshots": "none", "docker_host": docker.host}
    async with keeper(places, **settings) as client, prepared(client, folder, **OURS) as made:
        place = await made.run(PLACE)
        assert await made.run("x = 1; open('written', 'w').write('before'); print(x)") == "1"
        before = await made.info()
        for generation in (1, 2):
            await until_some_wait(client)
            info = await restart(made)
            assert (info["id"], info["generation"]) == (made.sandbox_id, before["generation"] + generation)
            assert (info["started_from"], info["created_at"]) == ("template", before["created_at"])
            assert await made.run("print('x' in globals(), open('written').read())") == "False before"
            before_it, place = place, await made.run(PLACE)
            assert place != before_it


@pytest.mark.parametrize("leave", LEFT, ids=["file", "process"])
async def test_what_a_kernel_has_left_is_there_after_a_restart(
    places: Places,
    docker: Dockerd,
    folder: Path,
    leave: str,
) -> None:
    """The next kernels come up in the same container, and what waits goes on waiting."""
    settings = {"prepared": 1, "snapshots": "none", "docker_host": docker.host}
    async with keeper(places, **settings) as client, prepared(client, folder, **OURS) as made:
        place = await made.run(PLACE)
        await made.run(f"{leave}\nNone")
        for _ in range(2):
            await until_some_wait(client)
            info = await restart(made)
            assert (info["id"], info["started_from"]) == (made.sandbox_id, "template")
            assert await made.run(PLACE) == place
            assert await made.run(LEFT[leave]) == "kept"
