"""What commands and runs say: numbered, bounded, whole for those who read, and told where it is not."""

import asyncio
import json
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmcell.extension.keeper.agents import output as agent_output
from warmcell.extension.keeper.agents.output import Output, forget_oldest


async def read(output: Output, start: int = 0) -> list[dict[str, Any]]:
    """All entries until the end."""
    lines: list[bytes] = []
    async with aclosing(output.follow(start)) as pieces:
        async for piece in pieces:
            lines += piece.splitlines()
    return [json.loads(line) for line in lines]


async def test_who_follows_gets_every_entry_although_little_is_kept() -> None:
    """The writer waits for a reader that is attached; numbers have no gaps."""
    output = Output(kept_bytes=200)
    reading = asyncio.create_task(read(output))
    await asyncio.sleep(0)
    for number in range(100):
        await output.put({"stdout": str(number)})
    output.end()
    said = await reading
    assert [one["n"] for one in said] == list(range(100))
    assert [one["stdout"] for one in said] == [str(number) for number in range(100)]


async def test_what_nobody_reads_is_bounded_and_the_loss_is_told() -> None:
    """Without a reader the last entries stay; whoever comes later learns how many are missing."""
    output = Output(kept_bytes=1000)
    for number in range(1000):
        await output.put({"stdout": str(number)})
    output.end()
    said = await read(output)
    assert said[0] == {"lost": said[1]["n"]}
    assert 10 < len(said) < 100
    assert said[-1]["stdout"] == "999"


async def test_one_who_comes_back_misses_nothing() -> None:
    """From the number that was read last plus one it goes on."""
    output = Output()
    for number in range(10):
        await output.put({"stdout": str(number)})
    output.end()
    assert [one["n"] for one in await read(output, 7)] == [7, 8, 9]
    assert await read(output, 10) == []
    assert output.present(8)[1] == 10


@given(st.lists(st.binary(max_size=60), max_size=60), st.integers(0, 80), st.integers(80, 400))
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_always_the_newest_and_within_the_bound(
    pieces: list[bytes], start: int, kept_bytes: int
) -> None:
    """Whatever is written: what a late reader gets is a run of numbers up to the last, and no more than the bound."""

    async def work() -> None:
        output = Output(kept_bytes=kept_bytes)
        for piece in pieces:
            await output.put({"stdout": piece.hex()})
        output.end()
        said = await read(output, start)
        entries = [one for one in said if "n" in one]
        first = min(max(start, output.first), len(pieces))
        assert [one["n"] for one in entries] == list(range(first, len(pieces)))
        assert [one["stdout"] for one in entries] == [piece.hex() for piece in pieces[first:]]
        assert len(pieces) - output.first <= 1 or sum(len(json.dumps(one)) + 1 for one in entries) <= kept_bytes

    asyncio.run(work())


async def said(name: str, *, bytes_: int = 0, ended_at: float | None = None) -> SimpleNamespace:
    """Something that has said so much, and has ended at that time, if it has."""
    output = Output(kept_bytes=2 * bytes_ + 1000)
    await output.put({"stdout": "x" * bytes_})
    if ended_at is not None:
        output.end()
    return SimpleNamespace(id=name, output=output, ended_at=ended_at)


def whole(known: dict[str, SimpleNamespace]) -> list[str]:
    """Those whose output is kept."""
    return [name for name, one in known.items() if not one.output.forgotten]


async def test_what_has_ended_loses_its_output_by_number_and_by_size_and_stays_known() -> None:
    """What ended last keeps it, as does what runs, whatever it has said; of the others it is known how much."""
    runs = await said("runs", bytes_=15 * 2**20)
    known = {one.id: one for one in [runs, *[await said(f"n{n}", ended_at=n) for n in range(100)]]}
    forget_oldest(known)
    assert whole(known) == ["runs", *[f"n{number}" for number in range(36, 100)]]
    assert len(known) == 101
    assert await read(known["n0"].output) == [{"lost": 1}]
    large = {one.id: one for one in [await said(f"l{n}", bytes_=10 * 2**20, ended_at=n) for n in range(5)]}
    forget_oldest(large)
    assert whole(large) == ["l2", "l3", "l4"]
    late = {one.id: one for one in [await said(f"l{n}", bytes_=10 * 2**20, ended_at=-n) for n in range(5)]}
    forget_oldest(late)
    assert whole(late) == ["l0", "l1", "l2"], "what began first has ended last"


