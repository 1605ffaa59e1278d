"""A Jupyter server that is killed while memory is saved or brought back at its page's wish, and the next one."""

import asyncio
import contextlib
import json
import random
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server import WARMCELL, JupyterServer
from tests.integration.keeper.conftest import until
from tests.jupyter.warmcell_kernels import NAME, kernelspec
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient

EMPTY = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
LOOKS = {"x": "x", "sum": "sum(data)", "file": "open('/tmp/file').read()"}
BEGIN = "x, data = 0, bytearray(1 << 22); file = open('/tmp/file', 'w'); file.write('kept'); file.close()"
STEP = "x += 1; data[x] = 1"


async def server_killed(
    places: Places, verb: str, wish: dict[str, Any], moments: random.Random, *, longest_s: float
) -> str:
    """One trial; what came of the verb.

    The keeper lives, so nothing is lost: session and kernel keep their ids, and the kernel is what it was before the
    verb, or after it. A fork is there with all of its clones, each of which answers, or not at all.
    """
    if not (Path(places.env["JUPYTER_DATA_DIR"]) / "kernels" / NAME).exists():
        kernelspec(places)
    async with JupyterServer(places, settings={"prepared": 0}) as first:
        (first.root / "work.ipynb").write_text(json.dumps(EMPTY))
        body = {"path": "work.ipynb", "name": "work.ipynb", "type": "notebook", "kernel": {"name": NAME}}
        session = checked(await first.http.post("/api/sessions", json=body))
        kernel_id = session["kernel"]["id"]
        box = f"{WARMCELL}/sandboxes/{(await first.sandbox(kernel_id))['id']}"
        async with first.channels(kernel_id, page="tab") as page:
            await page.run(BEGIN)
            checked(await first.http.post(f"{box}/snapshot", json={"name": "old"}))
            await page.run(STEP)
            if verb == "resume":
                checked(await first.http.post(f"{box}/suspend", json={}))
            doing = asyncio.create_task(first.http.post(f"{box}/{verb}", json=wish))
            await asyncio.wait({doing}, timeout=moments.uniform(0.0, longest_s))
            done = doing.done()
            await first.kill()
            with contextlib.suppress(httpx.TransportError):
                checked(await doing)
        async with JupyterServer(places, settings={"prepared": 0}) as second:
            listed = checked(await second.http.get("/api/sessions"))
            assert [(one["id"], one["kernel"]["id"]) for one in listed] == [(session["id"], kernel_id)]
            async with second.channels(kernel_id, page="tab") as page:
                found = await look(page)
                assert found in ("1 1 kept", *(["0 0 kept"] if verb == "restore" else []))
                await page.run(STEP)
                assert await look(page) == {"1 1 kept": "2 2 kept", "0 0 kept": "1 1 kept"}[found]
            assert (await second.sandbox(kernel_id))["previous_error"] is None
            clones = await clones_of(kernel_id) if verb == "fork" else []
            for clone in clones:
                async with second.channels(clone) as page:
                    assert await look(page) == "1 1 kept"
                await second.delete_kernel(clone)
            await second.delete_kernel(kernel_id)
    came = "done before" if done else f"{len(clones)} clones" if verb == "fork" else found
    return f"{verb}, server killed: {came}"


async def look(page: Any) -> str:
    """What the kernel has."""
    said = (await page.execute("", expressions=LOOKS))["user_expressions"]
    return " ".join(str(said[name]["data"]["text/plain"]).strip("'") for name in LOOKS)


async def clones_of(kernel_id: str) -> list[str]:
    """Kernels that are there beside the notebook's own, once nothing is being made any more."""
    found: list[str] = []

    async def settled() -> bool:
        sandboxes = (await keeper.get("/sandboxes"))["sandboxes"]
        found[:] = [str(one["kernel_id"]) for one in sandboxes if one["kernel_id"] != kernel_id]
        return all(one["state"] == "running" for one in sandboxes) and len(found) in (0, 2)

    async with await KeeperClient.connect(start=False) as keeper:
        await until(settled, timeout=60)
    return found


def checked(answer: httpx.Response) -> Any:
    assert answer.is_success, answer.text
    return answer.json()
