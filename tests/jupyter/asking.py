"""Whoever asks for the files of a sandbox, over both surfaces of a server, and the paths that lead astray."""

import base64
import hashlib
import io
import json
import socket
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from warmcell import Sandbox
from warmcell.extension.server.e2b.handler import PREFIX

API = "/warmcell/api/v1"
TRAPS = """
import os, shutil, socket, sys
host = sys.argv[1]
shutil.rmtree("t", ignore_errors=True)
os.makedirs("t/folder/sub")
os.chdir("t")
for name in (b"plain", b"folder/sub/file", b"new\\nline", b"\\xff\\xfe"):
    with open(name, "w") as file:
        file.write("mine")
os.link("plain", "hard")
for name, target in (("to_file", host + "/secret"), ("to_folder", host), ("by_proc", "/proc/1/root" + host)):
    os.symlink(target, name)
os.symlink("loop", "loop")
os.symlink("/dev/zero", "to_device")
os.mkfifo("pipe")
socket.socket(socket.AF_UNIX).bind("socket")
os.utime("folder", (2**40, 2**40))
"""


class Asks:
    """Both surfaces of one sandbox."""

    def __init__(self, http: httpx.Client, server: Mapping[str, str], host: Path) -> None:
        self.http, self.host, self.url = http, host, server["url"]
        self.rest = {"Authorization": f"token {server['token']}"}
        body = {"templateID": "base", "timeout": 600}
        made = http.post(f"{PREFIX}/v2/sandboxes", json=body, headers={"X-API-KEY": server["token"]}).json()
        self.id = made["sandboxID"]
        self.e2b = {"E2b-Sandbox-Id": self.id, "E2b-Sandbox-Port": "49983", "X-Access-Token": made["envdAccessToken"]}
        self.box = Sandbox.connect(self.id, url=server["url"], token=server["token"])

    def set_traps(self) -> None:
        """Have them all there, as new."""
        done = self.box.exec("python", "-c", TRAPS, str(self.host))
        assert done.exit_code == 0, done.stderr

    def files(self, method: str, path: str, verb: str = "", more: str = "", **how: Any) -> httpx.Response:
        """REST, of one path in the query."""
        url = f"{API}/sandboxes/{self.id}/files{verb}?path={quoted(path)}{more}"
        return self.http.request(method, url, headers=self.rest, **how)

    def post(self, verb: str, **body: str) -> httpx.Response:
        """REST, with paths in the body."""
        return self.http.post(f"{API}/sandboxes/{self.id}/{verb}", content=json.dumps(body), headers=self.rest)

    def signed(self, path: str, operation: str, **how: Any) -> httpx.Response:
        """What a URL that was made for a path gives to anybody."""
        made = self.post("files/url", path=path, operation=operation)
        if made.status_code != httpx.codes.OK:
            return made
        return self.http.request(made.json()["method"], made.json()["path"], **how)

    def e2b_signed(self, path: str) -> httpx.Response:
        """A URL of E2B's, as its clients sign them."""
        said = ":".join((path, "read", "", self.e2b["X-Access-Token"])).encode(errors="surrogatepass")
        signature = "v1_" + base64.b64encode(hashlib.sha256(said).digest()).decode().rstrip("=")
        url = f"{PREFIX}/files?path={quoted(path)}&signature={quote(signature, safe='')}"
        headers = {name: value for name, value in self.e2b.items() if name != "X-Access-Token"}
        return self.http.get(url, headers=headers)

    def call(self, name: str, **body: Any) -> httpx.Response:
        """E2B's filesystem service."""
        url, headers = f"{PREFIX}/filesystem.Filesystem/{name}", {**self.e2b, "Content-Type": "application/json"}
        return self.http.post(url, content=json.dumps(body), headers=headers)

    def envd(self, method: str, path: str, **how: Any) -> httpx.Response:
        """E2B's plain files."""
        headers = {**self.e2b, **how.pop("headers", {})}
        return self.http.request(method, f"{PREFIX}/files?path={quoted(path)}", headers=headers, **how)


def quoted(path: str) -> str:
    """As it is in a URL, also where it is no text."""
    try:
        return quote(path, safe="", errors="surrogateescape")
    except UnicodeEncodeError:
        return quote(path, safe="", errors="surrogatepass")


