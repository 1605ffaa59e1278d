"""Whatever comes: a parser gives a value, or refuses with its own error and a reason, in bounded memory."""

import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from warmcell.sandbox.errors import WarmcellError

SHORT: Final = 100
LONG: Final = 10_000
LENGTHS: Final = pytest.mark.parametrize(
    "examples",
    [
        pytest.param(SHORT, id="short"),
        # Some take a tenth of a second for each, beside other work.
        pytest.param(LONG, id="long", marks=[pytest.mark.long, pytest.mark.timeout(3600)]),
    ],
)
"""The two lengths of such a test: the same inputs each time, in a second; and many others (`--long`)."""

MEMORY_MAX: Final = 4 * 2**20
"""Of all that one input makes, beyond itself."""

Input = TypeVar("Input")


def give_anything(
    inputs: st.SearchStrategy[Input],
    read: Callable[[Input], object],
    *,
    refusals: type[Exception] | tuple[type[Exception], ...] = WarmcellError,
    examples: int = SHORT,
    memory_max: int = MEMORY_MAX,
    sound: Sequence[Input] = (),
    broken: Sequence[Input] = (),
) -> None:
    """Have `read` take so many inputs: nothing but `refusals` is raised, with a reason.

    What `read` asserts of its values is asserted of each; what is `sound` is understood, what is `broken` is refused.
    """
    for one in sound:
        read(one)
    for one in broken:
        with pytest.raises(refusals):
            read(one)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples == SHORT,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def each(one: Input) -> None:
        tracemalloc.start()
        try:
            read(one)
        except refusals as error:
            assert str(error)
            assert not isinstance(error, WarmcellError) or error.hint
        finally:
            taken = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert taken < memory_max, taken

    each()


LEAVES: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(("", "\0", "\ud800", "../..", "/etc/passwd", "a" * 5000, 2**70, -1, 0, 1e300, "aGk=", "0" * 5000)),
)
JSON: Final = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON, and what Python takes for JSON."""


def changed(*sound: dict[str, Any], names: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    """Objects like these, of which some fields, or such `names`, hold something else, and some are not there."""

    def alter(drawn: tuple[dict[str, Any], dict[str, Any], list[str]]) -> dict[str, Any]:
        one, others, missing = drawn
        return {name: value for name, value in {**one, **others}.items() if name not in missing}

    def about(one: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
        name = st.sampled_from((*one, *names, "other"))
        return st.tuples(st.just(one), st.dictionaries(name, JSON, max_size=2), st.lists(name, max_size=1)).map(alter)

    return st.one_of(*(st.one_of(st.just(one), about(one)) for one in sound))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """The data in pieces of these sizes, over and over."""
    found, at, turn = [], 0, 0
    while at < len(data):
        found.append(data[at : at + cuts[turn % len(cuts)]])
        at += cuts[turn % len(cuts)]
        turn += 1
    return found


CUTS: Final = st.lists(st.integers(1, 40), min_size=1, max_size=40)
