"""Principals at a real keeper: each sees its own alone, has what token and quota allow, and goes with all it has."""

import asyncio
import itertools
import json
import re
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from tests.integration.keeper.conftest import Configure, until
from warmcell.extension.cli import main
from warmcell.extension.keeper.openapi import OPERATIONS
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.paths import Paths

pytestmark = pytest.mark.bubblewrap

API = "/warmcell/api/v1"
BOX = {"spec": {"preload": []}}
GPUS = [{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 4}]

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")

Ask = Callable[..., Any]


def below(path: str, names: Mapping[str, str]) -> str:
    """What comes after the id in a path of the document, with something for each other name in it."""
    return re.sub(r"{(\w+)}", lambda found: names[found[1]], path.partition("}")[2])


@pytest.fixture
def configure(configure: Configure) -> Configure:
    """The cheapest sandboxes, with GPUs to ask for."""
    configure(backend="bubblewrap", keeper_idle_s=0.2, prepared=0, simulated_gpus=GPUS)
    return configure


@pytest.fixture
async def who(keeper: KeeperClient) -> AsyncIterator[Callable[..., Any]]:
    """`await who("ann", quota={…})`: a client with a new token of hers."""
    async with AsyncExitStack() as stack:

        async def client(name: str, **body: Any) -> httpx.AsyncClient:
            made = await keeper.post("/tokens", {"principal": name, **body})
            transport = httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket))
            return await stack.enter_async_context(
                httpx.AsyncClient(
                    transport=transport,
                    base_url=f"http://keeper{API}",
                    headers={"Authorization": f"Bearer {made['token']}"},
                    timeout=60,
                )
            )

        yield client


async def test_principals_do_not_see_each_other_over_any_verb(keeper: KeeperClient, who: Ask) -> None:
    """Another's sandbox answers each verb as one that does not exist; nothing of it is touched. The user sees all."""
    ann, bob = await who("ann"), await who("bob")
    box = (await ann.post("/sandboxes", json=BOX)).json()
    assert box["principal"] == "ann"
    users = await keeper.post("/sandboxes", {"spec": {"python": sys.executable, **BOX["spec"]}})
    assert [one["id"] for one in (await ann.get("/sandboxes")).json()["sandboxes"]] == [box["id"]]
    assert (await bob.get("/sandboxes")).json()["sandboxes"] == []
    assert {one["id"] for one in (await keeper.get("/sandboxes"))["sandboxes"]} == {box["id"], users["id"]}
    await ann.put(f"/sandboxes/{box['id']}/files?path=hers", content=b"hers")
    await ann.post(f"/sandboxes/{box['id']}/commands", json={"id": "c1", "argv": ["sleep", "600"]})
    there = {"command_id": "c1", "run_id": "r1", "context_id": "default", "port": "8000"}
    paths = [below(path, there) for path in OPERATIONS if path.startswith("/sandboxes/{sandbox_id}")]
    for stranger, sandbox_id in ((bob, box["id"]), (bob, users["id"]), (ann, users["id"])):
        for method, path in itertools.product(METHODS, [*paths, "/whatever"]):
            places = [f"/sandboxes/{one}{path}?path=hers" for one in (sandbox_id, "nosuchid")]
            real, none = [await stranger.request(method, place, json={}) for place in places]
            assert real.status_code == none.status_code, (method, path)
            assert real.text.replace(sandbox_id, "nosuchid") == none.text, (method, path)
            assert real.status_code == (204 if (method, path) == ("DELETE", "") else 404), (method, path)
    assert (await bob.put(f"/sandboxes/{box['id']}/values/1", content=b"x")).status_code == 404
    look = "import glob; print(6 * 7, glob.glob('/run/warmcell/values*'))"
    run = await ann.post(f"/sandboxes/{box['id']}/runs?follow=1", json={"code": look})
    assert (await ann.get(f"/sandboxes/{box['id']}/commands/c1")).json()["state"] == "running"
    assert (await ann.get(f"/sandboxes/{box['id']}/files?path=hers")).content == b"hers"
    assert '"42 []\\n"' in run.text
    assert {one["state"] for one in (await keeper.get("/sandboxes"))["sandboxes"]} == {"running"}


