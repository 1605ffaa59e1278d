"""Whole kernels in containers of Podman's: what the contract suite does not try of it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import end_keeper
from tests.engines import IMAGE
from tests.integration.snapshots.notebooks import keeper, notebook
from tests.integration.snapshots.test_warm_pool import says, started, until_prepared
from tests.lanes import ordinary_uid
from tests.leaks import Places
from warmcell.sandbox.backends.docker.engine import Engine

pytestmark = [pytest.mark.podman, pytest.mark.criu, pytest.mark.timeout(240)]

OURS: dict[str, Any] = {"backend": "docker", "image": IMAGE, "python": ""}


@pytest.fixture(autouse=True)
def ended(places: Places, podman: Engine) -> Iterator[None]:
    """The keeper ends before its containers are looked for."""
    yield
    end_keeper(places)


async def test_a_kernel_is_started_restarted_suspended_resumed_and_forked(
    places: Places, podman: Engine, tmp_path: Path
) -> None:
    """From a template, prepared or restored in place; with variables and files after it was suspended; and clones."""
    os.chown(tmp_path, ordinary_uid(), ordinary_uid())
    spec = {**OURS, "preload": ["decimal"]}
    async with (
        keeper(places, docker_host=podman.address, prepared=1) as client,
        notebook(client, tmp_path, **spec) as made,
    ):
        await until_prepared(client, 1)
        info, asked = await started(client, tmp_path, **spec)
        assert (info["started_from"], "pool" in info["phases_ms"]) == ("template", True)
        assert await says(asked, "import sys; x = 1; print('decimal' in sys.modules)") == "True"
        await until_prepared(client, 1)
        await client.post(f"/kernels/{asked['kernel_id']}/end", {"grace_s": 0})
        info = await client.post("/kernels", asked, timeout=120)
        assert info["started_from"] == "template"
        assert await says(asked, "print('x' in globals())") == "False"
        await client.delete(f"/kernels/{asked['kernel_id']}")

        await made.run("x = 1; kept = open('/tmp/kept', 'w+'); kept.write('here'); kept.flush()")
        await made.do("suspend")
        assert (await made.info())["state"] == "suspended"
        assert await made.run("print(x, open('/tmp/kept').read())") == "1 here"
        said = await made.run("%%remote fork n=2 get=seen\nseen = x + int(__import__('os').environ['RANK'])")
        assert said.startswith("Remote: 2 clones of this kernel, forked in "), said
        assert await made.run("print(seen)") == "[1, 2]"
