"""Requests with a key: done once for whoever asks again, and nobody's keys are in another's way."""

import asyncio
from types import SimpleNamespace

import pytest

from warmcell.extension.keeper.agents import once as agent_once
from warmcell.extension.keeper.agents.once import Once
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    CapacityError,
    ConflictError,
    InvalidRequestError,
    NoGpuAvailableError,
    QuotaExceededError,
    SandboxStartError,
    WarmcellError,
)


class Work:
    """Counts how often it was done; `fails` are what the first times end with."""

    def __init__(self, *fails: WarmcellError) -> None:
        self.calls, self._fails = 0, fails

    async def __call__(self) -> int:
        self.calls += 1
        await asyncio.sleep(0)
        if self.calls <= len(self._fails):
            raise self._fails[self.calls - 1]
        return self.calls


async def test_a_key_has_its_work_done_once() -> None:
    """Requests with one key share one piece of work, at the same time and later; its failure is shared too."""
    once, calls = Once(), []

    async def work() -> int:
        calls.append(1)
        await asyncio.sleep(0.01)
        return len(calls)

    asked = [once.do("", "POST /x", "k", b"{}", work) for _ in range(5)]
    assert await asyncio.gather(*asked) == [1] * 5
    assert await once.do("", "POST /x", "k", b"{}", work) == 1
    assert await once.do("ann", "POST /x", "k", b"{}", work) == 2
    with pytest.raises(ConflictError):
        await once.do("", "POST /x", "k", b'{"other": 1}', work)
    with pytest.raises(InvalidRequestError):
        await once.do("", "POST /x", "no key", b"", work)
    await once.close()


async def test_work_goes_on_when_the_first_who_asked_goes_away() -> None:
    """A cancelled caller cancels nothing for the one that asks again."""
    once, go_on, calls = Once(), asyncio.Event(), []

    async def work() -> str:
        calls.append(1)
        await go_on.wait()
        return "done"

    first = asyncio.create_task(once.do("", "POST /x", "k", b"", work))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    go_on.set()
    assert await once.do("", "POST /x", "k", b"", work) == "done"
    assert calls == [1]
    await once.close()


async def test_what_nobody_waits_for_any_more_is_given_up() -> None:
    """Not at once, as whoever has lost a connection asks again; then it ends, and the next request begins anew."""
    once, ended, calls = Once(), asyncio.Event(), []

    async def work() -> str:
        calls.append(1)
        if len(calls) > 1:
            return "done"
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
            await asyncio.sleep(0.05)  # It ends while somebody asks anew.
        raise AssertionError

    def ask(given_up_s: float) -> "asyncio.Task[str]":
        return asyncio.create_task(once.do("", "POST /x", "k", b"", work, given_up_s=given_up_s))

    async def leave(*those: "asyncio.Task[str]") -> None:
        for one in those:
            one.cancel()
        await asyncio.gather(*those, return_exceptions=True)

    first, second = ask(0.05), ask(0.05)
    await asyncio.sleep(0)
    await leave(first)
    await asyncio.sleep(0.1)
    assert not ended.is_set(), "one waits still"
    await leave(second)
    again = ask(0.05)
    await asyncio.sleep(0.1)
    assert not ended.is_set(), "one is back"
    await leave(again)
    async with asyncio.timeout(10):
        await ended.wait()
        assert await ask(0.05) == "done"
    assert calls == [1, 1]
    await once.close()


async def test_who_uses_many_keys_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each caller has room of its own, in which the oldest answer makes place for the newest."""
    monkeypatch.setattr(agent_once, "KEPT_MAX", 3)
    once, work = Once(), Work()
    for number in range(10):
        assert await once.do("mallory", "POST /x", f"k{number}", b"", work) == number + 1
    assert await once.do("ann", "POST /x", "k", b"", work) == 11
    assert [await once.do("mallory", "POST /x", f"k{number}", b"", work) for number in (7, 8, 9)] == [8, 9, 10]
    assert await once.do("mallory", "POST /x", "k6", b"", work) == 12
    await once.close()


async def test_what_is_under_way_is_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has no room left but for what is under way is refused, until some of that is answered."""
    monkeypatch.setattr(agent_once, "KEPT_MAX", 2)
    once, go_on, work = Once(), asyncio.Event(), Work()

    async def long() -> str:
        await go_on.wait()
        return "done"

    asked = [asyncio.create_task(once.do("ann", "POST /x", key, b"", long)) for key in ("a", "b")]
    await asyncio.sleep(0)
    with pytest.raises(CapacityError):
        await once.do("ann", "POST /x", "c", b"", work)
    assert await once.do("bob", "POST /x", "c", b"", work) == 1
    go_on.set()
    assert await asyncio.gather(*asked) == ["done", "done"]
    assert await once.do("ann", "POST /x", "c", b"", work) == 2
    await once.close()


@pytest.mark.parametrize("kind", [NoGpuAvailableError, QuotaExceededError, CapacityError, BackendUnavailableError])
async def test_an_answer_to_ask_again_is_not_repeated_from_memory(kind: type[WarmcellError]) -> None:
    """Those who wait together get it; whoever asks then, with the same key, gets what is there by then."""
    once, work = Once(), Work(kind("none is free"))
    waited = [once.do("", "POST /x", "k", b"", work) for _ in range(3)]
    assert [type(one) for one in await asyncio.gather(*waited, return_exceptions=True)] == [kind] * 3
    assert await once.do("", "POST /x", "k", b"", work) == 2
    assert await once.do("", "POST /x", "k", b"", work) == 2
    await once.close()


async def test_any_other_failure_stays_the_answer() -> None:
    """It may have had effects, so it is not done again."""
    once, work = Once(), Work(SandboxStartError("it broke"))
    for _ in range(2):
        with pytest.raises(SandboxStartError):
            await once.do("", "POST /x", "k", b"", work)
    assert work.calls == 1
    await once.close()


async def test_an_answer_is_remembered_for_ten_minutes_from_when_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the work has taken."""
    now = [1000.0]
    monkeypatch.setattr(agent_once, "time", SimpleNamespace(monotonic=lambda: now[0]))
    once, go_on, work = Once(), asyncio.Event(), Work()

    async def long() -> int:
        await go_on.wait()
        return await work()

    asked = asyncio.create_task(once.do("", "POST /x", "k", b"", long))
    await asyncio.sleep(0)
    now[0] += 2 * agent_once.KEPT_S
    go_on.set()
    assert await asked == 1
    assert await once.do("", "POST /x", "k", b"", work) == 1
    now[0] += agent_once.KEPT_S + 1
    assert await once.do("", "POST /x", "k", b"", work) == 2
    await once.close()