async def test_what_is_not_for_principals_is_not_there(keeper: KeeperClient, who: Ask) -> None:
    """Kernels with their keys, tokens, images and others' principals; a scope that is missing is named."""
    ann, reader, runner = await who("ann"), await who("ann", scopes=["read"]), await who("ann", scopes=["run"])
    for method, path in (
        *(("GET", path) for path in ("/kernels", "/tokens", "/principals", "/status", "/images", "/doctor")),
        *(("POST", path) for path in ("/kernels", "/tokens", "/images", "/snapshots/import")),
        ("GET", "/principals/bob"),
        ("DELETE", "/principals/bob"),
        ("GET", "/snapshots/some/export"),
    ):
        assert (await ann.request(method, path, json={})).status_code == 404, (method, path)
    refused = await reader.post("/sandboxes", json=BOX)
    assert (refused.status_code, refused.json()["details"]) == (403, {"scope": "run"})
    assert (await runner.get("/sandboxes")).json()["details"] == {"scope": "read"}
    for any_of_hers in (reader, runner):  # So that servers may ask whether it is still valid.
        assert (await any_of_hers.get("/principals/self")).json()["name"] == "ann"
    assert (await ann.post("/sandboxes", json={"spec": {"mounts": [{"source": "/etc"}]}})).status_code == 400
    for path in ("/sandboxes", "/check"):
        refused = await ann.post(path, json={"spec": {"image": "somebodys:latest", "backend": "docker"}})
        assert (refused.status_code, "principal_images" in refused.json()["hint"]) == (400, True)
    events = ann.stream("GET", "/events")
    async with events as response:
        lines = response.aiter_lines()
        assert await anext(lines) == "event: hello"
        assert await anext(lines) == 'data: {"sandboxes": [], "templates": []}'


