"""What comes from a guest, whatever it is: what was asked for, or an error of ours, in bounded memory."""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.anything import LENGTHS, changed, give_anything
from warmcell.extension.keeper.agents.files_api import HEAD_MAX_BYTES, Work
from warmcell.sandbox.background import Background
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import ProtocolError, WarmcellError
from warmcell.sandbox.guest_process import FRAME_MAX_BYTES, GuestProcess
from warmcell.sandbox.guest_wire import is_event, read_object, socket_name

EVENTS = changed(
    {"event": "template", "name": "t", "state": "ready", "seconds": 1.5, "imported": ["a"], "failed": {"b": "why"}},
    {"event": "kernel", "pid": 7, "state": "exited", "exit_code": 1},
    names=("since", "importing"),
)
ANSWERS = changed(
    {"ok": True, "pid": 5, "python": "3.11", "protocol": 1},
    {"ok": True, "pid": 5, "started_from": "cold", "sockets": "k1", "why": "x"},
    {"ok": False, "code": "not_found", "message": "no", "hint": "look"},
    names=("details",),
)
FILE = {"path": "/a", "name": "a", "type": "file", "size_bytes": 1, "mode": 0o644, "owner": "u", "group": "g"}
FILE |= {"modified_at": 1.5, "target": None, "metadata": {"a": "b"}}
DONE = changed(
    {"ok": True, "file": FILE, "created": True},
    {"ok": True, "files": [FILE, FILE], "truncated": False},
    {"ok": True, "files": 3},
    {"ok": False, "errno": "ENOENT", "message": "no"},
) | changed(FILE).map(lambda file: {"ok": True, "file": file, "files": [file]})
OPERATIONS = ("read", "write", "list", "stat", "move", "remove", "mkdir", "pack", "unpack")


def line(said: dict[str, Any]) -> bytes:
    return json.dumps(said).encode() + b"\n"


JUNK = st.one_of(st.binary(max_size=200), st.sampled_from((b"", b"{", b"[" * 50_000, b'{"a":1e999}', b'{"a":NaN}')))
LINES = st.one_of(JUNK, EVENTS.map(line), ANSWERS.map(line))


def frame(drawn: tuple[int, bytes]) -> bytes:
    return bytes((drawn[0],)) + len(drawn[1]).to_bytes(4, "big") + drawn[1]


