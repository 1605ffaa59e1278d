"""What a sandbox's kernel shows, whatever it is: everybody who reads it takes it in, or a note in its place."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from warmcell.extension.keeper.agents.output import Output
from warmcell.extension.mcp.pages import TEXT_MAX, Page
from warmcell.extension.server.e2b import results
from warmcell.sandbox.client.results import Showing

DISPLAY = {"data": {"text/plain": "1", "image/png": "aGk="}, "metadata": {}, "transient": {"display_id": "a"}}
CONTENTS: Mapping[str, dict[str, Any]] = {
    "stream": {"name": "stdout", "text": "x"},
    "error": {"ename": "E", "evalue": "v", "traceback": ["a", "b"]},
    "execute_result": DISPLAY,
    "display_data": DISPLAY,
    "update_display_data": DISPLAY,
    "clear_output": {"wait": True},
    "comm_msg": {"comm_id": "a", "data": {}},
}


def message(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """One of that kind with something odd in it, or several things."""
    content = st.one_of(changed(CONTENTS[kind]), JSON)
    return st.fixed_dictionaries(
        {"msg_type": st.just(kind), "content": content, "metadata": st.one_of(st.just({}), JSON)}
    )


MESSAGES = st.one_of([message(kind) for kind in CONTENTS])


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for all inputs of a test."""
    with asyncio.Runner() as runner:
        yield runner.get_loop()


def entries(loop: asyncio.AbstractEventLoop, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What those who follow are told of these."""
    output = Output()
    for one in messages:
        loop.run_until_complete(output.put(one))
    said, after = output.present()
    assert after == len(messages)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in said.splitlines()]


@LENGTHS
def test_what_kernels_show_is_read_by_all_who_follow(examples: int, loop: asyncio.AbstractEventLoop) -> None:
    """The SDK, tools over MCP, and E2B's interpreter: each entry is one that they can take, as JSON without more."""

    def follow(messages: list[dict[str, Any]]) -> None:
        showing, page = Showing(), Page()
        for entry in entries(loop, messages):
            showing.take(entry)
            page.take(entry)
            json.dumps(results.line(entry))
        made = showing.execution({"status": "ok"})
        assert isinstance(made.stdout, str)
        for one in made.results:
            for text in (one.text, one.html, one.png):
                assert text is None or isinstance(text, str)
        assert sum(len(block.text) for block in page.content() if block.type == "text") <= 2 * TEXT_MAX

    give_anything(st.lists(MESSAGES, max_size=4), follow, refusals=(), examples=examples)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("stream", []),
        ("stream", {"name": "stdin", "text": "x"}),
        ("error", {"ename": "E", "evalue": "v", "traceback": 5}),
        ("display_data", {"data": ["x"]}),
        ("update_display_data", {"data": {}, "transient": {"display_id": []}}),
        ("execute_result", {"data": {"application/json": float("nan")}}),
    ],
)
def test_what_is_not_of_its_form_is_said_and_left_out(
    kind: str, content: object, loop: asyncio.AbstractEventLoop
) -> None:
    """What comes after it is there; a sound one is as it was."""
    sound = {"msg_type": "stream", "content": {"name": "stdout", "text": "after"}, "metadata": {}}
    odd, after = entries(loop, [{"msg_type": kind, "content": content, "metadata": {}}, sound])
    assert odd["content"]["name"] == "stderr"
    assert f"a {kind}" in odd["content"]["text"]
    assert after == {"n": 1, **sound}
