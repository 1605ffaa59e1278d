"""Who gets gVisor without asking for it."""

import asyncio
import json
import sys
from pathlib import Path

import httpx
import pytest

from tests.integration.snapshots.notebooks import keeper, notebook
from tests.leaks import Places
from warmcell.extension.cli import main
from warmcell.sandbox.paths import Paths

pytestmark = [pytest.mark.gvisor, pytest.mark.bubblewrap]


async def _run(sandbox_id: str, code: str) -> list[dict[str, object]]:
    transport = httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket))
    head = json.dumps({"code": code, "send": 0, "get": []}).encode() + b"\n"
    async with httpx.AsyncClient(transport=transport, timeout=120) as http:
        answer = await http.post(f"http://k/warmcell/api/v1/sandboxes/{sandbox_id}/run", content=head)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.content.splitlines()]


async def test_an_agent_gets_it_and_a_notebook_does_not(
    places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside each other, with nothing configured; each says why, and so does `warmcell ps`."""
    async with keeper(places) as client, notebook(client, tmp_path) as made:
        spec = {"python": sys.executable, "preload": []}
        agents = await client.post("/sandboxes", {"spec": spec}, timeout=120)
        assert (agents["backend"], agents["backend_why"]) == ("gvisor", "nobody has read what an agent runs")
        said = await _run(agents["id"], "print(open('/proc/version').read())")
        assert "gVisor" in json.dumps(said) or "4.4.0" in json.dumps(said)
        info = await made.info()
        assert (info["backend"], info["backend_why"]) == ("bubblewrap", "no image is asked for")
        with_network = await client.post("/sandboxes", {"spec": {**spec, "network": "host"}})
        assert with_network["backend"] == "bubblewrap"
        assert with_network["backend_why"].endswith("it has no network 'host'")
        assert await asyncio.to_thread(main, ["ps"]) == 0
        told = capsys.readouterr().out
        for one in (agents, info, with_network):
            assert f"{one['id']}: {one['backend']} was chosen, since {one['backend_why']}" in told
