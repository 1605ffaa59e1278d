"""A real keeper answers as its OpenAPI document says, and does nothing that is not in it."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.integration.keeper.conftest import Configure
from tests.unit.extension.keeper.test_openapi import EXAMPLE, documented, served
from warmcell.extension.keeper.openapi import JSON, LINES, document
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.paths import Paths

pytestmark = pytest.mark.bubblewrap

API = "/warmcell/api/v1"
GPUS = [{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 2}]


MEMORY = re.compile(r".*/(?:suspend|resume|snapshot|restore|fork)|/snapshots/.*")


class Checked:
    """A client that compares each request and each answer with the document."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http
        self.document = document()
        self.used: set[tuple[str, str]] = set()

    async def __call__(self, method: str, path: str, status: int = 200, **how: Any) -> Any:
        answer = await self.http.request(method, path, **how)
        assert answer.status_code == status, (method, path, answer.status_code, answer.text)
        template, operation = self._operation(method, path.partition("?")[0])
        if status < 400:
            self.used.add((method, template))
            if "json" in how:
                self._check(how["json"], operation["requestBody"]["content"][JSON]["schema"])
        said = operation["responses"].get(str(status), operation["responses"]["default"])
        if status == 204:
            assert (answer.content, "content" in said) == (b"", False)
            return None
        (kind,) = said["content"]
        assert answer.headers["Content-Type"].partition(";")[0] == kind, (method, path)
        if kind == JSON:
            self._check(answer.json(), said["content"][kind]["schema"])
            return answer.json()
        return [json.loads(line) for line in answer.text.splitlines()] if kind == LINES else answer.content

    def _operation(self, method: str, path: str) -> tuple[str, dict[str, Any]]:
        for template, verbs in self.document["paths"].items():
            if method.lower() in verbs and re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path):
                return template, verbs[method.lower()]
        raise AssertionError(f"{method} {path} is not in the document")

    def _check(self, value: Any, schema: dict[str, Any]) -> None:
        Draft202012Validator({**schema, "components": self.document["components"]}).validate(value)


@pytest.fixture
def configure(configure: Configure) -> Configure:
    """GPUs to look at, and archives to bring in."""
    configure(backend="bubblewrap", keeper_idle_s=0.2, prepared=0, simulated_gpus=GPUS, import_snapshots=True)
    return configure


@pytest.fixture
async def ask(keeper: KeeperClient) -> AsyncIterator[Checked]:
    """For a principal."""
    made = await keeper.post("/tokens", {"principal": "ann", "quota": {"sandboxes": 4, "cpus": 8.0}})
    transport = httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket))
    headers = {"Authorization": f"Bearer {made['token']}"}
    async with httpx.AsyncClient(
        transport=transport, base_url=f"http://keeper{API}", headers=headers, timeout=120
    ) as http:
        yield Checked(http)