async def test_what_ended_last_is_kept_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who asks for it once gets it."""
    monkeypatch.setattr(agent_output, "ENDED_KEPT_BYTES", 100)
    known = {one.id: one for one in [await said(f"n{n}", bytes_=200, ended_at=n) for n in range(3)]}
    forget_oldest(known)
    assert whole(known) == ["n2"]


async def test_ids_are_remembered_for_long_and_not_for_ever() -> None:
    """A thousand of them."""
    known = {one.id: one for one in [await said(f"n{n}", ended_at=n) for n in range(1100)]}
    forget_oldest(known)
    assert list(known) == [f"n{number}" for number in range(100, 1100)]


async def test_who_follows_what_loses_its_output_has_all_of_it() -> None:
    """It is let go of, not taken from those who read it."""
    known = {one.id: one for one in [await said(f"n{n}", ended_at=n) for n in range(65)]}
    lines = known["n0"].output.follow()
    first = await anext(lines)
    forget_oldest(known)
    assert known["n0"].output.forgotten
    assert json.loads(first)["stdout"] == ""
    assert [line async for line in lines] == []


async def test_an_entry_that_is_too_large_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be in memory as a whole; what comes before and after it is kept."""
    monkeypatch.setattr(agent_output, "ENTRY_MAX_BYTES", 2**20)
    output = Output()
    await output.put({"msg_type": "stream", "content": {"name": "stdout", "text": "before"}, "metadata": {}})
    await output.put({"msg_type": "display_data", "content": {"data": {"text/html": "x" * 2**21}}, "metadata": {}})
    await output.put({"msg_type": "stream", "content": {"name": "stdout", "text": "after"}, "metadata": {}})
    output.end()
    entries = await read(output)
    assert [one["n"] for one in entries] == [0, 1, 2]
    texts = [(one["content"]["name"], one["content"]["text"]) for one in entries]
    assert (texts[0], texts[2]) == (("stdout", "before"), ("stdout", "after"))
    name, told = texts[1]
    assert name == "stderr"
    assert "display_data of 2 MiB is left out" in told
    assert output.size_bytes < 2000


async def test_one_who_waits_through_a_long_silence_misses_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever still takes the signs of life is one who reads, however long nothing else has come."""
    now = [1000.0]
    monkeypatch.setattr(agent_output, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(agent_output, "KEEPALIVE_S", 0.001)
    output = Output(kept_bytes=100)
    lines = output.follow()
    assert await anext(lines) == b"{}\n"
    now[0] += 10 * agent_output.STALLED_S
    assert await anext(lines) == b"{}\n"
    now[0] += agent_output.STALLED_S / 2
    await output.put({"stdout": "x" * 60})
    late = asyncio.create_task(output.put({"stdout": "y" * 60}))
    await asyncio.wait({late}, timeout=0.05)
    assert not late.done()
    told = await anext(lines) + await anext(lines)
    assert b"lost" not in told
    assert b"xxx" in told
    assert b"yyy" in told
    await late
    await lines.aclose()


async def test_whoever_is_about_to_follow_is_waited_for() -> None:
    """However long that takes; when they have gone it is deserted, and not before the last one has."""
    output = Output()
    assert output.deserted_since is not None
    with output.expecting():
        assert output.deserted_since is None
        lines = output.follow()
        await output.put({"a": 1})
        assert await anext(lines)
        await lines.aclose()
        assert output.deserted_since is None
    assert output.deserted_since is not None
