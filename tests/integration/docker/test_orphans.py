"""Containers outlive their keeper, and the next one, or `warmcell clean`, removes them."""

import asyncio
import os
import signal
import sys

import pytest

from tests.engines import Dockerd
from tests.integration.docker.boxes import paths_of, subject_of
from tests.lanes import TOP
from tests.leaks import Places
from warmcell.extension.cleaning import Cleaning
from warmcell.sandbox.backends.docker.labels import KEEPER, OWNER, SANDBOX, is_orphan, ours
from warmcell.sandbox.backends.leftovers import clean_leftovers
from warmcell.sandbox.models import SandboxId

pytestmark = pytest.mark.docker
TIMEOUT_S = 60.0


async def _orphan(docker: Dockerd, places: Places) -> int:
    """pid of the first process of a sandbox whose keeper was killed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.docker.keeper", docker.host), stdout=asyncio.subprocess.PIPE, cwd=TOP
    )
    assert process.stdout is not None
    pid = int(await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S))
    process.send_signal(signal.SIGKILL)
    await process.wait()
    process._transport.close()  # type: ignore[attr-defined]
    os.kill(pid, 0)
    return pid


@pytest.mark.parametrize("cleans", ["the next keeper", "warmcell clean"])
async def test_a_container_whose_keeper_was_killed_is_removed(docker: Dockerd, places: Places, cleans: str) -> None:
    """It is found by its labels; one whose keeper lives stays."""
    paths = paths_of(places).make()
    pid = await _orphan(docker, places)
    async with subject_of(places, docker).box() as mine:
        if cleans == "the next keeper":
            removed = await asyncio.to_thread(clean_leftovers, paths)
        else:
            removed = list((await asyncio.to_thread(Cleaning(paths).clean)).removed)
        assert sum("container warmcell-" in line for line in removed) == 1
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert await mine.says("echo alive") == "alive"
        assert len(await asyncio.to_thread(docker.engine.labelled, SANDBOX)) == 1


async def test_leftovers_are_removed_without_the_engine_as_well(docker: Dockerd, places: Places) -> None:
    """An engine that is away stops nothing else from being cleaned."""
    paths = paths_of(places).make()
    (paths.state / "engines").write_text(f"unix://{places.root}/none\n")
    (paths.sandboxes / "left").mkdir()
    assert await asyncio.to_thread(clean_leftovers, paths) == [f"run directory {paths.sandboxes / 'left'}"]


def test_whose_a_container_is() -> None:
    """Neither a living keeper's nor another user's is an orphan, nor one that says nothing."""
    labels = dict(ours(SandboxId("x")))
    assert not is_orphan(labels)
    assert not is_orphan({})
    assert not is_orphan({**labels, KEEPER: "garbage"})
    assert is_orphan({**labels, KEEPER: labels[KEEPER].replace(".", ".9", 1)})
    assert is_orphan({**labels, KEEPER: labels[KEEPER] + "0"})
    assert not is_orphan({**labels, KEEPER: labels[KEEPER] + "0", OWNER: "12345"})
