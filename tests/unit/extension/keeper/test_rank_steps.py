"""What a step shows, with a kernel that is a script."""

import asyncio
import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from warmcell.extension.keeper import rank_steps
from warmcell.extension.keeper.rank_client import ChannelName, Heard, RankClient
from warmcell.extension.keeper.rank_steps import Execution, LostError, Request, Step, step_of
from warmcell.kernel_provisioner.proxy.wire import Author, MalformedMessageError, parse


class Script:
    """Says these messages to whatever it is asked; then its process ends."""

    def __init__(self, *said: tuple[ChannelName, str, Mapping[str, Any] | int]) -> None:
        self.ended = self.lives = False
        self.alone = True
        self.asked: list[Mapping[str, Any]] = []
        self._said = deque(said)

    def request(self, channel: str, kind: str, content: Mapping[str, Any]) -> str:
        self.asked.append(content)
        return "asked"

    async def hear(self, until: float | None = None) -> Heard | None:
        await asyncio.sleep(0)
        if not self._said:
            self.ended = not self.lives
            return None
        channel, kind, content = self._said.popleft()
        if isinstance(content, int):
            return Heard(channel, "asked", Author().make(kind, {})[1], left_out_bytes=content)
        return Heard(channel, "asked", Author().make(kind, content)[1])


REPLY: tuple[ChannelName, str, dict[str, Any]] = ("shell", "execute_reply", {"status": "ok"})
IDLE: tuple[ChannelName, str, dict[str, Any]] = ("iopub", "status", {"execution_state": "idle"})


def text(said: str) -> tuple[ChannelName, str, dict[str, Any]]:
    return "iopub", "stream", {"name": "stdout", "text": said}


async def shown(*said: Any, most: int = 1000) -> list[dict[str, Any]]:
    execution = Execution(cast(RankClient, Script(*said)), Step("…"), text_max_bytes=most)
    return [message async for message in execution.messages()]


@pytest.mark.parametrize("last", [(REPLY, IDLE), (IDLE, REPLY)])
async def test_a_step_ends_with_its_reply_and_its_output(last: Any) -> None:
    """In whichever order they come; with what was shown before."""
    assert [one["content"]["text"] for one in await shown(text("a"), text("b"), *last)] == ["a", "b"]


async def test_text_is_bounded_however_it_comes() -> None:
    """In many messages, or in one that is too large to be read: the beginning is kept, and the rest is counted."""
    found = [one["content"]["text"] for one in await shown(*[text("x" * 300)] * 9, IDLE, REPLY)]
    assert found[0] == "x" * 300
    assert "".join(found[:-1]) == "x" * sum(map(len, found[:-1]))
    assert 900 < sum(map(len, found[:-1])) <= 1000
    assert found[-1] == "\n[0.0 MiB more of output are left out]\n"
    found = [one["content"]["text"] for one in await shown(("iopub", "stream", 10**9), text("after"), IDLE, REPLY)]
    assert found == ["after", "\n[953.7 MiB more of output are left out]\n"]


async def test_a_reply_that_is_too_large_is_an_error() -> None:
    """Which says so: the cell has ended, and nobody knows how."""
    (error,) = await shown(("shell", "execute_reply", 10**9), IDLE)
    assert error["content"]["ename"] == "MessageTooLarge"


async def test_an_error_is_told_once() -> None:
    """A cell's as it is published; that of what goes with it by the reply, with what it was."""
    failed = {"status": "error", "ename": "E", "evalue": "", "traceback": []}
    found = await shown(("iopub", "error", failed), ("shell", "execute_reply", failed), IDLE)
    assert [(one["msg_type"], one.get("step")) for one in found] == [("error", None)]
    found = await shown(("shell", "execute_reply", {**failed, "step": "load"}), IDLE)
    assert [(one["msg_type"], one["step"]) for one in found] == [("error", "load")]


async def test_a_kernel_that_ends_before_its_reply_is_lost() -> None:
    """What it has shown until then was shown."""
    execution = Execution(cast(RankClient, Script(text("last words"))), Step("…"))
    found = []
    with pytest.raises(LostError):
        async for message in execution.messages():
            found.append(message["content"]["text"])
    assert found == ["last words"]


