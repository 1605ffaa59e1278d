"""What is done for as long as the keeper lives."""

import asyncio
import logging

import pytest

from warmcell.extension.keeper import standing
from warmcell.extension.keeper.standing import begin_again


async def test_it_begins_again_after_an_accident_until_it_is_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each accident is logged; whoever ends by itself is not begun again."""
    monkeypatch.setattr(standing, "PAUSE_S", 0.001)
    begun = 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        await asyncio.sleep(0)
        if begun < 3:
            raise ValueError(f"accident {begun}")

    with caplog.at_level(logging.ERROR):
        await begin_again(work)
    assert begun == 3
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["accident 1", "accident 2"]


async def test_it_can_be_ended_at_its_work_and_in_its_pause() -> None:
    """At once, though the pause is long."""
    begun = asyncio.Event()

    async def breaks() -> None:
        begun.set()
        raise ValueError

    async def lasts() -> None:
        begun.set()
        await asyncio.Event().wait()

    for work in (breaks, lasts):
        begun.clear()
        task = asyncio.create_task(begin_again(work))
        await begun.wait()
        await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
