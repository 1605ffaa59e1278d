"""P7: an agent's sandbox, from its creation over the first code that it runs until it is gone, beside `docker run`."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.docker_run import gone
from benchmarks.keeper import Keeper
from benchmarks.p1_start import STARTS
from benchmarks.rows import Engine, Row, Series, medians
from benchmarks.server import ANSWER_TIMEOUT_S, LOOK_AGAIN_S, WARMCELL, BenchmarkError, end_keeper
from tests.engines import IMAGE, PYTHON, Dockerd, own_engine
from tests.leaks import Places, own_places

ROUNDS = 6
CODE = "print(6 * 7)"
GOALS: Mapping[tuple[str, Engine], float] = {("bubblewrap", "criu"): 0.2, ("bubblewrap", "template"): 0.3}
BACKENDS: Mapping[str, Sequence[Engine]] = {
    "bubblewrap": ("criu", "template"),
    "docker": ("criu", "template"),
    "gvisor": ("template",),
}


async def measure(
    *, rounds: int = ROUNDS, backends: Sequence[str], engines: Sequence[Engine], docker: Dockerd | None = None
) -> list[Row]:
    """A row for each backend and engine; a sandbox is prepared before each. Without `docker` with one of its own."""
    beside: list[float] = []
    parts: dict[tuple[str, Engine], list[Mapping[str, float]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        docker = docker or stack.enter_context(own_engine())
        agents: dict[tuple[str, Engine], Keeper] = {}
        for backend in backends:
            for engine in BACKENDS[backend]:
                if engine in engines:
                    settings = {**STARTS[engine], "docker_host": docker.host}
                    places = stack.enter_context(own_places())
                    keeper = await stack.enter_async_context(keeper_alone(places, settings))
                    await _in_use(keeper, _spec(backend))
                    agents[backend, engine] = keeper
        await gone(docker, PYTHON, "-c", CODE)
        for number in range(rounds):
            for which in (None, *agents) if number % 2 else (*agents, None):
                for keeper in agents.values():
                    await keeper.warm()
                if which is None:
                    beside.append(await gone(docker, PYTHON, "-c", CODE))
                else:
                    parts.setdefault(which, []).append(await used(agents[which], _spec(which[0])))
    return [
        Row(
            promise="P7",
            what=f"agent's sandbox in {which[0]}: create → first code run → gone",
            engine=which[1],
            baseline=Series(what="docker run --rm", samples=beside),
            ours=Series(what="create, run, delete", samples=[sum(took.values()) for took in parts[which]]),
            goal=GOALS.get(which),
            parts_s=medians(parts[which]),
        )
        for which in agents
    ]


def _spec(backend: str) -> Mapping[str, Any]:
    image = {"image": IMAGE, "python": ""} if backend == "docker" else {"python": sys.executable}
    return {"backend": backend, "preload": ["json"], "template": "agents", "network": "none", **image}


@contextlib.asynccontextmanager
async def keeper_alone(places: Places, settings: Mapping[str, object]) -> AsyncIterator[Keeper]:
    """A keeper of these directories, without a Jupyter server."""
    _configure(places, settings)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "warmcell.extension.keeper", "--detach"),
        env={**os.environ, **places.env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await process.wait()
    keeper = Keeper(places)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while not keeper.paths.keeper_socket.exists():  # noqa: ASYNC110
                await asyncio.sleep(LOOK_AGAIN_S)
        async with keeper:
            yield keeper
    finally:
        await asyncio.to_thread(end_keeper, places)


def _configure(places: Places, settings: Mapping[str, object]) -> None:
    directory = Path(places.env["JUPYTER_CONFIG_DIR"])
    directory.mkdir(parents=True)
    lines = [f"c.Warmcell.{name} = {value!r}" for name, value in settings.items()]
    (directory / "jupyter_warmcell_config.py").write_text("\n".join(lines) + "\n")


async def _in_use(keeper: Keeper, spec: Mapping[str, Any]) -> None:
    """Have a first one, and wait until all is there that the next ones start from."""
    sandbox_id = await keeper.create(spec)
    await _ran(keeper, sandbox_id)
    await keeper.warm()
    await keeper.stop(sandbox_id)


async def used(keeper: Keeper, spec: Mapping[str, Any]) -> dict[str, float]:
    """Have a sandbox, run code in it, remove it: seconds of each part.

    Raises:
        BenchmarkError: The code gave something else.
    """
    began = time.perf_counter()
    sandbox_id = await keeper.create(spec)
    created = time.perf_counter()
    try:
        await _ran(keeper, sandbox_id)
        ran = time.perf_counter()
    finally:
        await keeper.stop(sandbox_id)
    return {"create": created - began, "run": ran - created, "delete": time.perf_counter() - ran}


async def _ran(keeper: Keeper, sandbox_id: str) -> None:
    # Nothing is verified on a socket of one's own, and to read certificates for it takes longer than the rest.
    transport = httpx.AsyncHTTPTransport(uds=str(keeper.paths.keeper_socket), verify=False)
    url = f"http://keeper{WARMCELL}/sandboxes/{sandbox_id}/run"
    async with httpx.AsyncClient(transport=transport, timeout=ANSWER_TIMEOUT_S) as http:
        answer = await http.post(url, content=json.dumps({"code": CODE}) + "\n")
    if "42" not in answer.text:
        raise BenchmarkError(f"an agent's code gave {answer.status_code} {answer.text[:500]}")