async def test_answers_are_as_the_document_says(keeper: KeeperClient, ask: Checked) -> None:
    """All verbs of a sandbox that need no saved memory, good and bad; what is not in the document does nothing."""
    assert (await ask("GET", "/openapi.json"))["openapi"].startswith("3.1")
    assert len((await ask("GET", "/gpus"))["gpus"]) == 2
    await ask("POST", "/check", json={"spec": {"gpu": "A100"}})
    wanted = {"spec": {"preload": [], "limits": {"memory_bytes": 2**30}}, "terms": {"tags": {"a": "b"}}}
    info = await ask("POST", "/sandboxes", 201, json=wanted)
    box = f"/sandboxes/{info['id']}"
    assert info["terms"]["tags"] == {"a": "b"}
    for refused in ({"spec": {"gpu": "H900"}}, {"spec": {"mounts": []}}, {"terms": {"x": 1}}):
        await ask("POST", "/sandboxes", 400, json=refused)
    await ask("GET", "/sandboxes?tag=a=b&limit=1&state=running")
    await ask("GET", "/sandboxes/nosuch", 404)
    await ask("GET", box)
    await ask("PATCH", box, json={"timeout_s": None})
    await ask("POST", f"{box}/connect", json={"timeout_s": 60})
    await ask("GET", f"{box}/metrics")

    command = await ask("POST", f"{box}/commands", 201, json={"id": "c1", "argv": ["cat"], "stdin": True})
    await ask("POST", f"{box}/commands/c1/stdin?close=1", content=b"hello")
    assert (await ask("GET", f"{box}/commands/c1?wait=60"))["exit_code"] == 0
    assert (await ask("GET", f"{box}/commands/c1/output"))[-1]["ended"]["id"] == command["id"]
    shell = {"id": "c2", "argv": ["sleep", "600"], "pty": {"rows": 24, "columns": 80}}
    await ask("POST", f"{box}/commands", 201, json=shell)
    await ask("POST", f"{box}/commands/c2/resize", json={"rows": 30, "columns": 90})
    await ask("POST", f"{box}/commands/c2/signal", json={"signum": 9})
    await ask("DELETE", f"{box}/commands/c2", 204)
    await ask("GET", f"{box}/commands")
    await ask("POST", f"{box}/commands", 409, json={"id": "c2", "argv": ["true"]})

    run = await ask("POST", f"{box}/runs", 201, json={"id": "r1", "code": "1 + 1"})
    assert run["state"] in ("waiting", "running", "ended")
    assert (await ask("GET", f"{box}/runs/r1?wait=60"))["status"] == "ok"
    assert (await ask("GET", f"{box}/runs/r1/output?until=now"))[-1]["run"]["id"] == "r1"
    await ask("POST", f"{box}/runs?follow=1", json={"code": "print(1)"})
    await ask("POST", f"{box}/interrupt")
    await ask("DELETE", f"{box}/runs/r1", 204)
    await ask("GET", f"{box}/runs")
    await ask("POST", f"{box}/contexts", 201, json={"id": "other"})
    await ask("GET", f"{box}/contexts")
    await ask("POST", f"{box}/contexts/other/restart")
    await ask("DELETE", f"{box}/contexts/other", 204)

    await ask("PUT", f"{box}/files?path=d/a.txt&parents=1", content=b"text")
    assert await ask("GET", f"{box}/files?path=d/a.txt") == b"text"
    await ask("GET", f"{box}/files?path=nosuch", 404)
    await ask("GET", f"{box}/files/stat?path=d/a.txt")
    await ask("GET", f"{box}/files/list?path=d")
    await ask("POST", f"{box}/files/mkdir", json={"path": "e"})
    await ask("POST", f"{box}/files/move", json={"source": "d/a.txt", "target": "e/b.txt"})
    signed = await ask("POST", f"{box}/files/url", json={"path": "e", "tree": True, "expires_in_s": 60})
    assert signed["path"].startswith(f"{API}{box}/files/tree?path=e&ticket=")
    await ask("POST", f"{box}/files/url", 400, json={"path": "e", "operation": "run"})
    shown = await ask("POST", f"{box}/ports/8000", json={})
    assert shown["path"].startswith(f"/warmcell/ports/8000-{info['id']}/")
    await ask("POST", f"{box}/ports/70000", 404, json={})
    await ask("GET", f"{box}/ports/8000/tunnel", 400)
    tree = await ask("GET", f"{box}/files/tree?path=e")
    await ask("PUT", f"{box}/files/tree?path=f", content=tree)
    await ask("POST", f"{box}/files/compose", json={"sources": ["f/b.txt"], "target": "g.txt"})
    await ask("DELETE", f"{box}/files?path=d&recursive=1", 204)

    await ask("GET", "/snapshots")
    await ask("GET", "/snapshots/nosuch", 404)
    await ask("GET", "/principals/self")

    for path, verbs in served().items():  # The user may do all, and yet not this.
        for verb in verbs - documented()[path]:
            place = (
                path.replace(f"/sandboxes/{EXAMPLE}", box)
                .replace(f"ports/{EXAMPLE}", "ports/80")
                .replace(EXAMPLE, "c1")
            )
            transport = httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket))
            async with httpx.AsyncClient(transport=transport, base_url=f"http://keeper{API}", timeout=60) as http:
                answer = await http.request(verb, place, json={})
            assert 400 <= answer.status_code < 500, (verb, place, answer.status_code)
    token = ask.http.headers.pop("Authorization")  # What is the user's alone.
    for _ in range(2):
        assert list((await ask("GET", "/meters"))["sandboxes"]) == [info["id"]]
    assert [row["sandbox_id"] for row in (await ask("GET", "/usage?by=sandbox"))["rows"]] == [info["id"]]
    assert len((await ask("GET", "/gpus"))["gpus"]) == 2
    ask.http.headers["Authorization"] = token
    await ask("DELETE", box, 204)
    await ask("DELETE", "/principals/self")
    left = {(verb.upper(), path) for path, verbs in ask.document["paths"].items() for verb in verbs} - ask.used
    elsewhere = {  # test_runs.py, test_tokens.py, test_gpus.py, test_urls.py, and the browser tests
        ("POST", "/sandboxes/{sandbox_id}/run"),
        ("GET", "/events"),
        ("DELETE", "/sandboxes/{sandbox_id}/queue"),
        ("GET", "/sandboxes/{sandbox_id}/ports/{port}/tunnel"),
        ("POST", "/sandboxes/{sandbox_id}/park"),
        ("POST", "/sandboxes/{sandbox_id}/wake"),
        ("POST", "/sandboxes/{sandbox_id}/gpu"),
    }
    assert {(verb, path) for verb, path in left if not MEMORY.fullmatch(path)} == elsewhere


@pytest.mark.criu
async def test_answers_about_memory_are_as_the_document_says(keeper: KeeperClient, ask: Checked) -> None:
    """Snapshots, forks, suspension, and archives, which are the user's."""
    info = await ask("POST", "/sandboxes", 201, json={"spec": {"preload": []}})
    box = f"/sandboxes/{info['id']}"
    saved = await ask("POST", f"{box}/snapshot", 201, json={"name": "one"})
    await ask("GET", "/snapshots")
    await ask("GET", f"/snapshots/one?sandbox_id={info['id']}")
    await ask("POST", f"{box}/restore", json={"snapshot": "one"})
    await ask("POST", f"{box}/fork", 201, json={"n": 1})
    await ask("POST", f"{box}/suspend", json={})
    await ask("POST", f"{box}/resume", json={})
    await ask("PATCH", f"/snapshots/{saved['id']}", json={"name": "two"})
    del ask.http.headers["Authorization"]
    await ask("GET", "/snapshots")
    await ask("POST", f"/snapshots/{saved['id']}/verify")
    archive = await ask("GET", f"/snapshots/{saved['id']}/export?files_only=1")
    brought = await ask("POST", "/snapshots/import?name=three", 201, content=archive)
    await ask("POST", f"/snapshots/{brought['id']}/compress")
    await ask("DELETE", f"/snapshots/{saved['id']}", 204)
    left = {(verb.upper(), path) for path, verbs in ask.document["paths"].items() for verb in verbs} - ask.used
    assert {(verb, path) for verb, path in left if MEMORY.fullmatch(path)} == set()