def framed(*contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Frames, most of which are sound, and perhaps something after them."""
    channels = st.sampled_from((1, 1, 2, 3, 0, 4, 255))
    frames = st.lists(st.tuples(channels, st.one_of(*contents)).map(frame), max_size=5).map(b"".join)
    ends = st.sampled_from((b"", frame((3, b'{"exit_code": 0}')), b"\x01\x7f\xff\xff\xff", b"\x01\0"))
    return st.one_of(st.tuples(frames, ends).map(b"".join), st.binary(max_size=60))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for all inputs of a test."""
    with asyncio.Runner() as runner:
        yield runner.get_loop()


def process(data: bytes) -> GuestProcess:
    """One that says this, and is gone."""
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return GuestProcess(1, reader, None)  # type: ignore[arg-type]


@LENGTHS
def test_lines_are_events_or_refused(examples: int) -> None:
    """What is an event can be told on as JSON, without what is no number; no name of a socket is a path."""

    def read(said: bytes) -> None:
        told = read_object(said)
        json.dumps(told, allow_nan=False)
        if not is_event(told):
            with contextlib.suppress(ProtocolError):
                assert "/" not in socket_name(told)

    sound = [b'{"event": "kernel", "pid": 7, "state": "exited", "exit_code": 1}', b'{"ok": true, "sockets": "k1"}']
    broken = [b"[]", b'{"event": "kernel", "pid": true}', b'{"event": "template", "since": 1e999}', b"[" * 50_000]
    give_anything(LINES, read, refusals=ProtocolError, examples=examples, sound=sound, broken=broken)


@LENGTHS
def test_what_runs_besides_is_bounded_or_refused(examples: int) -> None:
    """A page can show it: few lines, none long, and finite numbers."""

    def read(said: dict[str, Any]) -> None:
        found = Background.read(said)
        assert len(found.told) <= 11
        assert all(len(command) <= 100 and command.isprintable() for command in found.told)
        assert math.isfinite(found.cpu_s)

    whole: dict[str, Any] = {"commands": ["a", "b" * 300, "c\n"] * 5, "more": 3, "listens": True, "cpu_s": 1.5}
    assert Background.read(whole).told == (*("a", "b" * 99 + "…", "c ") * 3, "a", "8 more")
    give_anything(
        changed(whole),
        read,
        refusals=ProtocolError,
        examples=examples,
        sound=[whole, whole | {"cpu_s": 10**400, "more": 10**400}, whole | {"more": -1}],
        broken=[{}, whole | {"commands": [1]}, whole | {"cpu_s": "1"}, whole | {"more": 1.5}],
    )


@LENGTHS
def test_frames_are_output_or_refused(examples: int, loop: asyncio.AbstractEventLoop) -> None:
    """A process's output ends with its exit code, or with an error that says why not."""

    async def follow(said: bytes) -> None:
        made = process(said)
        async for name, content in made.output():
            assert name in ("stdout", "stderr")
            assert len(content) <= FRAME_MAX_BYTES
        assert isinstance(made.exit_code, int)

    ends = changed({"exit_code": 3}).map(lambda told: json.dumps(told).encode())
    give_anything(
        framed(st.binary(max_size=50), ends),
        lambda said: loop.run_until_complete(follow(said)),
        examples=examples,
        sound=[frame((1, b"x")) + frame((3, b'{"exit_code": 0}'))],
        broken=[b"", frame((1, b"x")), frame((4, b"")), frame((3, b"{}")), b"\x01\x7f\xff\xff\xff"],
    )


@LENGTHS
def test_answers_about_files_are_whole_or_refused(examples: int, loop: asyncio.AbstractEventLoop) -> None:
    """Each field is of its kind, so that whoever asked gets JSON of the documented form."""

    async def answer(drawn: tuple[str, bytes]) -> None:
        op, said = drawn
        work = Work(process(said), op)
        told = await work.answer()
        json.dumps(told, allow_nan=False)
        for file in [told["file"]] if "file" in told else told["files"] if op == "list" else ():
            assert set(file) == set(FILE)
        async for _ in work.content():
            pass

    sound = DONE.map(lambda told: frame((1, line(told))) + frame((3, b'{"exit_code": 0}')))
    inputs = st.tuples(st.sampled_from(OPERATIONS), st.one_of(sound, framed(JUNK, DONE.map(line))))
    exit_code = frame((3, b'{"exit_code": 0}'))
    give_anything(
        inputs,
        lambda drawn: loop.run_until_complete(answer(drawn)),
        examples=examples,
        sound=[("list", frame((1, line({"ok": True, "files": [FILE]}))) + exit_code)],
        broken=[("stat", frame((1, line({"ok": True}))) + exit_code), ("read", frame((1, b"{")) + exit_code)],
    )


def test_an_answer_without_an_end_is_given_up(loop: asyncio.AbstractEventLoop) -> None:
    """Past its bound nothing more is collected."""

    async def answer() -> None:
        reader = asyncio.StreamReader()
        for _ in range(2 * HEAD_MAX_BYTES // FRAME_MAX_BYTES):
            reader.feed_data(frame((1, b"x" * FRAME_MAX_BYTES)))
        with pytest.raises(ProtocolError, match="broke off"):
            await Work(GuestProcess(1, reader, None), "stat").answer()  # type: ignore[arg-type]
        assert len(reader._buffer) > HEAD_MAX_BYTES // 2  # type: ignore[attr-defined]

    loop.run_until_complete(answer())


VERBS: dict[str, Callable[[GuestChannel], Coroutine[Any, Any, object]]] = {
    "hello": lambda channel: channel.hello(),
    "kernel": lambda channel: channel.start_kernel("/run/k1.json", env={}),
    "exec": lambda channel: channel.exec(["true"]),
    "signal": lambda channel: channel.signal(1, 2),
    "events": lambda channel: _all(channel.events()),
}


async def _all(events: AsyncIterator[object]) -> list[object]:
    return [event async for event in events]


class Guest:
    """Says on each connection what it was told to, and hangs up."""

    def __init__(self) -> None:
        self.says = b""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readline()
            writer.write(self.says)
            await writer.drain()
        writer.close()


@LENGTHS
def test_requests_are_answered_or_refused(examples: int, loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    """Over a real socket, whatever a guest answers to a request of any kind, and says after that."""
    guest, channel = Guest(), GuestChannel(tmp_path)
    server = loop.run_until_complete(asyncio.start_unix_server(guest.serve, tmp_path / "init.sock"))

    def ask(drawn: tuple[str, bytes, bytes]) -> None:
        verb, first, rest = drawn
        guest.says = first + rest
        loop.run_until_complete(VERBS[verb](channel))

    after = st.one_of(LINES, framed(st.binary(max_size=20)))
    try:
        inputs = st.tuples(st.sampled_from(tuple(VERBS)), LINES, after)
        exited = frame((1, b"x")) + frame((3, b'{"exit_code": 0}'))
        sound = [("exec", line({"ok": True, "pid": 5}), exited), ("events", line({"ok": True}), b"")]
        broken = [("exec", line({"ok": True, "pid": 5}), frame((1, b"x"))), ("hello", b"", b"")]
        give_anything(inputs, ask, examples=examples, sound=sound, broken=broken)
        guest.says = b"x" * 9_000_000
        with pytest.raises(WarmcellError):
            loop.run_until_complete(channel.hello())
        assert channel.idle
    finally:
        server.close()
        loop.run_until_complete(server.wait_closed())
