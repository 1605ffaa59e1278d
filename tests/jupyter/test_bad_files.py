"""Files of sandboxes, asked for by whoever means harm: every verb of every surface, with every path that leads astray.

One server and one sandbox for all. Answers are typed and come in time, and the host's files are what they were.
"""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.jupyter.asking import API, VERBS, Asks, framed, traps, until
from tests.leaks import Places, own_places
from warmcell import Sandbox
from warmcell.extension.server.e2b.handler import PREFIX

pytestmark = pytest.mark.bubblewrap

SECRET = "of the host"
END_TIMEOUT_S = 120
STALLED_S = 5
LACKING = (501, 503, 507)
"""Statuses above 499 that are answers."""


@pytest.fixture(scope="module")
def home() -> Iterator[Places]:
    """Directories of one server and its keeper for all tests of this module."""
    with own_places() as made:
        config = made.root / "jupyter" / "config"
        config.mkdir(parents=True)
        lines = ("backend = 'bubblewrap'", "keeper_idle_s = 0.2", "prepared = 0", f"stalled_after = {STALLED_S}")
        (config / "jupyter_warmcell_config.py").write_text("\n".join(f"c.Warmcell.{line}" for line in lines))
        yield made


@pytest.fixture(scope="module")
def server(home: Places) -> Iterator[dict[str, str]]:
    """`warmcell serve`: its URL and its token."""
    argv = [str(Path(sys.executable).parent / "warmcell"), "serve", "--json", "--port", "0"]
    process = subprocess.Popen(
        argv, env={**os.environ, **home.env}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.communicate(timeout=END_TIMEOUT_S)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the host's, that no sandbox was given."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "secret").write_text(SECRET)
    (folder / "sub").mkdir()
    (folder / "sub" / "other").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def asks(server: dict[str, str], host: Path) -> Iterator["Asks"]:
    """Whoever asks, for one sandbox."""
    with httpx.Client(base_url=server["url"], timeout=60) as http:
        made = Asks(http, server, host)
        yield made
        made.box.kill()
        made.box.close()


def everything(folder: Path) -> list[tuple[str, int, int, bytes]]:
    """What is in a folder of the host's, and since when."""
    found = [(path, path.lstat()) for path in (folder, *sorted(folder.rglob("*")))]
    return [
        (str(path), told.st_mode, told.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path, told in found
    ]


def problem(answer: httpx.Response) -> str:
    """Why it is none: an accident, without words or a cure where it is a refusal, or with something of the host's."""
    if SECRET.encode() in answer.content:
        return "tells what is the host's"
    if answer.status_code >= 500 and answer.status_code not in LACKING:
        return f"{answer.status_code} {answer.text}"
    if answer.status_code >= 400 and not (answer.json()["message"] and answer.json().get("hint", "E2B's have none")):
        return f"no words: {answer.text}"
    return ""


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("every", [pytest.param(6, id="short"), pytest.param(1, id="long", marks=pytest.mark.long)])
def test_paths_lead_nowhere_but_into_the_sandbox(asks: Asks, host: Path, verb: str, every: int) -> None:
    """Each verb with each trap (in the short form with every sixth, each verb with others): a typed answer,
    and neither a byte of the host's files nor a change of them.
    """
    asks.set_traps()
    before = everything(host)
    answers = {
        name: VERBS[verb](asks, path)
        for number, (name, path) in enumerate(traps(host).items(), list(VERBS).index(verb))
        if number % every == 0
    }
    assert {name: why for name, answer in answers.items() if (why := problem(answer))} == {}
    assert everything(host) == before
    told = {name: answer.status_code for name, answer in answers.items()}
    none = ("long", "t/a\0b") if verb == "e2b_form" else ("long", "t/a\0b", "none")  # A form has a name of its own.
    assert {told[name] for name in none if name in told} <= {400}, told
    if verb in ("read", "signed_read", "e2b_read", "e2b_signed", "write", "signed_write", "e2b_write"):
        assert {told[name] for name in ("t/to_device", "device", "t/pipe", "t/socket", "t/loop") if name in told} <= {
            400
        }


def test_names_are_taken_byte_for_byte(asks: Asks) -> None:
    """No character of a path becomes another, so that never another file is meant; no text at all is one, too."""
    asks.set_traps()
    assert asks.files("GET", "t/\udcff\udcfe").text == asks.files("GET", "t/new\nline").text == "mine"
    assert asks.files("PUT", "t/a\x01b", content=b"1").json()["name"] == "a\x01b"
    for gone in ("t/a b", "t/a\x02b"):
        assert asks.files("DELETE", gone).status_code == httpx.codes.NOT_FOUND
        assert asks.envd("GET", gone).status_code == httpx.codes.NOT_FOUND
    assert asks.envd("GET", "t/a\x01b").text == "1"


RACE = """
import itertools, os, sys, time
os.chdir("t")
for number in itertools.count():
    kind = number % 4
    if kind == 0:
        os.symlink(sys.argv[1] + "/secret", "next")
    elif kind == 1:
        os.mkfifo("next")
    elif kind == 2:
        os.symlink(sys.argv[1], "next")
    else:
        open("next", "w").write("mine")
    os.rename("next", "race")
    if number == 4:
        print("begun", flush=True)
    time.sleep(0.0005)
"""


def test_links_that_are_swapped_lead_nowhere_either(asks: Asks, host: Path) -> None:
    """What is a file when it is looked at, and a pipe or a link to the host when it is opened: an answer, in time."""
    asks.set_traps()
    before = everything(host)
    swapping, begun = asks.box.spawn("python", "-c", RACE, str(host)), threading.Event()
    listening = threading.Thread(target=lambda: swapping.wait(on_stdout=lambda _: begun.set()))
    listening.start()
    try:
        assert begun.wait(60)
        for number in range(5):
            read, tree = asks.files("GET", "t/race"), asks.files("GET", "t", "/tree")
            written, copied = asks.files("PUT", "t/race", content=b"mine"), asks.envd("GET", "t/race")
            for answer in (read, tree, written, copied):
                assert problem(answer) == "", number
            with tarfile.open(fileobj=io.BytesIO(tree.content)) as archive:
                assert "plain" in archive.getnames()
    finally:
        swapping.kill()
        listening.join()
    assert everything(host) == before


def test_a_full_disk_is_said_and_nothing_is_there_by_half(asks: Asks, server: Mapping[str, str]) -> None:
    """By each way in: 507; the file of before is what it was, and there is room again."""
    with Sandbox(url=server["url"], token=server["token"], disk="16MiB", preload=()) as small:
        small.files.write("in/kept", "old")
        large = bytes(24 * 2**20)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tree:
            for name, content in (("first", b"1"), ("kept", large)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tree.addfile(member, io.BytesIO(content))
        url = f"{API}/sandboxes/{small.id}/files"
        control = {"X-API-KEY": server["token"]}
        made = asks.http.post(f"{PREFIX}/sandboxes/{small.id}/connect", json={"timeout": 300}, headers=control).json()
        envd = {**asks.e2b, "E2b-Sandbox-Id": small.id, "X-Access-Token": made["envdAccessToken"]}
        for status, answer in (
            (507, asks.http.put(f"{url}?path=in/kept", content=large, headers=asks.rest)),
            (507, asks.http.put(f"{url}/tree?path=in", content=archive.getvalue(), headers=asks.rest)),
            (507, asks.http.post(f"{PREFIX}/files?path=in/kept", files={"file": ("x", large)}, headers=envd)),
            (507, asks.http.post(f"{PREFIX}/files?path=in/kept", content=large, headers=envd)),
        ):
            assert (answer.status_code, problem(answer)) == (status, ""), answer.text
        assert small.files.read("in/kept") == b"old"
        assert {one.name for one in small.files.list("in")} == {"kept", "first"}
        small.files.write("in/later", bytes(8 * 2**20))


def test_who_stands_still_is_given_up(asks: Asks, home: Places) -> None:
    """An upload that stops, and a download that nobody reads: others go on, and in the end nothing is held for them."""
    asks.box.exec("sh", "-c", "mkdir -p s; head -c 64M /dev/zero > s/large")
    with contextlib.ExitStack() as opened:
        stops, waits = (opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        for one in (stops, waits):
            one.settimeout(60)
            one.connect(str(home.runtime / "keeper.sock"))
        url = f"{API}/sandboxes/{asks.id}/files?path=s/"
        stops.sendall(f"PUT {url}half HTTP/1.1\r\nHost: k\r\nContent-Length: 1000000\r\n\r\n".encode() + bytes(1000))
        waits.sendall(f"GET {url}large HTTP/1.1\r\nHost: k\r\n\r\n".encode())
        assert asks.files("PUT", "s/other", content=b"1").status_code == httpx.codes.OK
        assert asks.files("GET", "s/other").text == "1"
        assert stops.recv(4096).startswith(b"HTTP/1.1 504 ")
        running = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c [f]iles.py"
        deadline = time.monotonic() + 60
        while asks.box.exec("sh", "-c", running).stdout.strip() != "0":
            assert time.monotonic() < deadline
        read = 0
        with contextlib.suppress(ConnectionError):
            while piece := waits.recv(2**20):
                read += len(piece)
        assert 0 < read < 64 * 2**20
    assert [one.name for one in asks.box.files.list("s")] == ["large", "other"]


def test_half_closed_streams_end_nothing_but_themselves(asks: Asks) -> None:
    """A stream of input that breaks off in a message, and a caller of Start who says no more: the command goes on."""
    command = asks.box.spawn("cat", tag="half")
    where = urlsplit(asks.url)
    assert where.hostname is not None
    selector = json.dumps({"start": {"process": {"tag": "half"}}}).encode()
    start = json.dumps({"process": {"cmd": "sleep", "args": ["600"]}, "tag": "halfstart"}).encode()
    for name, body, size in (
        ("StreamInput", framed(selector) + b"\0\0\0\1\0half", 10_000),
        ("Start", framed(start), len(framed(start))),
    ):
        with socket.create_connection((where.hostname, where.port), timeout=60) as raw:
            head = [f"POST {PREFIX}/process.Process/{name} HTTP/1.1", f"Host: {where.netloc}"]
            head += [f"{key}: {value}" for key, value in asks.e2b.items()]
            head += ["Content-Type: application/connect+json", f"Content-Length: {size}", "", ""]
            raw.sendall("\r\n".join(head).encode() + body)
            if name == "Start":
                assert b'"start"' in until(raw, b'"pid"')
            raw.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while raw.recv(65536):
                    pass
    assert {info.tag for info in (one.info() for one in asks.box.commands()) if info.state == "running"} >= {
        "half",
        "halfstart",
    }
    command.write("whole\n")
    command.close_stdin()
    assert command.wait().stdout == "whole\n"
    for one in asks.box.commands():
        if one.info().tag == "halfstart":
            one.kill()


def test_one_that_was_killed_is_said_to_be(asks: Asks, server: Mapping[str, str], host: Path) -> None:
    """Every verb afterwards: there is none; killed again, over either surface, it is as gone as before."""
    ended = Asks(asks.http, server, host)
    control = {"X-API-KEY": server["token"]}
    assert asks.http.delete(f"{API}/sandboxes/{ended.id}", headers=asks.rest).status_code == httpx.codes.NO_CONTENT
    assert asks.http.delete(f"{API}/sandboxes/{ended.id}", headers=asks.rest).status_code == httpx.codes.NO_CONTENT
    again = asks.http.delete(f"{PREFIX}/sandboxes/{ended.id}", headers=control)
    assert again.status_code == httpx.codes.NOT_FOUND
    ended.box.close()
    for verb, ask in VERBS.items():
        answer = ask(ended, "plain")
        assert answer.json()["message"], verb
        assert answer.status_code in ((502, 503, 401, 404) if verb.startswith("e2b") else (404,)), (verb, answer.text)
