"""Whatever answers the SDK: a value of its type, or one of our errors with its cure; in bounded memory."""

import asyncio
import base64
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from warmcell.sandbox.client import core, core_files, trees
from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.client.core import Core
from warmcell.sandbox.client.results import Execution
from warmcell.sandbox.client.transport import SyncTransport, Where, now
from warmcell.sandbox.errors import (
    CapacityError,
    InvalidRequestError,
    ProtocolError,
    TransportError,
    UnauthenticatedError,
    WarmcellError,
)
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId, SandboxInfo, Terms

WHERE = Where("http://127.0.0.1:8890", "token")
INFO = SandboxInfo(
    id=SandboxId("box1"), state=State.RUNNING, backend="bubblewrap", isolated=True, owner="client", terms=Terms()
)
FILE = {
    **{"path": "/a", "name": "a", "type": "file", "size_bytes": 1, "mode": 420, "owner": "u", "group": "g"},
    **{"modified_at": 1.0, "target": None, "metadata": {}},
}
COMMAND = {"id": "c1", "argv": ["ls"], "state": "running"}
ENDED = {"status": "ok", "execution_count": 1, "exit_code": 0, "error": None}
LINES: list[dict[str, Any]] = [
    {"n": 0, "msg_type": "stream", "content": {"name": "stdout", "text": "x"}, "metadata": {}},
    {"n": 1, "stdout": base64.b64encode(b"x").decode()},
    {"n": 2, "msg_type": "display_data", "content": {"data": {}, "transient": {"display_id": "a"}}},
    {"ended": ENDED},
    {"refused": {"code": "forbidden", "message": "no", "hint": "ask"}},
    {"lost": 3},
    {"command": COMMAND},
]
QUIET: dict[str, Any] = {"on_stdout": None, "on_stderr": None}


