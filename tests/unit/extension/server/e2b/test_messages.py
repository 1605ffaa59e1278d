"""Messages of E2B's process and filesystem services: asked of the keeper in its own words, or refused."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from warmcell.extension.keeper.agents.commands import Command, size_of
from warmcell.extension.keeper.agents.files_api import checked_path
from warmcell.extension.server.e2b import filesystem, processes, watching
from warmcell.extension.server.e2b.fields import read_object
from warmcell.extension.server.e2b.framing import ConnectError
from warmcell.extension.server.e2b.handler import E2bHandler, target
from warmcell.extension.server.e2b.routing import hosts_of
from warmcell.sandbox.client.watching import whole_lines
from warmcell.sandbox.errors import ProtocolError, WarmcellError

REFUSALS = (WarmcellError, ConnectError)
FILE = {"path": "/a/b", "name": "b", "type": "file", "size_bytes": 1, "mode": 0o644, "owner": "u", "group": "g"}
FILE |= {"modified_at": 1.5, "target": None, "metadata": {}}
HOSTS = hosts_of("", alone=True)
COMMAND = {"id": "c1", "pid": 7, "tag": "t", "pty": True, "state": "running", "argv": ["ls"], "cwd": "", "output": 0}


class AskedKeeper:
    """Reads each request as the keeper does, by the keeper's own functions, and has an answer of its form."""

    def __init__(self, file: Mapping[str, Any] | None = None) -> None:
        self._file = {**FILE, **(file or {})}

    async def ask(self, method: str, path: str, body: Any = None, **how: Any) -> Any:
        told = _sent(body)
        params = how.get("params") or {}
        for value in (*params.values(), path):
            value.encode()
        if path.endswith("/commands"):
            return {"commands": [COMMAND, {**COMMAND, "id": "w1", "tag": watching.TAG}]}
        if "/files/" in path:
            for name in ("path", "source", "target"):
                if name in params or name in told:
                    checked_path({**params, **told}[name])
            return {**self._file, "created": True, "files": [self._file], "next": None}
        if path.endswith("/resize"):
            size_of(told)
        if path.endswith("/stdin"):
            assert isinstance(how["content"], bytes)
        return {"python": "/usr/bin/python3", "id": "box"}

    @contextlib.asynccontextmanager
    async def lines(self, method: str, path: str, body: Any = None, **how: Any) -> AsyncGenerator[Any]:
        if body is not None:
            Command(_sent(body))
        yield _said({"started": True}, {"kind": "created", "name": "x"})


