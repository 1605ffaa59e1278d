"""Whatever a request says, it is understood or refused with a word; nothing else is raised."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from warmcell.extension.keeper.agents import api, checks
from warmcell.extension.keeper.agents.commands import Command, size_of
from warmcell.extension.keeper.agents.files_told import cursor, place
from warmcell.extension.keeper.agents.runs import Run
from warmcell.sandbox.client.results import Showing
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import Terms

COMMAND = ("id", "argv", "cwd", "env", "stdin", "pty", "timeout_s", "tag", "input")
RUN = ("id", "code", "context", "timeout_s", "linger_s", "env")
SIZE = ("rows", "columns")
RIGHT: dict[str, Any] = {
    **{"argv": ["ls"], "code": "1", "id": "a1", "cwd": "/tmp", "env": {"A": "b"}, "tags": {"a": "b"}, "stdin": True},
    **{"pty": {"rows": 3, "columns": 4}, "timeout_s": 1.5, "linger_s": 0, "context": "default", "input": "aGk="},
    **{
        "merge_tags": {"c": "d", "a": None},
        "tag": "x",
        "on_timeout": "kill",
        "auto_resume": False,
        "rows": 3,
        "columns": 4,
    },
}


WRONG: dict[str, Any] = {"timeout_s": -1, "rows": "x"}


@LENGTHS
@pytest.mark.parametrize(
    ("read", "names"),
    [
        (Command, COMMAND),
        (Run, RUN),
        (api.terms_of, api.TERMS),
        (api.changes_of, api.TERMS),
        (lambda body: api.changes_of(body, Terms(tags={"a": "b"})), (*api.TERMS[:3], api.MERGE)),
        (size_of, SIZE),
    ],
)
def test_bodies_are_understood_or_refused(
    read: Callable[[dict[str, Any]], object], names: tuple[str, ...], examples: int
) -> None:
    """Each gives an object, or an error with a code and a cure."""

    def take(body: dict[str, Any]) -> None:
        made = read(body)
        if isinstance(made, Command | Run):
            json.dumps(made.info(), allow_nan=False)
        if isinstance(made, Terms):
            assert made.timeout_s is None or 0 < made.timeout_s < 1e10

    sound = {name: RIGHT[name] for name in names if name in RIGHT}
    give_anything(
        changed(sound, names=names),
        take,
        refusals=InvalidRequestError,
        examples=examples,
        sound=[sound],
        broken=[{**sound, **WRONG}],
    )


def test_tags_are_merged_or_replaced() -> None:
    """One word for each; both at once say nothing clear."""
    terms = Terms(tags={"kept": "1", "gone": "2", "changed": "3"})
    merge: dict[str, Any] = {"gone": None, "changed": "4", "new": "5", "never": None}
    assert api.changes_of({"merge_tags": merge}, terms)["tags"] == {"kept": "1", "changed": "4", "new": "5"}
    assert api.changes_of({"tags": {"new": "5"}}, terms)["tags"] == {"new": "5"}
    for wrong in ({"merge_tags": [1]}, {"merge_tags": {"a": 1}}, {"merge_tags": {}, "tags": {}}):
        with pytest.raises(InvalidRequestError):
            api.changes_of(wrong, terms)


@LENGTHS
def test_cursors_and_numbers_are_understood_or_refused(examples: int) -> None:
    """What comes in a query may be anything."""
    reads: list[Callable[[str], object]] = [api._place, lambda one: checks.number(one, "from", most=100), place]
    places = st.one_of(st.tuples(JSON, JSON).map(json.dumps), JSON.map(json.dumps), st.just("[" * 40_000)).map(cursor)
    texts = st.one_of(JSON.map(str), st.integers(0, 200).map(str), st.floats().map(str), st.text(max_size=9), places)
    inputs = st.tuples(st.sampled_from(reads), texts)
    give_anything(
        inputs,
        lambda drawn: drawn[0](drawn[1]),
        refusals=InvalidRequestError,
        examples=examples,
        sound=[(reads[1], "7"), (reads[0], cursor('[1.5, "a"]')), (reads[2], cursor("/a"))],
        broken=[(reads[1], "nan"), *((reads[0], cursor(text)) for text in ("x", "[" * 40_000, f"[{10**400}, 1]"))],
    )


def test_entries_that_a_client_does_not_know_are_passed_over() -> None:
    """A keeper of another version breaks no client."""
    showing = Showing()
    assert showing.take({"n": 1, "msg_type": "of_the_future", "content": {"x": 1}}) is None
    assert showing.take({"lost": 3}) is None
    assert showing.execution({"status": "of the future"}).error is None
