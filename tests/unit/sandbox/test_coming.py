"""A snapshot in the making, as those see it who wait for it."""

import asyncio
import os
from pathlib import Path

import pytest

from warmcell.sandbox.coming import Coming
from warmcell.sandbox.ids import known_sandbox_id, new_sandbox_id, new_snapshot_id


async def test_files_are_found_under_one_name_while_they_move(tmp_path: Path) -> None:
    """Who was told of them before the snapshot had its name finds them afterwards."""
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "file").write_text("saved")
    coming = Coming()
    waiting = asyncio.create_task(coming.layer())
    assert not coming.has_files
    coming.files_are(tmp_path / "draft")
    (tmp_path / "draft").rename(tmp_path / "snapshot")
    layer = await waiting
    assert layer is not None
    assert (layer / "file").read_text() == "saved"
    assert not coming.stale
    coming.close()
    assert not layer.exists()


async def test_files_that_are_saved_again_make_the_first_stale(tmp_path: Path) -> None:
    """Sandboxes that are made with the first ones are told before these are removed."""
    coming = Coming()
    coming.files_go()
    assert not coming.stale
    coming.files_are(tmp_path)
    coming.files_go()
    assert coming.stale
    coming.files_are(tmp_path)
    assert coming.stale
    coming.close()


async def test_one_without_files_of_its_own_comes_at_once() -> None:
    """An engine that does not tell when the kernel stands still makes nobody wait for ever."""
    coming = Coming()
    snapshot = new_snapshot_id()
    coming.is_there(snapshot)
    assert await coming.layer() is None
    assert await coming.snapshot() == snapshot
    coming.close()


async def test_who_waits_for_what_never_comes_is_let_go() -> None:
    """And no descriptor is left."""
    before = len(os.listdir("/proc/self/fd"))
    coming = Coming()
    waiting = [asyncio.create_task(coming.layer()), asyncio.create_task(coming.snapshot())]
    await asyncio.sleep(0)
    coming.close()
    coming.close()
    for each in waiting:
        with pytest.raises(asyncio.CancelledError):
            await each
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_id_that_was_read_is_one_or_nothing() -> None:
    """What else stands there, a line break say, becomes no part of a sandbox's files."""
    known = new_sandbox_id()
    assert known_sandbox_id(known) == known
    for other in ("", "a" * 11, "a" * 13, "a" * 11 + "\n", "A" * 12, "../../../../"):
        assert known_sandbox_id(other) is None
