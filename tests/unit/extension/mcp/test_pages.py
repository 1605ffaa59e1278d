"""Pages of output: whatever the cuts, one after another they are what was said."""

import base64
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcp_types import TextContent

from tests.anything import LENGTHS, give_anything
from warmcell.extension.mcp import pages, work
from warmcell.extension.mcp.pages import Page
from warmcell.sandbox.client.wanted import size
from warmcell.sandbox.errors import InvalidRequestError


def entries_of(text: str, cuts: list[int]) -> list[dict[str, Any]]:
    """A text as a command says it, cut at any bytes."""
    data = text.encode()
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = [data[start:end] for start, end in itertools.pairwise(places)]
    return [{"n": n, "stdout": base64.b64encode(piece).decode()} for n, piece in enumerate(pieces)]


def text_of(page: Page) -> str:
    """What it shows."""
    blocks = page.content()
    assert all(isinstance(block, TextContent) for block in blocks)
    return "".join(block.text for block in blocks if isinstance(block, TextContent))


@given(st.text(max_size=60), st.lists(st.integers(0, 300), max_size=12), st.integers(1, 20), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_pages_one_after_another_are_the_text(text: str, cuts: list[int], room: int, at_a_time: int) -> None:
    """Entries end in the middle of characters, pages between and within entries, and nothing is lost by either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "TEXT_MAX", room)
        entries, shown, after = entries_of(text, cuts), "", ""
        while True:
            page = Page(after)
            there = entries[page.entry :][:at_a_time]  # as a follower finds them who asks while they come
            for entry in there:
                page.take(entry)
            shown += text_of(page)
            if not there:
                break
            assert page.next != after
            after = page.next
        assert shown == text


def test_a_page_after_some_that_are_lost_begins_anew() -> None:
    """Half a character of what came before says nothing about it."""
    page = Page("0~e2-")
    page.take({"lost": 5})
    page.take({"n": 5, "stdout": base64.b64encode(b"ok").decode()})
    assert text_of(page).endswith("ok")
    assert page.next == "6"


@pytest.mark.parametrize("place", ["x", "1.", "1~", "1~e-", "1~e2", "1~-e2e2e2e2", "~-", "-1", "1.2.3", "\u0661"])
def test_what_is_no_place_is_refused(place: str) -> None:
    """Also what only looks like digits."""
    with pytest.raises(InvalidRequestError):
        Page(place)


@LENGTHS
def test_whatever_a_model_makes_up_is_understood_or_refused(examples: int) -> None:
    """Places in output, handles, ids of sandboxes and sizes: never a path that leads elsewhere."""

    def read(drawn: tuple[str, str]) -> None:
        kind, text = drawn
        if kind == "place":
            made = Page(text)
            assert Page(made.next).next == made.next
        elif kind == "size":
            assert size(text) is None or 0 <= (size(text) or 0) < 2**63
        else:
            path = work.box(text) if kind == "box" else work.place("box1", text)
            steps = path.split("/")
            assert len(steps) == (3 if kind == "box" else 5)
            assert all(step.isascii() and step.isalnum() for step in steps[1:])

    near = st.from_regex(
        r"(run|cmd)-[0-9a-z./%?]{0,9}|[0-9]{0,14}(\.[0-9]{1,3})?(~[0-9a-f-]{1,14})?|[0-9.]{1,9} ?[KMGT]?i?B?"
    )
    give_anything(
        st.tuples(st.sampled_from(("place", "handle", "box", "size")), st.one_of(near, st.text(max_size=20))),
        read,
        refusals=InvalidRequestError,
        examples=examples,
        sound=[("place", "3.2~c3-"), ("handle", "run-0f"), ("box", "a1"), ("size", "2GiB"), ("size", "512MiB")],
        broken=[("place", "-1"), ("handle", "run-../x"), ("box", ".."), ("box", ""), ("box", "é"), ("size", "lots")],
    )
