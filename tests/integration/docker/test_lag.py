"""The keeper goes on with everything else while an engine of containers is busy for it."""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engines import IMAGE, Dockerd
from tests.integration.docker.boxes import paths_of
from tests.integration.docker.watched import PERIOD_S
from tests.lanes import TOP
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = [pytest.mark.docker, pytest.mark.alone]

CONTAINERS, ROUNDS = 10, 4
RATIO = 3.0
TIMEOUT_S = 60.0
SPEC = {"spec": {"image": IMAGE, "backend": "docker", "python": "", "preload": [], "network": "none"}}

Lateness = list[tuple[float, float]]
"""When the loop was to go on, and by how many seconds it was late."""


@contextlib.asynccontextmanager
async def watched(places: Places, seen: Lateness, settings: Mapping[str, object]) -> AsyncIterator[KeeperClient]:
    """A keeper whose event loop is watched; what was seen is there afterwards."""
    directory = Path(places.env["JUPYTER_CONFIG_DIR"])
    directory.mkdir(parents=True)
    lines = [f"c.Warmcell.{name} = {value!r}" for name, value in {"prepared": 0, **settings}.items()]
    (directory / "jupyter_warmcell_config.py").write_text("\n".join(lines) + "\n")
    file, paths = places.root / "seen.json", paths_of(places)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.docker.watched", str(file)),
        env={**os.environ, **places.env},
        cwd=TOP,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not paths.keeper_socket.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        async with await KeeperClient.connect(paths=paths, start=False) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), TIMEOUT_S)
    seen.extend((due, late) for due, late in json.loads(file.read_text()))


def p99(seen: Lateness, window: tuple[float, float]) -> float:
    """What 99 of 100 who had come in a window, at regular intervals, would have waited at most."""
    waits: list[float] = []
    for due, late in seen:
        if window[0] <= due <= window[1]:
            waits.append(late)
            waits += [late - PERIOD_S * number for number in range(1, int(late / PERIOD_S) + 1)]
    assert len(waits) >= 100
    return sorted(waits)[int(0.99 * len(waits))]


async def test_ten_starts_and_ends_do_not_hold_the_keeper_up(places: Places, docker: Dockerd) -> None:
    """Its event loop is at most three times as late as that of a keeper beside it that has nothing to do. Both have the
    same containers to share the processors with; what else the machine does can only make a round of ours worse.
    """
    others = Places(places.root / "i")
    for directory in (others.root, others.runtime, others.state, others.leases):
        directory.mkdir(mode=0o700)
    busy, idle = Lateness(), Lateness()
    windows = []
    async with watched(others, idle, {}), watched(places, busy, {"docker_host": docker.host}) as client:
        for _ in range(ROUNDS):
            began = time.monotonic()
            starts = [client.post("/sandboxes", SPEC, timeout=TIMEOUT_S) for _ in range(CONTAINERS)]
            made: list[dict[str, Any]] = await asyncio.gather(*starts)
            await asyncio.gather(*(client.delete(f"/sandboxes/{one['id']}") for one in made))
            windows.append((began, time.monotonic()))
    ours, others_own = ([p99(seen, window) for window in windows] for seen in (busy, idle))
    assert min(ours) <= RATIO * statistics.median(others_own), (ours, others_own)
