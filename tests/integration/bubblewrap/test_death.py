"""Sandboxes end with their keeper, however that ends."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.conftest import OrdinaryUser
from tests.integration.bubblewrap.boxes import paths_of, subject_of
from tests.integration.bubblewrap.halting import halted, halting
from tests.leaks import Places
from warmcell.sandbox.backends.bubblewrap import binary
from warmcell.sandbox.backends.leftovers import clean_leftovers

KEEPER = str(Path(__file__).with_name("keeper.py"))
GONE_S = 60.0


async def killed_keeper(argv: Sequence[str], env: Mapping[str, str] | None = None) -> list[int]:
    """Start a keeper with two sandboxes, kill it, and return the host pids of what was in them."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, env=env
    )
    assert process.stdout is not None
    said = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
    process.kill()
    await process.wait()
    pids: list[int] = said["pids"]
    assert len(pids) >= 4
    return pids


async def keeper_killed_at_a_start(places: Places, argv: Sequence[str], env: Mapping[str, str]) -> None:
    """Kill a keeper in the moment in which bubblewrap's inner process waits for the outer one: both end."""
    with halting(places.root) as program:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            env={**env, binary.OVERRIDE: str(program)},
        )
        try:
            outer, *inner = await halted(process.pid)
        finally:
            process.kill()
            await process.wait()
        try:
            await gone([outer])
            # By then, and not because the next keeper of whatever test finds them.
            assert not [pid for pid in inner if _alive(pid)]
        finally:
            await asyncio.to_thread(clean_leftovers, paths_of(places))


async def gone(pids: Sequence[int]) -> None:
    """Wait until none of them lives any more."""
    deadline = time.monotonic() + GONE_S
    while living := [pid for pid in pids if Path(f"/proc/{pid}/exe").is_symlink() and _alive(pid)]:
        assert time.monotonic() < deadline, f"{living} are still there"
        await asyncio.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.bubblewrap
async def test_a_killed_keeper_takes_its_sandboxes_along(places: Places) -> None:
    """Everything in them, without anybody cleaning up."""
    pids = await killed_keeper([sys.executable, KEEPER, "bubblewrap", "2"])
    await gone(pids)
    removed = await asyncio.to_thread(clean_leftovers, paths_of(places))
    assert [line for line in removed if str(places.runtime) in line]
    again = await asyncio.to_thread(clean_leftovers, paths_of(places))
    assert not [line for line in again if str(places.runtime) in line]
    assert list(paths_of(places).sandboxes.iterdir()) == []


@pytest.mark.user
async def test_an_ordinary_users_killed_keeper_does_so_too(ordinary_user: OrdinaryUser) -> None:
    """Without control groups, by the parent-death signal and the pid namespace alone."""
    pids = await killed_keeper(ordinary_user.argv(sys.executable, KEEPER, "bubblewrap", "2"), ordinary_user.env)
    await gone(pids)
    await asyncio.to_thread(clean_leftovers, paths_of(ordinary_user.places))
    assert list(paths_of(ordinary_user.places).sandboxes.iterdir()) == []


async def test_what_a_killed_keepers_plain_processes_leave_is_found(places: Places) -> None:
    """Without isolation orphans survive; the next keeper ends them."""
    pids = await killed_keeper([sys.executable, KEEPER, "process", "2"])
    removed = await asyncio.to_thread(clean_leftovers, paths_of(places))
    assert any("process" in line for line in removed)
    await gone(pids)
    assert list(paths_of(places).sandboxes.iterdir()) == []


@pytest.mark.bubblewrap
async def test_what_a_living_keeper_has_is_no_leftover(places: Places) -> None:
    """Cleaning for one user's directories leaves other keepers' sandboxes alone."""
    subject = subject_of(places)
    async with subject.box() as box:
        removed = await asyncio.to_thread(clean_leftovers, paths_of(places))
        assert not [line for line in removed if box.directory.name in line]
        assert await box.says("echo alive") == "alive"


@pytest.mark.bubblewrap
@pytest.mark.parametrize("way", ["bubblewrap", "started"])
async def test_a_keeper_killed_while_it_makes_a_sandbox_takes_that_along(places: Places, way: str) -> None:
    """Also bubblewrap's inner process, which the death of the outer one does not reach yet."""
    await keeper_killed_at_a_start(places, [sys.executable, KEEPER, way, "1"], os.environ)


@pytest.mark.user
@pytest.mark.parametrize("way", ["bubblewrap", "started"])
async def test_an_ordinary_users_does_so_too(ordinary_user: OrdinaryUser, way: str) -> None:
    """Without control groups."""
    argv = ordinary_user.argv(sys.executable, KEEPER, way, "1")
    await keeper_killed_at_a_start(ordinary_user.places, argv, ordinary_user.env)


@pytest.mark.bubblewrap
async def test_a_killed_bubblewrap_takes_the_sandbox_along(places: Places) -> None:
    """Its end is told, and stop cleans up as after any other."""
    subject = subject_of(places)
    place = subject.place()
    instance = await subject.create(place=place)
    pids = instance.processes()
    os.kill(pids[0], signal.SIGKILL)
    ended = await asyncio.wait_for(instance.wait(), GONE_S)
    assert ended.exit_code == 137
    await gone(pids)
    await instance.stop()
    subject.nothing_is_left(*place)
