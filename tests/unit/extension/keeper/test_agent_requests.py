"""Whatever a request says, it is understood or refused with a word; nothing else is raised."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from warmcell.extension.keeper.agents import api, checks
from warmcell.extension.keeper.agents.commands import Command, size_of
from warmcell.extension.keeper.agents.runs import Run
from warmcell.sandbox.client.results import Showing
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import Terms

COMMAND = ("id", "argv", "cwd", "env", "stdin", "pty", "timeout_s", "tag", "input")
RUN = ("id", "code", "context", "timeout_s", "linger_s", "env")
SIZE = ("rows", "columns")
EACH = 2000

LEAVES = (None, True, False, 0, -1, 1.5, 1e300, -math.inf, math.nan, 2**70, "", "a", "\0", "\ud800", "x=1", "é" * 300)
LEAVES = (*LEAVES, "default", "kill", "suspend", "aGk=", "ls")


def anything(chance: random.Random, depth: int = 3) -> Any:
    """Any JSON, and what Python takes for JSON."""
    kind = chance.random()
    if depth and kind < 0.15:
        return [anything(chance, depth - 1) for _ in range(chance.randrange(4))]
    if depth and kind < 0.3:
        return {str(anything(chance, 0)): anything(chance, depth - 1) for _ in range(chance.randrange(4))}
    if kind < 0.4:
        return "".join(chr(chance.randrange(1, 0x3000)) for _ in range(chance.randrange(30)))
    return chance.choice(LEAVES)


RIGHT: dict[str, Any] = {
    **{"argv": ["ls"], "code": "1", "id": "a1", "cwd": "/tmp", "env": {"A": "b"}, "tags": {"a": "b"}, "stdin": True},
    **{"pty": {"rows": 3, "columns": 4}, "timeout_s": 1.5, "linger_s": 0, "context": "default", "input": "aGk="},
    **{"tag": "x", "on_timeout": "kill", "auto_resume": False, "rows": 3, "columns": 4},
}


def bodies(*names: str) -> list[dict[str, Any]]:
    """Bodies with these fields, two of three with what they mean; each time the same."""
    chance = random.Random("requests")
    made = []
    for _ in range(EACH):
        some = chance.sample(names, chance.randrange(len(names) + 1))
        made.append({name: RIGHT.get(name) if chance.random() < 0.7 else anything(chance) for name in some})
    return made


@pytest.mark.parametrize(
    ("read", "names"),
    [(Command, COMMAND), (Run, RUN), (api.terms_of, api.TERMS), (api.changes_of, api.TERMS), (size_of, SIZE)],
)
def test_bodies_are_understood_or_refused(read: Callable[[dict[str, Any]], object], names: tuple[str, ...]) -> None:
    """10,000 bodies in all: each gives an object, or an error with a code and a cure; both come."""
    understood = 0
    for body in bodies(*names, "other"):
        try:
            made = read(body)
        except WarmcellError as error:
            assert error.code == "invalid_request", body
            assert error.hint
            continue
        understood += 1
        if isinstance(made, Command | Run):
            json.dumps(made.info())
        if isinstance(made, Terms):
            assert made.timeout_s is None or 0 < made.timeout_s < 1e10
    assert 0 < understood < EACH


def test_cursors_and_numbers_are_understood_or_refused() -> None:
    """What comes in a query may be anything."""
    chance = random.Random("queries")
    for _ in range(EACH):
        text = str(anything(chance))
        for read in (api._place, lambda one: checks.number(one, "from", most=100)):
            try:
                read(text)
            except WarmcellError as error:
                assert error.code == "invalid_request"


def test_entries_that_a_client_does_not_know_are_passed_over() -> None:
    """A keeper of another version breaks no client."""
    showing = Showing()
    assert showing.take({"n": 1, "msg_type": "of_the_future", "content": {"x": 1}}) is None
    assert showing.take({"lost": 3}) is None
    assert showing.execution({"status": "of the future"}).error is None
