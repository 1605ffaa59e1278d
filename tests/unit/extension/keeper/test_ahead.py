"""What a kernel publishes of a cell that nobody takes: bounded, in order, and with its end."""

import asyncio
from typing import Any

from warmcell.extension.keeper.agents.ahead import AHEAD_MAX_BYTES, OVERHEAD_BYTES, Ahead

MIB = 2**20


def message(kind: str, **content: Any) -> dict[str, Any]:
    return {"msg_type": kind, "content": content, "metadata": {}}


async def everything(ahead: Ahead) -> list[dict[str, Any]]:
    """What is there, without waiting for more."""
    found = []
    try:
        while True:
            async with asyncio.timeout(0.05):
                found.append(await ahead.take())
    except TimeoutError:
        return found


async def test_past_the_bound_output_is_lost_and_told_and_the_end_comes() -> None:
    """What was there is in order; how much is missing stands where it is missing."""
    ahead = Ahead()
    for number in range(40):
        ahead.add(message("stream", name="stdout", text=str(number)), MIB)
    assert (ahead.full, ahead.losing) == (True, True)
    ahead.add(message("execute_reply", status="ok"), 100)
    ahead.add(message("status", execution_state="idle"), 100)
    found = await everything(ahead)
    kept = [one["content"]["text"] for one in found if one["content"].get("name") == "stdout"]
    assert kept == [str(number) for number in range(len(kept))]
    assert len(kept) == -(-AHEAD_MAX_BYTES // (MIB + OVERHEAD_BYTES))
    assert [one["msg_type"] for one in found[len(kept) :]] == ["stream", "execute_reply", "status"]
    assert f"{40 - len(kept)} pieces" in found[len(kept)]["content"]["text"]
    assert (ahead.full, ahead.losing) == (False, False)


async def test_room_comes_when_half_was_taken() -> None:
    """Who adds waits for that; a follower that goes away makes room, too."""
    ahead = Ahead()
    while not ahead.full:
        ahead.add(message("stream", name="stdout", text="x"), MIB)
    assert not await ahead.room(0.01)
    waiting = asyncio.create_task(ahead.room(60))
    for _ in range(AHEAD_MAX_BYTES // MIB // 2 + 1):
        await ahead.take()
    assert await waiting
    while not ahead.full:
        ahead.add(message("stream", name="stdout", text="x"), MIB)
    waiting = asyncio.create_task(ahead.room(60))
    ahead.close()
    assert await waiting
    ahead.add(message("stream", name="stdout", text="x"), MIB)
    assert await everything(ahead) == []


async def test_no_word_of_the_end_is_a_way_past_the_bound() -> None:
    """Code in the sandbox may say so as often, and with as much in it, as it likes."""
    ahead = Ahead()
    while not ahead.full:
        ahead.add(message("stream", name="stdout", text="x"), MIB)
    for kind in ("status", "execute_reply", "status"):
        for _ in range(100):
            ahead.add(message(kind, execution_state="idle", padding="x" * 1000), 1000)
    ahead.add(message("status", execution_state="busy", padding="x" * 1000), 1000)
    ahead.add({"msg_type": "status", "content": [], "metadata": {}}, 1000)
    ends = [one for one in await everything(ahead) if one["msg_type"] != "stream"]
    assert [one["msg_type"] for one in ends] == ["status", "execute_reply"]
    assert ends[0]["content"] == {"execution_state": "idle"}
