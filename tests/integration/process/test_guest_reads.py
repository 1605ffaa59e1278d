"""What a guest reads from the host, whatever it is: an answer to each request, and nothing that stays of it."""

import asyncio
import json
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.anything import LENGTHS, give_anything
from tests.integration.keeper.conftest import until
from tests.integration.process.guest import Guest, running_guest
from tests.integration.process.test_guest_protocol import raw
from tests.leaks import Places

GROWTH_MAX = 16 * 2**20
"""Of init's memory, whatever it was told."""

PORT = 47_913
ODD = (None, True, 0, -1, 2**70, 1.5, "", "\0", "\ud800", [], [1], {}, {"a": 1}, "x" * 5000)
FIELDS: dict[str, tuple[Any, ...]] = {
    # Nothing here may name a program or a process of this machine: this guest is not isolated.
    "argv": (["true"], ["cat"], ["/nowhere"], ["\ud800"], ["true", "\udcff"], ["a\0"], [], [1], "true", None),
    "env": ({"A": "b"}, {"A": None}, {"A": "\ud800"}, {"A=": "b"}, {"": "b"}, {"A": 1}, {"A": "\0"}, [], None),
    "cwd": ("", "/", "/nowhere", "\ud800", "a\0", 1, "x" * 5000),
    "pty": (True, False, None, 1),
    "size": ([3, 4], [0, 0], [-1, 4], [70_000, 4], [1.5, 2], "ab", {}, None),
    "pid": (*ODD, 1),
    "signum": (*ODD, 2, 65),
    "group": ODD,
    "port": (*ODD, 1, PORT, 65_536),
    "wait": ODD,
    "until": (None, 5, "", "a/b", ".x", "a\0"),
    "connection": (None, 5, [], "a\0"),
    "engine": ODD,
    "preload": (None, "x", [1], ["\0"], {}),
}
OPERATIONS: dict[Any, tuple[str, ...]] = {
    "hello": (),
    "events": (),
    "exec": ("argv", "env", "cwd", "pty", "size"),
    "files": (),
    "signal": ("pid", "signum", "group"),
    "adopt": ("pid",),
    "forward": ("port",),
    "accept": ("port",),
    "kernel": ("connection", "engine", "env", "cwd"),
    "prepare": ("preload", "env"),
    "leave": ("until",),
    "nothing": (),
    None: (),
    "\ud800": (),
}


def request(op: Any) -> st.SearchStrategy[bytes]:
    fields = st.fixed_dictionaries({}, optional={name: st.sampled_from(FIELDS[name]) for name in OPERATIONS[op]})
    return fields.map(lambda told: json.dumps({"op": op, **told}).encode() + b"\n")


def frame(channel: int, content: bytes) -> bytes:
    return struct.pack(">BI", channel, len(content)) + content


CONTROLS = st.one_of(
    st.sampled_from(({"signal": 2}, {"signal": 0}, {"resize": [3, 4]}, {"resize": "ab"}, {"resize": [-1, 2**70]}, {})),
    st.tuples(st.sampled_from(("signal", "resize")), st.sampled_from(ODD)).map(lambda one: {one[0]: one[1]}),
).map(lambda told: frame(3, json.dumps(told).encode()))
FRAMES = st.lists(
    st.one_of(
        CONTROLS,
        st.binary(max_size=40).map(lambda data: frame(0, data)),
        st.tuples(st.integers(0, 255), st.binary(max_size=40)).map(lambda one: frame(*one)),
        st.sampled_from((b"\0\x7f\xff\xff\xff", b"\0\0")),
        st.binary(max_size=40),
    ),
    max_size=5,
).map(b"".join)
LINES = st.one_of(
    st.sampled_from(tuple(OPERATIONS)).flatmap(request),
    st.binary(max_size=100).map(lambda data: data + b"\n"),
    st.sampled_from((b"[" * 50_000 + b"\n", b'{"op": NaN}\n', b"{}\n", b"", b"{")),
)
COMMANDS = st.booleans().map(
    lambda pty: json.dumps({"op": "exec", "argv": ["cat"], "env": None, "cwd": "", "pty": pty}).encode() + b"\n"
)


@pytest.fixture
async def guest(places: Places) -> AsyncIterator[Guest]:
    async with running_guest(places.root) as running:
        yield running


def descriptors(guest: Guest) -> int:
    return len(os.listdir(f"/proc/{guest.process.pid}/fd"))


def peak(guest: Guest) -> int:
    status = Path(f"/proc/{guest.process.pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


@LENGTHS
async def test_requests_and_frames_are_answered_or_ended(guest: Guest, examples: int) -> None:
    """Each request has one answer, and each stream an end; then init is as it was: memory, descriptors, children."""

    def ask(data: bytes) -> None:
        said = raw(guest, data)
        line, newline, _ = said.partition(b"\n")
        goes = any(op in data for op in (b'"accept"', b'"forward"'))  # They wait, and who asks hangs up meanwhile.
        assert newline or b"\n" not in data or goes, (data, said)
        if newline:
            told = json.loads(line)
            assert told["ok"] is True or (told["code"] and told["message"]), told

    await guest.channel.hello()
    held, before = descriptors(guest), peak(guest)
    inputs = st.one_of(LINES, st.tuples(LINES | COMMANDS, FRAMES).map(b"".join))
    sound = [b'{"op": "hello"}\n', b'{"op": "exec", "argv": ["\\ud800"]}\n' + frame(0, b"")]
    await asyncio.to_thread(give_anything, inputs, ask, examples=examples, sound=sound)
    await asyncio.to_thread(raw, guest, b"x" * 3_000_000)
    assert peak(guest) - before < GROWTH_MAX

    async def quiet() -> bool:
        children = Path(f"/proc/{guest.process.pid}/task/{guest.process.pid}/children").read_text()
        return descriptors(guest) <= held and not children

    await until(quiet)
    assert (await guest.channel.exec(["echo", "well"])).stdout == "well\n"


@pytest.mark.parametrize("name", ["\ud800", "nowhere"])
async def test_a_name_that_no_file_has_ends_the_command_alone(guest: Guest, name: str) -> None:
    """Also where it cannot be said: what has failed to become the command does not go on as a second init."""
    done = await guest.channel.exec([name])
    assert done.exit_code in (126, 127)
    assert done.stderr.startswith("warmcell: ")
    assert (await guest.channel.hello()).pid == guest.process.pid
