"""What was looked up a moment ago counts for a moment, and no longer."""

import pytest

from warmcell.sandbox.backends import lately as module
from warmcell.sandbox.backends.lately import KEPT_MAX, LATELY_S, lately


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one item is what the time is."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_an_answer_counts_for_a_moment(clock: list[float]) -> None:
    """For the same question only; then it is looked up again."""
    asked: list[tuple[str, bool]] = []

    @lately
    def look(what: str, *, all: bool = False) -> str:
        asked.append((what, all))
        return f"{what} {len(asked)}"

    assert [look("a"), look("a"), look("b"), look("a", all=True)] == ["a 1", "a 1", "b 2", "a 3"]
    clock[0] += LATELY_S / 2
    assert look("a") == "a 1"
    clock[0] += LATELY_S / 2
    assert look("a") == "a 4"


def test_what_fails_is_looked_up_again(clock: list[float]) -> None:
    """At once: what was missing may be there by now."""
    there: list[str] = []

    @lately
    def look() -> str:
        return there[0]

    with pytest.raises(IndexError):
        look()
    there.append("found")
    assert look() == "found"


def test_many_questions_take_bounded_memory(clock: list[float]) -> None:
    """However many are asked within the moment, few answers are kept, and each is right."""
    asked: list[int] = []

    @lately
    def look(number: int) -> int:
        asked.append(number)
        return -number

    assert [look(number) for number in range(3 * KEPT_MAX)] == [-number for number in range(3 * KEPT_MAX)]
    look(0)
    assert asked[-1] == 0
