"""The queue of a fan-out, on ranks that end, do not start, or cannot be sent what they need."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from warmcell.sandbox.guest.magics.api import KeeperError
from warmcell.sandbox.guest.magics.fanout import TRIES, FanOut, Task
from warmcell.sandbox.guest.magics.run import Event, Inbox, Run
from warmcell.sandbox.guest.magics.sending import Load
from warmcell.sandbox.guest.values import CannotTravelError

Answer = Callable[[int, str], Mapping[str, Any] | BaseException]


class Ranks:
    """Ranks that answer at once what the test says: values, or how they end."""

    def __init__(self, ranks: int, answer: Answer, *, replaced: bool) -> None:
        self.ranks, self.replaced, self._answer = ranks, replaced, answer
        self.place, self.devices, self.gpus_each = "here", ["CPU"] * ranks, 0
        self.store = SimpleNamespace(sent=0, lose=lambda rank: None, missed=lambda rank, names: None)
        self.begun: list[tuple[int, str]] = []
        self.lost = False

    def run(self, head: Mapping[str, Any], body: bytes, inbox: Inbox) -> Run:
        rank, code = head["rank"], head["code"]

        def begin() -> None:
            self.begun.append((rank, code))
            told = self._answer(rank, code)
            if isinstance(told, BaseException):
                inbox.put(Event(run, error=told))
            else:
                run.values = dict(told)
                inbox.put(Event(run, done={"status": "ok"}))

        told = {"rank": rank, "task": -1, "values": {}, "size": 0, "got": 0, "begun": True}
        run = cast(Any, SimpleNamespace(**told, begin=begin, close=lambda: None))
        return cast(Run, run)

    def interrupt(self, rank: int) -> None:
        """Nothing of it lasts."""

    def lose(self) -> None:
        self.lost = True


class Parcel:
    """What ranks are sent: nothing, unless that is refused."""

    def load(self, rank: int, extra: Mapping[str, Any]) -> Load:
        if "refused" in extra:
            raise extra["refused"]
        return Load(None, b"", {})

    def loaded(self, rank: int, load: Load) -> None:
        """It is."""


class Nobody:
    """Who shows nothing."""

    def begin(self, *_: object) -> None: ...

    def message(self, *_: object) -> None: ...

    def end(self, *_: object) -> None: ...

    def tick(self) -> None: ...


def run(ranks: Ranks, tasks: Sequence[Task], **options: Any) -> list[Mapping[str, Any]]:
    return FanOut(cast(Any, ranks), tasks, parcel=Parcel(), **options).run(Nobody())


def items(count: int) -> list[Task]:
    return [Task(str(number), {}) for number in range(count)]


def died(code: str = "sandbox_died") -> KeeperError:
    return KeeperError("Rank 1 ended", code=code)


@pytest.mark.parametrize("code", ["sandbox_died", "sandbox_start"])
def test_an_item_is_begun_again_whose_rank_ends_or_does_not_start(code: str) -> None:
    """On that rank's next kernel, and not for ever."""
    deaths = {"1": TRIES - 1}

    def answer(rank: int, item: str) -> Mapping[str, Any] | BaseException:
        deaths[item] = deaths.get(item, 0) - 1
        return died(code) if deaths[item] >= 0 else {"x": item}

    ranks = Ranks(2, answer, replaced=True)
    assert [one["x"] for one in run(ranks, items(4), retry=True)] == ["0", "1", "2", "3"]
    assert not ranks.lost
    deaths["1"] = TRIES
    with pytest.raises(KeeperError, match="Rank 1 ended"):
        run(Ranks(2, answer, replaced=True), items(4), retry=True)


def test_items_of_a_rank_that_is_not_replaced_go_to_others() -> None:
    """It is given nothing more; when no rank is left, its error is the cell's."""
    ranks = Ranks(3, lambda rank, item: died() if rank == 1 else {"x": item}, replaced=False)
    assert [one["x"] for one in run(ranks, items(6), retry=True)] == [str(number) for number in range(6)]
    assert [rank for rank, _ in ranks.begun].count(1) == 1
    with pytest.raises(KeeperError, match="Rank 1 ended"):
        run(Ranks(2, lambda rank, item: died(), replaced=False), items(6), retry=True)


@pytest.mark.parametrize("error", [CannotTravelError("item is a lock"), KeeperError("No room", code="capacity")])
def test_what_cannot_be_sent_stops_the_cell_and_loses_no_rank(error: Exception) -> None:
    """Where tasks are apart, it is that one's failure alone, and those after it are still begun."""
    tasks = [Task("a", {}), Task("b", {"refused": error}), Task("c", {})]
    ranks = Ranks(1, lambda rank, item: {"x": item}, replaced=True)
    with pytest.raises(type(error), match=str(error)):
        run(ranks, tasks)
    failed: list[int] = []
    apart = FanOut(cast(Any, ranks), tasks, parcel=Parcel(), together=False)
    apart.on_error = lambda number, error: failed.append(number)
    assert apart.run(Nobody()) == [{"x": "a"}, {}, {"x": "c"}]
    assert failed == [1]
    assert not ranks.lost


@pytest.mark.parametrize("error", [CannotTravelError("needs a module"), KeeperError("Late", code="timeout")])
def test_what_cannot_come_back_or_was_late_loses_no_rank(error: Exception) -> None:
    """The kernel is as it was; one of which nothing is known is lost."""
    ranks = Ranks(1, lambda rank, item: error, replaced=True)
    with pytest.raises(type(error)):
        run(ranks, items(1))
    assert not ranks.lost
    unknown = Ranks(1, lambda rank, item: KeeperError("?", code="unreachable"), replaced=True)
    with pytest.raises(KeeperError):
        run(unknown, items(1))
    assert unknown.lost


def test_what_comes_back_is_told_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all ranks together, to its end; and what comes later is counted anew."""
    ranks = Ranks(2, lambda rank, item: {"x": item}, replaced=True)
    told: list[tuple[int, int]] = []
    fan_out = FanOut(cast(Any, ranks), [], parcel=Parcel(), progress=lambda got, total: told.append((got, total)))
    first, second, third = (ranks.run({"rank": rank, "code": ""}, b"", Inbox()) for rank in range(3))
    for running, got in (({}, 0), ({0: first}, 0), ({0: first, 1: second}, 30), ({1: second}, 100), ({}, 100)):
        fan_out._running = {rank: (run, None) for rank, run in running.items()}
        for run in running.values():
            run.size = 100
        first.got, second.got = got, got // 2 if running else 100
        fan_out._look_at_what_comes()
    third.size = 7
    fan_out._running = {0: (third, None)}
    fan_out._look_at_what_comes()
    assert told == [(0, 100), (45, 200), (150, 200), (200, 200), (0, 7)]
