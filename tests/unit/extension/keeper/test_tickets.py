"""Tickets: good for one request until their time is over, and for nothing that was changed in them."""

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, give_anything
from warmcell.extension.keeper.principals import Principal, Principals
from warmcell.extension.keeper.tickets import SKEW_S, Ticket, Tickets
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    ForbiddenError,
    InvalidRequestError,
    UnauthenticatedError,
)

ANN = Principal("ann", frozenset({"run"}), "1")
FILES = "/sandboxes/x1/files"


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """At 1000 s."""
    return Clock()


@pytest.fixture
def principals(tmp_path: Path, clock: Clock) -> Principals:
    """Nobody yet."""
    return Principals(tmp_path / "principals.json", now=clock)


@pytest.fixture
def tickets(tmp_path: Path, principals: Principals, clock: Clock) -> Tickets:
    """Of a keeper that has made none."""
    return Tickets(tmp_path / "key", principals, now=clock)


def test_a_ticket_is_good_until_its_time_is_over(tickets: Tickets, clock: Clock) -> None:
    """To the second; and not before it was made, but for what clocks may differ."""
    text, made = tickets.make(None, "GET", FILES, file="a", expires_in_s=60)
    assert tickets.read(text) == made
    for now, fits in ((1059.9, True), (1060.0, False), (1000 - SKEW_S, True), (999.9 - SKEW_S, False)):
        clock.now = now
        if fits:
            assert tickets.read(text).expires_at == 1060.0
        else:
            with pytest.raises(UnauthenticatedError, match=r"is over|from the future"):
                tickets.read(text)


def test_a_ticket_holds_as_long_as_its_token(
    tickets: Tickets, principals: Principals, tmp_path: Path, clock: Clock
) -> None:
    """Revoked, expired, or its principal removed; another keeper's with the same key knows it, one with another not."""
    info, token = principals.create("ann", expires_in_s=50)
    text, _ = tickets.make(principals.find(token), "GET", FILES)
    named, _ = tickets.make(Principal("ann", frozenset()), "GET", FILES)
    assert Tickets(tmp_path / "key", principals, now=clock).read(text).token_id == info.id
    with pytest.raises(UnauthenticatedError, match="not signed"):
        Tickets(tmp_path / "other", principals, now=clock).read(text)
    clock.now = 1050.0
    with pytest.raises(UnauthenticatedError, match="token"):
        tickets.read(text)
    clock.now = 1000.0
    principals.revoke(info.id)
    with pytest.raises(UnauthenticatedError, match="token"):
        tickets.read(text)
    assert tickets.read(named).principal == "ann"
    principals.remove("ann")
    with pytest.raises(UnauthenticatedError, match="token"):
        tickets.read(named)


@LENGTHS
def test_whatever_is_shown_in_its_place_is_refused(examples: int) -> None:
    """Junk, and tickets of which a part is another: with one error, and no accident."""
    text, _ = KEYED.make(None, "GET", FILES, file="a")
    said, _, proof = text.partition(".")
    part = st.text(max_size=30) | st.binary(max_size=60).map(lambda data: base64.urlsafe_b64encode(data).decode())
    shown = st.tuples(st.sampled_from((said, "")) | part, st.sampled_from((proof, "")) | part).map(".".join)
    inputs = (st.text() | part | shown | JSON.map(str)).filter(lambda one: one != text)
    give_anything(
        inputs, KEYED.read, refusals=UnauthenticatedError, examples=examples, sound=[text], broken=[text + "a"]
    )


@given(st.data())
def test_no_character_of_a_ticket_can_be_another(data: st.DataObject) -> None:
    """Also none that would be read as the same bytes."""
    text, _ = KEYED.make(None, "GET", FILES, file="a")
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(min_codepoint=33, max_codepoint=126).filter(lambda one: one != text[at]))
    with pytest.raises(UnauthenticatedError):
        KEYED.read(text[:at] + other + text[at + 1 :])


def test_a_ticket_is_for_one_request() -> None:
    """The method, the path, and a query that has that file and nothing else; the ticket itself may be in it."""
    ticket = Ticket(method="GET", path=FILES, file="a b", made_at=0, expires_at=1)
    ticket.check("GET", FILES, {"path": ["a b"], "ticket": ["…"]})
    for method, path, query in (
        ("PUT", FILES, {"path": ["a b"]}),
        ("GET", f"{FILES}/tree", {"path": ["a b"]}),
        ("GET", FILES.replace("x1", "x2"), {"path": ["a b"]}),
        ("GET", FILES, {"path": ["a"]}),
        ("GET", FILES, {"path": ["a b", "a b"]}),
        ("GET", FILES, {"path": ["a b"], "mode": ["1"]}),
        ("GET", FILES, {}),
    ):
        with pytest.raises(ForbiddenError):
            ticket.check(method, path, query)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 8 * 86400.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(tickets: Tickets, seconds: float) -> None:
    """Too long, none at all, or no number."""
    with pytest.raises(InvalidRequestError):
        tickets.make(ANN, "GET", FILES, expires_in_s=seconds)


def test_a_damaged_key_signs_nothing(tickets: Tickets, tmp_path: Path) -> None:
    """It is named; no other key is made in its place, with which old URLs would fail without a word."""
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(BackendUnavailableError, match="key is damaged"):
        tickets.make(None, "GET", FILES)


def test_a_ticket_tells_no_secret(tickets: Tickets, principals: Principals) -> None:
    """What it says in plain is what it opens, and the name of the token."""
    info, token = principals.create("ann")
    text, _ = tickets.make(principals.find(token), "GET", FILES, file="a")
    said = text.partition(".")[0]
    shown = json.loads(base64.urlsafe_b64decode(said + "=" * (-len(said) % 4)))
    assert shown["token_id"] == info.id
    assert token not in json.dumps(shown)


KEYED = Tickets(Path("/nonexistent"), Principals(Path("/nonexistent")), now=lambda: 1000.0)
KEYED._key = b"k" * 32
