"""What a kernel says about requests of an earlier time."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from warmcell.kernel_provisioner.proxy import crossings
from warmcell.kernel_provisioner.proxy.activity import Asked
from warmcell.kernel_provisioner.proxy.crossings import Crossings
from warmcell.kernel_provisioner.proxy.unwanted import Unwanted
from warmcell.kernel_provisioner.proxy.wire import Author, Message


def said(kind: str, parent: str, **content: object) -> Message:
    """A message about a request."""
    _, made = Author().make(kind, content)
    made.parent = json.dumps({"msg_id": parent, "msg_type": "execute_request"}).encode()
    return made


def test_unwanted_output_ends_with_both_the_reply_and_the_idle() -> None:
    """All that is about a request is dropped, whichever end comes first; then nothing is looked at any more."""
    for ends in (
        [("iopub", said("status", "a", execution_state="idle")), ("shell", said("execute_reply", "a"))],
        [("shell", said("execute_reply", "a")), ("iopub", said("status", "a", execution_state="idle"))],
    ):
        unwanted = Unwanted()
        unwanted.add(["a"])
        assert unwanted.includes("iopub", said("stream", "a"))
        assert not unwanted.includes("iopub", said("stream", "b"))
        assert unwanted.includes("stdin", said("input_request", "a"))
        for channel, message in ends:
            assert unwanted
            assert unwanted.includes(channel, message)  # type: ignore[arg-type]
        assert not unwanted


@pytest.fixture
def lost() -> list[tuple[str, Mapping[str, Any]]]:
    return []


@pytest.fixture
def crossing(lost: list[tuple[str, Mapping[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> Crossings:
    monkeypatch.setattr(crossings, "GRACE_S", 0.0)
    made = Crossings(lambda name, asked, content: lost.append((name, content)))
    made.add({"a": Asked("execute_request")}, last_input=said("execute_input", "a", execution_count=7))
    return made


def test_a_reply_that_does_not_come_with_the_idle_is_lost(
    crossing: Crossings, lost: list[tuple[str, Mapping[str, Any]]]
) -> None:
    """What output tells of it is handed on: the cell's number, and its error."""
    crossing.saw("iopub", said("error", "a", ename="ValueError", evalue="no"))
    crossing.care()
    assert crossing.timeout_s() is None
    crossing.saw("iopub", said("status", "a", execution_state="idle"))
    assert crossing.timeout_s() is not None
    crossing.care()
    assert lost == [("a", {"execution_count": 7, "ename": "ValueError", "evalue": "no", "status": "error"})]
    assert not crossing


def test_a_reply_that_comes_is_not_lost(crossing: Crossings, lost: list[tuple[str, Mapping[str, Any]]]) -> None:
    """Even if it comes after the idle, within the time that it has."""
    crossing.saw("iopub", said("status", "a", execution_state="idle"))
    crossing.saw("shell", said("execute_reply", "a"))
    crossing.care()
    assert not lost
    assert not crossing