class Answering(SyncTransport):
    """Gets the same answer to everything, which can be changed: to make one takes long."""

    def __init__(self, status: int = 200, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        super().__init__(WHERE)
        self.answer: dict[str, Any] = {"status_code": status, "content": content, "headers": headers}
        self._http.close()
        answer = httpx.MockTransport(lambda request: httpx.Response(**self.answer))
        self._http = httpx.Client(transport=answer, base_url=WHERE.base_url())

    async def sleep(self, seconds: float) -> None:
        """Nothing else will be answered later."""


VERBS: dict[str, Callable[[Core], Any]] = {
    "refresh": lambda box: box.refresh(),
    "connect": lambda box: core.connect(box.calls, "box1", None),
    "metrics": lambda box: box.metrics(),
    "fork": lambda box: box.fork(2),
    "snapshot": lambda box: box.snapshot("a"),
    "forward": lambda box: box.forward(80, 60),
    "contexts": lambda box: box.contexts(),
    "create_context": lambda box: box.create_context(""),
    "commands": lambda box: box.commands(),
    "command": lambda box: box.command("c1"),
    "list": lambda box: box.files.listing(".", 1),
    "stat": lambda box: box.files.stat("a"),
    "mkdir": lambda box: box.files.mkdir("a"),
    "url": lambda box: box.files.url("a", "read", False, 60),
    "run": lambda box: box.run("1", context="default", timeout_s=None, env=None, on_result=None, **QUIET),
    "exec": lambda box: box.exec(["ls"], cwd="", env=None, input=b"", timeout_s=None, **QUIET),
    "wait": lambda box: box.wait("c1", None, None),
}
ANSWERS = changed(
    INFO.to_json(),
    FILE,
    COMMAND,
    {"files": [FILE], "next": "b"},
    *({name: [each]} for name, each in (("sandboxes", INFO.to_json()), ("files", FILE), ("commands", COMMAND))),
    {"contexts": [{"id": "a"}]},
    {"id": "a", "path": "/x", "host": None, "created": True},
    {"code": "conflict", "message": "no", "hint": "wait", "details": {}},
)
WRITTEN = st.one_of(ANSWERS, JSON).map(lambda one: json.dumps(one).encode())
STREAMS = st.lists(st.one_of(changed(*LINES), JSON).map(lambda one: json.dumps(one).encode()), max_size=6).map(
    b"\n".join
)
BODIES = st.one_of(WRITTEN, STREAMS, st.binary(max_size=60), st.just(b"[" * 100_000), st.just(b"<html>"))


def test_a_listing_that_never_ends_is_given_up() -> None:
    """What runs in a sandbox may make files faster than they are listed."""
    transport, asked = Answering(), []

    def page(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.params.get("after"))
        return httpx.Response(200, json={"files": [FILE], "next": str(len(asked))})

    transport._http.close()
    transport._http = httpx.Client(transport=httpx.MockTransport(page), base_url=WHERE.base_url())
    box = Core(transport, INFO)
    with pytest.raises(CapacityError, match="100 are not all"):
        now(box.files.listing(".", 1))
    assert len(asked) == len(set(asked)) == core_files.PAGES_MAX
    now(transport.close())


def test_what_is_told_over_and_over_is_no_progress() -> None:
    """A server that begins anew each time is given up as one that says nothing, and what it says counts once."""
    transport, heard = Answering(200, json.dumps(LINES[1]).encode()), []

    async def hear(entry: Any) -> None:
        heard.append(entry["n"])
        assert len(heard) < 10

    with pytest.raises(TransportError):
        now(Calls(transport).follow("/commands", None, "c1", hear))
    assert heard == [1]
    now(transport.close())


@LENGTHS
def test_any_answer_is_understood_or_said_to_be_none(examples: int) -> None:
    """To each verb. A refusal says the cure, and is one of the tree of errors."""
    transport = Answering()

    def take(drawn: tuple[str, int, bytes]) -> None:
        verb, status, body = drawn
        transport.answer |= {"status_code": status, "content": body}
        made = now(VERBS[verb](Core(transport, INFO)))
        assert not isinstance(made, Execution) or isinstance(made.stdout, str)

    def refuse(drawn: tuple[str, int, bytes]) -> None:
        try:
            take(drawn)
        except WarmcellError as error:  # What the other side has refused has the words that it gave.
            if type(error) in (ProtocolError, TransportError):
                assert "127.0.0.1:8890" in error.message
                assert error.hint

    lines = [json.dumps(one).encode() for one in LINES]
    give_anything(
        st.tuples(st.sampled_from(sorted(VERBS)), st.sampled_from((200, 201, 302, 404, 500, 502)), BODIES),
        refuse,
        refusals=(),
        examples=examples,
        sound=[("refresh", 200, json.dumps(INFO.to_json()).encode()), ("run", 200, lines[0] + b"\n" + lines[3])],
    )
    for verb, body in (
        ("refresh", b"<html>"),
        ("run", b"no\n"),
        ("stat", b"{}"),
        ("list", b'{"files": [], "next": "b"}'),
        ("fork", b'{"sandboxes": [{}]}'),
    ):
        with pytest.raises(WarmcellError):
            take((verb, 200, body))
    now(transport.close())


def tars() -> st.SearchStrategy[bytes]:
    """Some that are sound but for a few bytes, and some whose members are anything."""
    made = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for name, kind, link in (
                ("a", tarfile.REGTYPE, ""),
                ("b" * 90 + "/" + "c" * 40, tarfile.REGTYPE, ""),
                ("../out", tarfile.REGTYPE, ""),
                ("l", tarfile.SYMTYPE, ".."),
                ("l/out", tarfile.REGTYPE, ""),
                ("h", tarfile.LNKTYPE, "/etc/passwd"),
                ("d", tarfile.DIRTYPE, ""),
            ):
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.size = kind, link, 3 if kind == tarfile.REGTYPE else 0
                archive.addfile(member, io.BytesIO(b"abc"))
        made.append(file.getvalue())
    changes = st.lists(st.tuples(st.integers(0, 2**14), st.binary(min_size=1, max_size=12)), max_size=4)

    def written(drawn: tuple[bytes, list[tuple[int, bytes]], int]) -> bytes:
        data, places, fixed = bytearray(drawn[0]), drawn[1], drawn[2]
        for at, new in places:
            at %= len(data)
            data[at : at + len(new)] = new
            head = at - at % 512
            if fixed and len(data) >= head + 512:  # What is changed counts only with the right sum.
                block = data[head : head + 148] + b" " * 8 + data[head + 156 : head + 512]
                data[head + 148 : head + 156] = b"%06o\0 " % sum(block)
        return bytes(data[: len(data) - fixed])

    return st.one_of(
        st.tuples(st.sampled_from(made), changes, st.sampled_from((0, 1, 700))).map(written), st.binary(max_size=600)
    )


def endless_heads(kind: bytes, count: int) -> bytes:
    """So many headers, each of which is about the next one."""
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 512
    return (member.tobuf(tarfile.GNU_FORMAT) + b"11 path=abc".ljust(512, b"\0")) * count


@LENGTHS
def test_any_tar_of_a_sandbox_comes_whole_or_is_refused(examples: int, tmp_path: Path) -> None:
    """Nothing of it is outside its folder, nor larger than it."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    number = 0

    def take(data: bytes) -> None:
        nonlocal number
        number += 1
        target = tmp_path / "in" / str(number)
        try:
            trees.unpack(io.BytesIO(data), target)
        except OSError as error:  # Of a name that is too long, or a file where a folder is to be.
            assert error.errno
        finally:
            files = [path for path in target.rglob("*") if not path.is_dir()]
            assert not any(path.is_symlink() for path in files)
            assert sum(path.stat().st_size for path in files) <= len(data)
            assert sorted(os.listdir(tmp_path)) == ["in", "outside"]
            assert sorted(os.listdir(tmp_path / "in")) == [str(number)]
            trees_gone(target)

    give_anything(
        tars(),
        take,
        refusals=InvalidRequestError,
        examples=examples,
        broken=[b"no tar" * 1000, endless_heads(tarfile.XHDTYPE, 3000), endless_heads(tarfile.GNUTYPE_LONGNAME, 3000)],
    )
    assert outside.read_text() == "mine"


def trees_gone(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.chmod(0o700)
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_heads_of_a_tar_take_bounded_memory(tmp_path: Path) -> None:
    """One that says of itself that the name of what follows has 64 MiB."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**26
    give_anything(
        st.just(member.tobuf(tarfile.GNU_FORMAT) + b"a" * 2**26),
        lambda data: trees.unpack(io.BytesIO(data), tmp_path),
        refusals=InvalidRequestError,
        examples=1,
    )


@pytest.mark.parametrize(
    ("url", "token"),
    [
        *(("127.0.0.1:8890", "t"), ("ftp://a", "t"), ("http://", "t"), ("http://a:99999", "t"), ("http://[", "t")),
        *(("http://a b\n", "t"), ("http://a", "a\nb"), ("http://a", "ä")),
    ],
)
def test_what_is_no_server_is_refused_at_once(url: str, token: str) -> None:
    """Instead of a keeper that is said not to be reached."""
    with pytest.raises(InvalidRequestError) as raised:
        Where.find(url, token)
    assert raised.value.hint


def test_an_answer_that_cannot_be_unpacked_is_said_to_be_none() -> None:
    """One that says that it is compressed, and is not."""
    calls = Calls(Answering(200, b"{}", {"Content-Encoding": "gzip"}))
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:8890"):
        asyncio.run(calls.call("GET", "/sandboxes"))
    asyncio.run(calls.transport.close())


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_does_not_take_the_token_is_said_to_be_one(status: int) -> None:
    """Jupyter says no more than that."""
    calls = Calls(Answering(status, b'{"message": "Forbidden", "reason": null}'))
    with pytest.raises(UnauthenticatedError, match="token") as raised:
        now(calls.call("GET", "/sandboxes"))
    assert "token create" in raised.value.hint
    now(calls.transport.close())