async def _said(*words: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
    yield {"command": COMMAND}
    yield {"stdout": base64.b64encode(b"".join(json.dumps(word).encode() + b"\n" for word in words)).decode()}
    yield {"next": 3}


def _sent(body: Any) -> dict[str, Any]:
    """A body as httpx sends it, and the keeper reads it."""
    read = json.loads(json.dumps(body, ensure_ascii=False, allow_nan=False).encode())
    return read if isinstance(read, dict) else {}


def request(headers: Mapping[str, str] | None = None, *, file: Mapping[str, Any] | None = None) -> E2bHandler:
    """One for an asked keeper."""
    made = SimpleNamespace(
        sandbox_id="box",
        keeper=AskedKeeper(file),
        settings={},
        request=SimpleNamespace(headers=dict(headers or {})),
        argument=lambda name: None,
    )
    return cast(E2bHandler, made)


SELECTOR = {"process": {"pid": 7}}
SOUND: Mapping[Any, dict[str, Any]] = {
    processes.start: {
        "process": {"cmd": "ls", "args": ["-l"], "envs": {"A": "b"}, "cwd": "a"},
        "pty": {"size": {"rows": 3, "cols": 4}},
        "tag": "t",
        "stdin": False,
    },
    processes.connect: SELECTOR,
    processes.list_them: {},
    processes.send_input: {**SELECTOR, "input": {"stdin": "aGk="}},
    processes.send_signal: {**SELECTOR, "signal": "SIGNAL_SIGTERM"},
    processes.close_stdin: SELECTOR,
    processes.update: {**SELECTOR, "pty": {"size": {"rows": 3, "cols": 4}}},
    filesystem.stat: {"path": "a"},
    filesystem.list_dir: {"path": "a", "depth": 2},
    filesystem.make_dir: {"path": "a"},
    filesystem.move: {"source": "a", "destination": "b"},
    filesystem.remove: {"path": "a"},
    watching.watch_dir: {"path": "a", "recursive": True},
    watching.create_watcher: {"path": "a"},
    watching.events: {"watcherId": "w1"},
    watching.remove_watcher: {"watcherId": "w1"},
}


def within(message: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The message, or one that is changed in a message of it."""
    inner = [name for name, value in message.items() if isinstance(value, dict)]
    deep = [changed(message[name]).map(lambda new, name=name: {**message, name: new}) for name in inner]
    return st.one_of(changed(message), *deep)


MESSAGES = st.sampled_from(tuple(SOUND)).flatmap(
    lambda verb: st.tuples(
        st.just(verb), st.one_of(within(SOUND[verb]).map(lambda one: json.dumps(one).encode()), st.binary(max_size=40))
    )
)


async def served(verb: Any, message: bytes) -> None:
    """All that is answered, which is JSON."""
    told = verb(request(), read_object(message, max_bytes=2**20))
    if isinstance(told, AsyncGenerator):
        async with contextlib.aclosing(told) as events:
            async for event in events:
                json.dumps(event, allow_nan=False).encode()
    else:
        json.dumps(await told, allow_nan=False).encode()


@LENGTHS
def test_messages_are_asked_of_the_keeper_or_refused(examples: int) -> None:
    """Each call of both services, with fields of any kind in any place."""
    with asyncio.Runner() as runner:
        give_anything(
            MESSAGES,
            lambda one: runner.run(served(*one)),
            refusals=REFUSALS,
            examples=examples,
            sound=[(verb, json.dumps(message).encode()) for verb, message in SOUND.items()],
            broken=[(verb, b"[]") for verb in SOUND]
            + [(processes.start, b'{"process": {"cmd": "a", "args": ["\\ud800"]}}')],
        )


@LENGTHS
def test_streams_of_input_are_passed_on_or_refused(examples: int) -> None:
    """In any order, and of any kind."""
    one = st.one_of(
        changed({"start": SELECTOR}, {"data": {"input": {"pty": "aGk="}}}, {"keepalive": {}}),
        changed({"input": {"stdin": "aGk="}}).map(lambda data: {"data": data}),
    )

    async def stream(messages: list[dict[str, Any]]) -> None:
        async def fields() -> AsyncIterator[Any]:
            for message in messages:
                yield read_object(json.dumps(message).encode(), max_bytes=2**20)

        await processes.stream_input(request(), fields())

    with asyncio.Runner() as runner:
        inputs = st.lists(one, max_size=4).map(lambda rest: [{"start": SELECTOR}, *rest])
        give_anything(
            inputs | st.lists(one, max_size=3),
            lambda said: runner.run(stream(said)),
            refusals=REFUSALS,
            examples=examples,
            sound=[[{"start": SELECTOR}, {"data": {"input": {"stdin": "aGk="}}}, {"keepalive": {}}]],
            broken=[[{"data": {"input": {"stdin": "aGk="}}}], [{}], [{"start": SELECTOR}, {"start": {}, "data": {}}]],
        )


@LENGTHS
def test_files_of_any_time_and_name_are_told(examples: int) -> None:
    """The keeper tells a file as it is: of any time, and with a name of any bytes. None of that is an accident."""
    names = st.binary(max_size=8).map(lambda name: name.decode("utf-8", "surrogateescape"))
    numbers = st.integers(-(10**400), 10**400) | st.floats(allow_nan=False, allow_infinity=False)
    files = st.fixed_dictionaries(
        {"name": names, "path": names, "modified_at": numbers, "mode": st.integers(0, 0o7777)},
        optional={"type": st.sampled_from(("symlink", "directory", "other")), "size_bytes": st.integers(0, 2**63)},
    )

    def tell(file: dict[str, Any]) -> None:
        told = filesystem.entry({**FILE, **file})
        json.dumps(told, allow_nan=False).encode()
        assert len(told["modifiedTime"]) == len("2026-01-01T00:00:00.000000Z")

    give_anything(files, tell, examples=examples)


@LENGTHS
def test_words_of_a_watcher_are_changes_or_refused(examples: int) -> None:
    """However they are cut; both E2B's wire and the SDK read them here."""
    word = changed({"kind": "moved", "name": "a"}, {"failed": 2}, {"started": True}, {"lost": True})
    said = st.one_of(word.map(lambda one: json.dumps(one).encode() + b"\n"), st.binary(max_size=40))

    def read(pieces: list[bytes]) -> None:
        rest = b""
        for piece in pieces:
            words, rest = whole_lines(rest, base64.b64encode(piece).decode())
            for one in words:
                if "kind" in one:
                    json.dumps(watching._event(one))
                if "failed" in one:
                    assert str(watching._failed(one["failed"], "/a"))

    sound = [[b'{"kind": "mo', b'ved", "name": "a"}\n', b'{"failed": 2}\n{"failed": [7]}\n']]
    broken = [[b"\n"], [b"[]\n"], [b'{"kind": []}\n'], [b'{"kind": "moved"}\n'], [b"x" * 300_000]]
    give_anything(
        st.lists(said, max_size=6), read, refusals=ProtocolError, examples=examples, sound=sound, broken=broken
    )


@LENGTHS
def test_who_asks_for_what_is_read_or_refused(examples: int) -> None:
    """A sandbox and its port in headers and hosts; users in an Authorization; times of calls."""
    text = st.one_of(
        st.text(max_size=20),
        st.sampled_from(("49983", "0", "abc", "Basic dXNlcjo=", "Basic dXNlcg", "basic !", "100", "9" * 30, "²")),
        st.integers().map(str),
    )
    names = st.sampled_from(("E2b-Sandbox-Id", "E2b-Sandbox-Port", "Authorization", "connect-timeout-ms"))

    def read(drawn: tuple[dict[str, str], str]) -> None:
        headers, host = drawn
        found = target(headers, host, HOSTS)
        assert found is None or found.port >= 0
        processes.check_user(request(headers))
        seconds = processes.timeout_s(request(headers))
        assert seconds is None or 0 < seconds <= 10**7

    hosts = st.one_of(text, st.tuples(text, text).map(lambda both: f"{both[0]}-{both[1]}.example.com"))
    sound = [
        ({"E2b-Sandbox-Id": "a", "E2b-Sandbox-Port": "1"}, ""),
        ({"Authorization": "Basic dXNlcjo="}, "1-abcdefabcdef.b"),
    ]
    broken = [({"E2b-Sandbox-Id": "a"}, ""), ({"Authorization": "Basic !"}, ""), ({"connect-timeout-ms": "²"}, "")]
    broken += [({"connect-timeout-ms": "0" * 10 + "1" * more}, "") for more in (2, 30, 5000)]
    inputs = st.tuples(st.dictionaries(names, text, max_size=4), hosts)
    give_anything(inputs, read, examples=examples, sound=sound, broken=broken)


@LENGTHS
def test_any_json_is_a_message_or_refused(examples: int) -> None:
    """What is no object is no message."""
    give_anything(
        JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60),
        lambda data: read_object(data, max_bytes=2**20),
        examples=examples,
        sound=[b"", b"{}"],
        broken=[b"[]", b"[" * 50_000, b'{"a": 1, "a": 2}', b"{}" + b" " * 2**20],
    )
