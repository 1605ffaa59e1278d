"""What callers of the SDK give: nothing is taken for what it was not meant to be, and nothing is sent then."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import warmcell
from warmcell.sandbox.client import given
from warmcell.sandbox.client.core import Core
from warmcell.sandbox.client.transport import SyncTransport, Where, now
from warmcell.sandbox.client.wanted import Wanted, asked_of, policy_of
from warmcell.sandbox.errors import ConflictError, InvalidRequestError, NotFoundError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId, SandboxInfo

INFO = SandboxInfo(id=SandboxId("box1"), state=State.RUNNING, backend="bubblewrap", isolated=True, owner="client")
NOBODY = Where("http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("data", "content"), [("ä", b"\xc3\xa4"), (b"x", b"x"), (bytearray(b"x"), b"x"), (memoryview(b"xyz")[::2], b"xz")]
)
def test_content_is_bytes_or_text(data: object, content: bytes) -> None:
    """Of any kind that has bytes."""
    assert given.as_bytes(data) == content


@pytest.mark.parametrize("data", [5, None, [1, 2], {"a": 1}, "\udcff"])
def test_what_is_no_content_is_refused(data: object) -> None:
    """`bytes(5)` are five zeros, and `bytes([1, 2])` two bytes: neither is what somebody meant."""
    with pytest.raises(InvalidRequestError) as raised:
        given.as_bytes(data)
    assert raised.value.hint


def test_arguments_are_written_out() -> None:
    """Paths and numbers are what a shell would have made of them."""
    assert given.arguments(("sleep", 0, 1.5, Path("/a b"))) == ["sleep", "0", "1.5", "/a b"]


@pytest.mark.parametrize("argv", [(), (["ls", "-l"],), (b"ls",), (None,), ("ls", True), ("ls", {"a": 1})])
def test_what_is_no_command_is_refused(argv: tuple[object, ...]) -> None:
    """Rather than looked for as a program of that name."""
    with pytest.raises(InvalidRequestError, match=r"argument|no command") as raised:
        given.arguments(argv)
    assert "box.exec" in raised.value.hint


@pytest.mark.parametrize(
    "wanted",
    [
        *({"preload": "torch"}, {"preload": [1]}, {"gpu": 1}, {"gpu": ["A100", 2]}, {"network": "pypi.org"}),
        *({"network": 5}, {"memory": 2.5}, {"memory": "9" * 5000}),
    ],
)
def test_one_text_is_no_list_of_them(wanted: Any) -> None:
    """Each letter of "torch" would be a module."""
    with pytest.raises(InvalidRequestError) as raised:
        asked_of(wanted)
    assert raised.value.hint


def test_no_network_and_hosts_are_what_they_say() -> None:
    """The word for none, hosts, and a policy."""
    assert policy_of("none") == "none"
    assert asked_of(cast(Wanted, {"network": "host"})).body["spec"] == {"network": "host"}  # The keeper says why not.
    assert policy_of(("pypi.org",)) == {"allow": ["pypi.org"]}
    assert policy_of({"packages": True}) == {"packages": True}
    assert asked_of(Wanted(preload=("torch",))).body["spec"] == {"preload": ["torch"]}


@pytest.mark.parametrize(
    "ask",
    [
        lambda box: box.command("../../snapshots"),
        lambda box: box.command(""),
        lambda box: box.kill_command(".."),
        lambda box: box.remove_context("a/b"),
        lambda box: box.restart_context("a?b"),
        lambda box: box.wait("a#b", None, None),
        lambda box: box.write("%2e%2e", b""),
    ],
)
def test_an_id_leads_to_nothing_else(ask: Callable[[Core], Any]) -> None:
    """What is none is said to be none before anybody is asked."""
    transport = SyncTransport(NOBODY)
    with pytest.raises(NotFoundError, match="is no id"):
        now(ask(Core(transport, INFO)))
    now(transport.close())


def test_a_number_without_an_end_is_refused() -> None:
    """JSON has none."""
    with pytest.raises(InvalidRequestError, match="JSON"):
        warmcell.Sandbox(timeout=float("nan"), url=NOBODY.url)


def test_an_object_that_was_closed_says_so() -> None:
    """Not the library that it is made with."""
    transport = SyncTransport(NOBODY)
    box = Core(transport, INFO)
    now(transport.close())
    with pytest.raises(ConflictError, match="closed") as raised:
        now(box.refresh())
    assert "connect" in raised.value.hint


def test_a_sandbox_for_loops_is_made_before_it_is_used() -> None:
    """By `async with`; what forgets that hears of it."""
    box = warmcell.AsyncSandbox(url=NOBODY.url)
    with pytest.raises(ConflictError, match="no sandbox yet") as raised:
        asyncio.run(box.run("1"))
    assert "async with" in raised.value.hint
    with pytest.raises(ConflictError):
        box.files.read("x")
    assert not hasattr(box, "no_such_thing")