async def test_a_token_that_is_revoked_is_of_no_use_at_once(
    keeper: KeeperClient, who: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its principal's other tokens are; a principal that is removed takes its sandboxes along, and nobody else's."""
    ann, again, bob = await who("ann"), await who("ann"), await who("bob")
    for client in (ann, ann, bob):
        assert (await client.post("/sandboxes", json=BOX)).status_code == 201
    first = (await keeper.get("/tokens"))["tokens"][0]
    assert await asyncio.to_thread(main, ["token", "revoke", first["id"]]) == 0
    assert (await ann.get("/sandboxes")).status_code == 401
    assert len((await again.get("/sandboxes")).json()["sandboxes"]) == 2
    assert await asyncio.to_thread(main, ["token", "revoke", "--everything", "ann"]) == 0
    assert "Removed ann: 1 tokens, 2 sandboxes, 0 snapshots." in capsys.readouterr().out
    assert (await again.get("/sandboxes")).status_code == 401
    assert [one["principal"] for one in (await keeper.get("/sandboxes"))["sandboxes"]] == ["bob"]
    gone = (await bob.delete("/principals/self")).json()
    assert (len(gone["sandboxes"]), gone["tokens"]) == (1, [])
    assert (await bob.get("/sandboxes")).json()["sandboxes"] == []


async def test_quotas_hold_also_for_what_is_asked_for_at_once(keeper: KeeperClient, who: Ask) -> None:
    """Two sandboxes and three cores: of many at once no more come up, and each has a cap."""
    quota = {"sandboxes": 2, "cpus": 3.0, "memory_bytes": 8 * 2**30}
    ann = await who("ann", quota=quota)
    answers = await asyncio.gather(*(ann.post("/sandboxes", json=BOX) for _ in range(5)))
    assert sorted(one.status_code for one in answers) == [201, 201, 429, 429, 429]
    refused = next(one.json() for one in answers if one.status_code == 429)
    assert (refused["code"], refused["details"]["quota"]) == ("quota_exceeded", "sandboxes")
    me = (await ann.get("/principals/self")).json()
    assert me["used"] == {
        "sandboxes": 2,
        "cpus": 2.0,
        "memory_bytes": 4 * 2**30,
        "gpu_seconds": 0.0,
        "snapshot_bytes": 0,
    }
    box = (await ann.get("/sandboxes")).json()["sandboxes"][0]
    assert (await ann.delete(f"/sandboxes/{box['id']}")).status_code == 204
    wide = {"spec": {**BOX["spec"], "limits": {"cpus": 2.5}}}
    assert (await ann.post("/sandboxes", json=wide)).json()["details"]["quota"] == "cpus"


async def test_gpu_time_ends(keeper: KeeperClient, who: Ask) -> None:
    """The sandbox loses its GPUs when its principal has had all its time, and gets none again; the CPU is still its."""
    ann = await who("ann", quota={"gpu_seconds": 1.0})
    with_gpus = {"spec": {**BOX["spec"], "gpu": "A100:2"}}
    assert (await ann.post("/sandboxes", json=with_gpus)).status_code == 201

    async def free() -> bool:
        return all(gpu["lease"] is None for gpu in (await keeper.get("/gpus"))["gpus"])

    await until(free)
    used = (await ann.get("/principals/self")).json()["used"]["gpu_seconds"]
    assert used >= 1.0
    refused = await ann.post("/sandboxes", json=with_gpus)
    assert (refused.status_code, refused.json()["details"]["quota"]) == (429, "gpu_seconds")
    assert (await ann.post("/sandboxes", json=BOX)).status_code == 201


@pytest.mark.criu
async def test_a_copy_of_what_has_gpus_takes_the_scope_for_gpus(keeper: KeeperClient, who: Ask) -> None:
    """Clones and what goes on from a snapshot lease GPUs of their own; one without is copied by who may copy."""
    ann, other = await who("ann"), await who("ann", scopes=["read", "run", "snapshot"])
    for gpu, status in (({"gpu": "A100"}, 403), ({}, 201)):
        box = (await ann.post("/sandboxes", json={"spec": {**BOX["spec"], **gpu}})).json()
        saved = (await ann.post(f"/sandboxes/{box['id']}/snapshot", json={})).json()
        for path, body in ((f"/sandboxes/{box['id']}/fork", {}), ("/sandboxes", {"snapshot": saved["id"]})):
            told = await other.post(path, json=body)
            assert told.status_code == status, told.text
            if status == 403:
                assert told.json()["details"] == {"scope": "gpu"}


@pytest.mark.criu
async def test_copies_beyond_the_quota_are_refused_before_any_is_made(keeper: KeeperClient, who: Ask) -> None:
    """As many as there is room for are made, together; of more not one, and the sandbox is not even stopped for it."""
    ann = await who("ann", quota={"sandboxes": 3})
    box = (await ann.post("/sandboxes", json=BOX)).json()["id"]
    await ann.post(f"/sandboxes/{box}/suspend", json={})
    refused = await ann.post(f"/sandboxes/{box}/fork", json={"n": 64})
    assert (refused.status_code, refused.json()["details"]) == (
        429,
        {"quota": "sandboxes", "used": 1, "limit": 3},
    )
    assert [one["state"] for one in (await ann.get("/sandboxes")).json()["sandboxes"]] == ["suspended"]
    assert (await ann.post(f"/sandboxes/{box}/fork", json={"n": 2})).status_code == 201
    assert len((await ann.get("/sandboxes")).json()["sandboxes"]) == 3


@pytest.mark.criu
async def test_who_has_saved_as_much_as_they_may_takes_no_more_snapshots(keeper: KeeperClient, who: Ask) -> None:
    """Until one is removed; what others have saved does not count."""
    ann, bob = await who("ann", quota={"snapshot_bytes": 1}), await who("bob")
    hers, his = [(await one.post("/sandboxes", json=BOX)).json()["id"] for one in (ann, bob)]
    assert (await bob.post(f"/sandboxes/{his}/snapshot", json={})).status_code == 201
    saved = (await ann.post(f"/sandboxes/{hers}/snapshot", json={})).json()
    assert (await ann.get("/principals/self")).json()["used"]["snapshot_bytes"] > 2**20
    refused = await ann.post(f"/sandboxes/{hers}/snapshot", json={})
    assert (refused.status_code, refused.json()["details"]["quota"]) == (429, "snapshot_bytes")
    assert (await ann.delete(f"/snapshots/{saved['id']}")).status_code == 204
    assert (await ann.post(f"/sandboxes/{hers}/snapshot", json={})).status_code == 201


@pytest.mark.criu
async def test_anothers_snapshot_is_none_wherever_it_is_named(keeper: KeeperClient, who: Ask) -> None:
    """To restore one's own sandbox to it, to begin from it, to look at it or to remove it: by id and by name."""
    ann, bob = await who("ann"), await who("bob")
    hers, his = [(await one.post("/sandboxes", json=BOX)).json() for one in (ann, bob)]
    saved = (await ann.post(f"/sandboxes/{hers['id']}/snapshot", json={"name": "prepared"})).json()
    await bob.post(f"/sandboxes/{his['id']}/runs", json={"code": "x = 'his'"})
    paths = [below(path, {}) for path in OPERATIONS if path.startswith("/snapshots/{snapshot}")]
    for ref in (saved["id"], "prepared"):
        for method, path, body in (
            ("POST", f"/sandboxes/{his['id']}/restore", {"snapshot": "REF"}),
            ("POST", "/sandboxes", {"snapshot": "REF"}),
            ("PATCH", "/snapshots/REF", {"name": "mine"}),
            *((method, f"/snapshots/REF{path}", None) for method, path in itertools.product(METHODS, paths)),
        ):
            real, none = [
                await bob.request(
                    method,
                    path.replace("REF", one),
                    json=body and {key: one if v == "REF" else v for key, v in body.items()},
                )
                for one in (ref, "nosuch")
            ]
            assert (real.status_code, none.status_code) == (404, 404), (method, path, real.text)
            assert real.text.replace(ref, "nosuch") == none.text
    assert (await bob.get("/snapshots")).json()["snapshots"] == []
    said = await bob.post(f"/sandboxes/{his['id']}/runs?follow=1", json={"code": "print(x)"})
    assert '"his\\n"' in said.text, "it was not touched"
    assert [one["name"] for one in (await ann.get("/snapshots")).json()["snapshots"]] == ["prepared"]


async def test_events_tell_of_ones_own_sandboxes_alone(keeper: KeeperClient, who: Ask) -> None:
    """Whatever becomes of another's meanwhile, nothing of it is in the stream."""
    ann, bob = await who("ann"), await who("bob")
    async with bob.stream("GET", "/events") as response, asyncio.timeout(60):
        lines = response.aiter_lines()
        assert await anext(lines) == "event: hello"
        for _ in range(2):
            hers = (await ann.post("/sandboxes", json=BOX)).json()
            assert (await ann.patch(f"/sandboxes/{hers['id']}", json={"tags": {"a": "b"}})).status_code == 200
            assert (await ann.delete(f"/sandboxes/{hers['id']}")).status_code == 204
        his = (await bob.post("/sandboxes", json=BOX)).json()
        assert (await bob.delete(f"/sandboxes/{his['id']}")).status_code == 204
        told = []
        async for line in lines:
            if line.startswith("data: {") and "sandboxes" not in line:
                told.append(json.loads(line.removeprefix("data: ")))
                if told[-1].get("state") == "stopped":
                    break
        assert {one["id"] for one in told} == {his["id"]}


def test_tokens_are_made_and_listed_on_the_terminal(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    """The token is printed alone, so that a script can take it; `ls` never shows it."""
    line = ["token", "create", "ann", "--scope", "read", "--expires", "30d", "--memory", "16GiB", "--sandboxes", "4"]
    assert main(line) == 0
    token = capsys.readouterr().out.strip()
    assert token.startswith("wct_")
    assert main(["token", "ls"]) == 0
    shown = capsys.readouterr().out
    assert "29 d 23 h" in shown
    assert "0 of 4" in shown
    assert "of 16.0 GiB" in shown
    assert token[13:] not in shown
    assert main(["token", "create", "ann", "--expires", "soon"]) == 1
    assert "30d" in capsys.readouterr().err
