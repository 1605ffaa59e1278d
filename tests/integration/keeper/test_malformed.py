"""Whatever is sent to the keeper, by its user or by a guest: an answer with a cure, never a 500 or a traceback."""

import contextlib
import json
import random
import socket
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from tests.integration.keeper.conftest import KernelBody, until
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.paths import Paths

API = "http://k/warmcell/api/v1"
ROUNDS = 25
ODD: Sequence[Any] = (
    *(None, True, -1, 0, 1e300, 10**400, "", "\0", "\ud800", "../..", "a" * 5000, [], {}, [[]], {"": None}),
    *("none", "host", "A100:0", "process", ["\0"], {"A=B": "c"}, {"path": "/\0"}, [{"source": "\0"}]),
)
RAW = (b"", b"{", b"[]", b"null", b'{"a": NaN}', b'{"spec": {"limits": {"cpus": 1e999}}}', b"\xff", b"[" * 100_000)

VERBS = (
    ("GET", "/status"),
    ("GET", "/gpus"),
    ("GET", "/templates"),
    ("GET", "/sandboxes"),
    ("GET", "/sandboxes/abc"),
    ("DELETE", "/sandboxes/abc"),
    ("POST", "/check"),
    ("POST", "/sandboxes"),
    ("POST", "/sandboxes/abc/interrupt"),
    ("POST", "/sandboxes/abc/run"),
    ("POST", "/sandboxes/{box}/run"),
    ("POST", "/sandboxes/{box}/interrupt"),
    ("GET", "/kernels"),
    ("POST", "/kernels"),
    ("GET", "/kernels/abc"),
    ("GET", "/kernels/{kernel}?wait=nan"),
    ("GET", "/kernels/{kernel}?wait=x"),
    ("DELETE", "/kernels/abc"),
    ("POST", "/kernels/{kernel}/signal"),
    ("POST", "/kernels/{kernel}/end"),
    ("POST", "/kernels/{kernel}/adopt"),
    ("PUT", "/kernels"),
    ("GET", "/nowhere"),
)


def bodies(chance: random.Random, body: dict[str, Any]) -> list[bytes]:
    """The raw ones, and the sound one with something odd in one place of it."""
    made = list(RAW)
    for _ in range(ROUNDS):
        changed = json.loads(json.dumps(body))
        place = changed if chance.random() < 0.4 else changed["spec"]
        name = chance.choice([*place, "signum", "grace_s", "server", "code", "send", "get", "timeout_s"])
        place[name] = chance.choice(ODD)
        limits = {name: chance.choice(ODD) for name in ("memory_bytes", "pids", "cpus", "shm_bytes")}
        if chance.random() < 0.3 and isinstance(changed.get("spec"), dict):
            changed["spec"]["limits"] = limits
        made.append(json.dumps(changed).encode())
    return made


async def test_odd_requests_get_an_answer_on_every_verb(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """Seeded. No answer is a 500, every refusal has the wire form and a hint, and the log has no traceback."""
    chance = random.Random(20)
    body = kernel_body()
    kernel = await keeper.post("/kernels", body)
    box = (await keeper.post("/sandboxes", {"spec": body["spec"]}))["id"]
    # A start would be real where the odd field does no harm: an interpreter that is none refuses in the end.
    odd_one = kernel_body(spec={**body["spec"], "python": "/no/such/python"})
    transport = httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket))
    async with httpx.AsyncClient(transport=transport, timeout=60) as http:
        for verb, path in VERBS:
            sound = {"spec": body["spec"]} if path == "/check" else odd_one
            for content in bodies(chance, sound) if verb == "POST" else (b"",):
                url = API + path.format(box=box, kernel=body["kernel_id"])
                answer = await http.request(verb, url, content=content)
                assert answer.status_code < 500 or answer.status_code in (501, 503), (verb, path, content[:200])
                if answer.status_code >= 400:
                    told = answer.json()
                    assert set(told) == {"code", "message", "hint", "details"}, (verb, path, told)
                    assert told["hint"], (verb, path, content[:200], told)
    log = Paths.default().keeper_log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:4000]
    assert (await keeper.get(f"/sandboxes/{kernel['id']}"))["kernel_id"] == body["kernel_id"]


@pytest.mark.parametrize("size", [17 * 2**20, 2**40])
async def test_a_body_that_is_too_large_is_not_read(keeper: KeeperClient, size: int) -> None:
    """The connection is refused at its head; nothing is kept in memory."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(Paths.default().keeper_socket))
        client.sendall(f"POST /warmcell/api/v1/check HTTP/1.1\r\nContent-Length: {size}\r\n\r\n".encode())
        assert b" 400 " in client.recv(4096)
    assert (await keeper.get("/status"))["pid"]


async def test_a_guest_cannot_take_all_connections(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """Beyond its share connections are closed, and the keeper's own socket serves as before."""
    info = await keeper.post("/kernels", kernel_body())
    path = str(Paths.default().sandboxes / info["id"] / "run" / "api.sock")
    held = [socket.socket(socket.AF_UNIX) for _ in range(80)]
    try:
        for one in held:
            one.settimeout(60)
            one.connect(path)

        async def refused() -> bool:
            count = 0
            for one in held:
                one.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    count += one.recv(1) == b""
            return count == len(held) - 64

        await until(refused)
        assert (await keeper.get(f"/sandboxes/{info['id']}"))["state"] == "running"
    finally:
        for one in held:
            one.close()


async def test_a_guest_asks_within_its_own_bounds(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """It sees nothing of others, and cannot ask for a host path, a backend or a mount."""
    info = await keeper.post("/kernels", kernel_body())
    other = await keeper.post("/kernels", kernel_body())
    path = str(Paths.default().sandboxes / info["id"] / "run" / "api.sock")
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path), timeout=60) as guest:
        assert (await guest.get(f"{API}/sandboxes")).json()["sandboxes"] == []
        for url in ("/kernels", "/status", "/events", "/doctor", f"/sandboxes/{other['id']}"):
            assert (await guest.get(API + url)).status_code == 404, url
        assert (await guest.delete(f"{API}/sandboxes/{other['id']}")).status_code == 404
        for field in ("python", "backend", "mounts", "workspace", "env", "home"):
            answer = await guest.post(f"{API}/sandboxes", json={"spec": {field: "x"}})
            assert answer.status_code == 400, field
            assert "cannot be chosen" in answer.json()["message"]
    assert (await keeper.get(f"/sandboxes/{other['id']}"))["state"] == "running"