def tar(host: Path) -> bytes:
    """One with members that lead elsewhere, and one that does not."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, kind, target in (
            ("good", tarfile.REGTYPE, ""),
            ("../../../../../../../../escaped", tarfile.REGTYPE, ""),
            (f"{host}/escaped", tarfile.REGTYPE, ""),
            ("link", tarfile.SYMTYPE, str(host)),
            ("link/escaped", tarfile.REGTYPE, ""),
            ("device", tarfile.CHRTYPE, ""),
            ("pipe", tarfile.FIFOTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"evil"))
    return data.getvalue()


def watched(asks: Asks, path: str) -> httpx.Response:
    made = asks.call("CreateWatcher", path=path)
    if made.status_code == httpx.codes.OK:
        asks.call("RemoveWatcher", watcherId=made.json()["watcherId"])
    return made


VERBS: Mapping[str, Callable[[Asks, str], httpx.Response]] = {
    "read": lambda asks, path: asks.files("GET", path),
    "write": lambda asks, path: asks.files("PUT", path, content=b"evil"),
    "list": lambda asks, path: asks.files("GET", path, "/list", "&depth=3"),
    "stat": lambda asks, path: asks.files("GET", path, "/stat"),
    "stat_through": lambda asks, path: asks.files("GET", path, "/stat", "&follow=1"),
    "move_from": lambda asks, path: asks.post("files/move", source=path, target="t/moved"),
    "move_to": lambda asks, path: asks.post("files/move", source="t/plain", target=path),
    "remove": lambda asks, path: asks.files("DELETE", path),
    "remove_all": lambda asks, path: asks.files("DELETE", path, more="&recursive=1"),
    "mkdir": lambda asks, path: asks.post("files/mkdir", path=path),
    "upload_tree": lambda asks, path: asks.files("PUT", path, "/tree", content=tar(asks.host)),
    "download_tree": lambda asks, path: asks.files("GET", path, "/tree"),
    "signed_read": lambda asks, path: asks.signed(path, "read"),
    "signed_write": lambda asks, path: asks.signed(path, "write", content=b"evil"),
    "e2b_stat": lambda asks, path: asks.call("Stat", path=path),
    "e2b_list": lambda asks, path: asks.call("ListDir", path=path, depth=3),
    "e2b_mkdir": lambda asks, path: asks.call("MakeDir", path=path),
    "e2b_move_from": lambda asks, path: asks.call("Move", source=path, destination="t/moved"),
    "e2b_move_to": lambda asks, path: asks.call("Move", source="t/plain", destination=path),
    "e2b_remove": lambda asks, path: asks.call("Remove", path=path),
    "e2b_watch": watched,
    "e2b_signed": lambda asks, path: asks.e2b_signed(path),
    "e2b_read": lambda asks, path: asks.envd("GET", path),
    "e2b_write": lambda asks, path: asks.envd(
        "POST", path, content=b"evil", headers={"Content-Type": "application/octet-stream"}
    ),
    "e2b_form": lambda asks, path: asks.envd("POST", path, files={"file": ("name", b"evil")}),
}


def traps(host: Path) -> dict[str, str]:
    """Paths that lead astray, by what is wrong with them."""
    there = (
        "to_file",
        "to_folder",
        "to_folder/secret",
        "by_proc/secret",
        "loop",
        "to_device",
        "pipe",
        "socket",
        "hard",
    )
    named = ("new\nline", "a\0b", "\udcff\udcfe", "\ud800", "x" * 300)
    return {
        "dots": f"../../../../../../../..{host}/secret",
        "absolute": f"{host}/secret",
        **{f"t/{name}": f"t/{name}" for name in (*there, *named)},
        "device": "/dev/zero",
        "long": "x" * 5000,
        "deep": "a/" * 2000,
        "none": "",
    }


def framed(message: bytes) -> bytes:
    """As Connect has it."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def until(raw: socket.socket, words: bytes) -> bytes:
    """What comes, up to these words."""
    got = b""
    while words not in got:
        piece = raw.recv(65536)
        assert piece, got
        got += piece
    return got