async def test_a_reply_that_an_interrupt_took_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is idle again without one was interrupted."""
    monkeypatch.setattr(rank_steps, "REPLY_LATE_S", 0.0)
    script = Script(text("a"), IDLE)
    script.lives = True
    execution = Execution(cast(RankClient, script), Step("…"))
    found = [message async for message in execution.messages()]
    assert [one["msg_type"] for one in found] == ["stream", "error"]
    assert found[1]["content"]["ename"] == "KeyboardInterrupt"


@pytest.mark.parametrize("alone", [True, False])
async def test_only_who_listens_alone_has_little_said(alone: bool) -> None:
    """A proxy looks at what a clone says."""
    script = Script(REPLY, IDLE)
    script.alone = alone
    execution = Execution(cast(RankClient, script), Step("pass", {"load": {}}))
    assert [message async for message in execution.messages()] == []
    assert script.asked[0]["warmcell"] == {"load": {}, **({"quiet": True} if alone else {})}


def test_values_go_in_and_out_with_the_cells_own_request() -> None:
    """One request for all three; what was not written for want of room is asked for alone; nothing to do is none."""
    load = {"buffers": [], "held": {}, "modules": {}, "tags": {}}
    step = step_of(Request("x = 1", load, ("x",), "last"), "/run/warmcell", Path("/host/get-1.pkl"), 1000)
    assert step is not None
    dump = {"names": ["x"], "path": "/run/warmcell/get-1.pkl", "last": "last", "limit": 1000}
    assert step == Step("x = 1", {"load": {**load, "directory": "/run/warmcell"}, "dump": dump})
    assert step.again == Step("", {"dump": dump})
    assert step_of(Request(""), "/run/warmcell", Path("/host/get-1.pkl"), 1000) is None


def parts(kind: str, content: object, metadata: object) -> list[bytes]:
    """A message's frames."""
    header, parent = {"msg_type": kind, "msg_id": "a"}, {"msg_type": "execute_request", "msg_id": "asked"}
    return [b"<IDS|MSG>", b"", *(json.dumps(one).encode() for one in (header, parent, metadata, content))]


CONTENTS = changed(
    {"name": "stdout", "text": "x"},
    {"execution_state": "idle"},
    {"status": "ok", "kernel_memory": 5},
    {"status": "error", "ename": "E", "evalue": "", "traceback": [], "step": "load"},
    {"data": {"text/plain": "1"}, "metadata": {}, "execution_count": 1},
)
KINDS = st.sampled_from(("stream", "status", "execute_reply", "execute_result", "error", "comm_msg", "nothing"))
SOUND = parts("stream", {"name": "stdout", "text": "x"}, {})
DEEP = b"[" * 50_000


@LENGTHS
def test_whatever_a_kernel_says_is_shown_or_no_message(examples: int) -> None:
    """As JSON of the form that all messages have."""

    async def show(said: list[tuple[ChannelName, list[bytes]]]) -> None:
        messages = [Heard(channel, (found := parse(frames)).read_parent()[1], found) for channel, frames in said]
        script = Script()
        execution = Execution(cast(RankClient, script), Step("…"), text_max_bytes=100)
        heard = iter([*messages, *(Heard(one[0], "asked", Author().make(*one[1:])[1]) for one in (REPLY, IDLE))])
        script.hear = lambda until=None: asyncio.sleep(0, next(heard))  # type: ignore[method-assign]
        async for message in execution.messages():
            assert isinstance(message["content"], Mapping)
            assert isinstance(message["metadata"], Mapping)
            json.dumps(message)

    sound = st.tuples(KINDS, st.one_of(CONTENTS, JSON), st.one_of(st.just({}), JSON)).map(lambda one: parts(*one))
    broken = st.tuples(sound, st.integers(0, 5), st.sampled_from((b"", b"{", DEEP, b"\xff", b"1e999")))
    frames = st.one_of(sound, broken.map(lambda one: [*one[0][: one[1]], one[2], *one[0][one[1] + 1 :]]))
    channels: st.SearchStrategy[ChannelName] = st.sampled_from(("iopub", "iopub", "shell", "control"))
    with asyncio.Runner() as runner:
        give_anything(
            st.lists(st.tuples(channels, frames), max_size=4),
            lambda said: runner.run(show(said)),
            refusals=MalformedMessageError,
            examples=examples,
            sound=[[("iopub", SOUND)]],
            broken=[[("iopub", [*SOUND[:-2], DEEP, SOUND[-1]])], [("iopub", [*SOUND[:-1], b"[]"])]],
        )
