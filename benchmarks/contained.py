"""Kernels in each backend, and what `docker run` of the same image takes without Warmcell.

The usual backend is among them, so that what containers cost can be told from what any start costs. Containers have the
libraries of this environment by a mount, so that all that is compared runs the same files.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.docker_run import LIBRARIES, LOOK_AGAIN_S, answered
from benchmarks.keeper import Keeper
from benchmarks.p1_start import OURS, PLAIN, STARTS, first_reply, in_use
from benchmarks.p2_restart import IMPORTS, ready, restarted
from benchmarks.rows import Engine, Row, Series, medians, phases
from benchmarks.server import ANSWER_TIMEOUT_S, BenchmarkError, JupyterServer
from tests.engines import IMAGE, Dockerd, own_engine
from tests.lanes import TOP
from tests.leaks import Places, own_places

Backend = Literal["bubblewrap", "docker", "gvisor"]

START_ROUNDS, RESTART_ROUNDS = 6, 4
START_GOALS: Mapping[Backend, float] = {"docker": 0.12}
RESTART_GOALS: Mapping[Backend, float] = {"docker": 0.03}
RESTORE_GOAL = 0.5
ENGINES: Mapping[Backend, Sequence[Engine]] = {
    "bubblewrap": ("criu", "template"),
    "docker": ("criu", "template"),
    "gvisor": ("template",),
}
OWN_FIRST = {"JUPYTER_PREFER_ENV_PATH": "0"}
"""Else Jupyter takes the kernelspec that is installed in the environment."""


async def new_kernels(
    *, rounds: int = START_ROUNDS, backends: Sequence[Backend], engines: Sequence[Engine]
) -> list[Row]:
    """P1: of each backend two rows for each engine, beside a plain kernel and beside `docker run`."""
    plain: list[float] = []
    beside: list[float] = []
    parts: dict[tuple[Backend, Engine], list[Mapping[str, float]]] = {}
    told: dict[tuple[Backend, Engine], list[Mapping[str, Any]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        docker = stack.enter_context(own_engine())
        servers = {
            (backend, engine): await stack.enter_async_context(_server(docker, backend, engine, preload=("json",)))
            for backend in backends
            for engine in ENGINES[backend]
            if engine in engines
        }
        for server in servers.values():
            await in_use(server, prepared=True)
        server = next(iter(servers.values()))
        await first_reply(server, PLAIN)
        for number in range(rounds):
            for which in ("plain", "run", *servers) if number % 2 else (*servers, "run", "plain"):
                for server in servers.values():
                    await server.warm()
                if which == "plain":
                    plain.append(sum((await first_reply(server, PLAIN))[0].values()))
                elif which == "run":
                    beside.append(await answered(docker, "1"))
                elif isinstance(which, tuple):
                    took, info = await first_reply(servers[which], OURS, started_from="template")
                    parts.setdefault(which, []).append(took)
                    told.setdefault(which, []).append(info)
    return [
        row
        for which in servers
        for row in _rows(
            "P1",
            f"new kernel in {which[0]} → first reply",
            which[1],
            parts[which],
            told[which],
            plain=plain,
            beside=beside,
            goal=START_GOALS.get(which[0]),
        )
    ]


async def restarts(
    *, rounds: int = RESTART_ROUNDS, backends: Sequence[Backend], engines: Sequence[Engine]
) -> list[Row]:
    """P2: the same of restarts with libraries; of gVisor a restore of a bare kernel as well."""
    plain: list[float] = []
    beside: list[float] = []
    parts: dict[tuple[Backend, Engine], list[Mapping[str, float]]] = {}
    told: dict[tuple[Backend, Engine], list[Mapping[str, Any]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        docker = stack.enter_context(own_engine())
        kernels = {}
        for backend in backends:
            for engine in ENGINES[backend]:
                if engine in engines:
                    server = await stack.enter_async_context(_server(docker, backend, engine))
                    await in_use(server, prepared=True)
                    kernels[backend, engine] = await ready(server, OURS, stack)
        server = next(iter(kernels.values()))[0]
        alone = await ready(server, PLAIN, stack)
        for number in range(rounds):
            for which in ("plain", "run", *kernels) if number % 2 else (*kernels, "run", "plain"):
                for one, _, _ in kernels.values():
                    await one.warm()
                if which == "plain":
                    plain.append(sum((await restarted(*alone)).values()))
                elif which == "run":
                    beside.append(await answered(docker, IMPORTS))
                elif isinstance(which, tuple):
                    parts.setdefault(which, []).append(await restarted(*kernels[which]))
                    told.setdefault(which, []).append(await kernels[which][0].sandbox(kernels[which][1]))
    rows = [
        row
        for which in kernels
        for row in _rows(
            "P2",
            f"restart in {which[0]} → torch, numpy and pandas ready",
            which[1],
            parts[which],
            told[which],
            plain=plain,
            beside=beside,
            goal=RESTART_GOALS.get(which[0]),
        )
    ]
    return [*rows, *([await restores(rounds=rounds)] if "gvisor" in backends else [])]


async def restores(*, rounds: int) -> Row:
    """P2: a bare kernel in gVisor goes back to its snapshot, beside a plain one that is restarted."""
    plain: list[float] = []
    ours: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(_server(None, "gvisor", "criu", preload=()))
        kernel_id, plain_id = await server.start_kernel(OURS), await server.start_kernel(PLAIN)
        for each in (kernel_id, plain_id):
            stack.push_async_callback(server.delete_kernel, each)
        keeper = await stack.enter_async_context(Keeper(server.places))
        kernel = await stack.enter_async_context(server.channels(kernel_id))
        other = await stack.enter_async_context(server.channels(plain_id))
        await kernel.run("x = 1")
        await other.execute("1")
        sandbox_id = (await keeper.sandbox(kernel_id))["id"]
        snapshot = (await keeper.do("snapshot", sandbox_id, name="then"))["id"]
        for _ in range(rounds):
            await _stands_by(server.places)
            began = time.perf_counter()
            await keeper.do("restore", sandbox_id, snapshot=snapshot)
            await kernel.execute("assert x == 1")
            ours.append(time.perf_counter() - began)
            await _stands_by(server.places)  # The next one is not made beside what it is compared with either.
            began = time.perf_counter()
            await server.restart_kernel(plain_id)
            await other.execute("1")
            plain.append(time.perf_counter() - began)
    return Row(
        promise="P2",
        what="restore of a bare kernel in gvisor → first reply",
        baseline=Series(what=f"restart of a {PLAIN} kernelspec's", samples=plain),
        ours=Series(what="restore → reply", samples=ours),
        goal=RESTORE_GOAL,
    )


async def _stands_by(places: Places) -> None:
    """Wait until a sandbox waits for the kernel to be put back, so that none is made beside what is measured.

    Raises:
        BenchmarkError: There is none.
    """
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while not await asyncio.to_thread(stopped_sandboxes, places):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_AGAIN_S)
    except TimeoutError:
        raise BenchmarkError(f"no sandbox stood by within {ANSWER_TIMEOUT_S:.0f} s") from None


def stopped_sandboxes(places: Places) -> list[int]:
    """Sandbox processes of gVisor's that stand by: they are stopped then. Blocks."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if words.startswith(b"runsc-sandbox") and bytes(places.runtime) in words and state == "T":
                found.append(int(process.name))
    return found


def _rows(
    promise: str,
    what: str,
    engine: Engine,
    parts: Sequence[Mapping[str, float]],
    told: Sequence[Mapping[str, Any]],
    *,
    plain: Sequence[float],
    beside: Sequence[float],
    goal: float | None,
) -> list[Row]:
    """The same numbers beside both baselines."""
    ours = Series(what=f"{OURS} kernelspec", samples=[sum(took.values()) for took in parts])
    first = Row(
        promise=promise,
        what=what,
        engine=engine,
        baseline=Series(what=f"{PLAIN} kernelspec", samples=plain),
        ours=ours,
        goal=goal,
        parts_s=medians(parts),
        phases_s=phases(told),
    )
    second = Row(
        promise=promise,
        what=f"{what}, beside `docker run`",
        engine=engine,
        baseline=Series(what="docker run, ipykernel", samples=beside),
        ours=ours,
    )
    return [first, second]


@contextlib.asynccontextmanager
async def _server(
    docker: Dockerd | None, backend: Backend, engine: Engine, *, preload: Sequence[str] | None = None, prepared: int = 1
) -> AsyncIterator[JupyterServer]:
    """A server whose own kernels are in that backend."""
    with own_places() as places:
        _kernelspec(places, backend, preload)
        settings = {**STARTS[engine], "prepared": prepared, "mounts": [LIBRARIES]}
        if docker is not None:
            settings["docker_host"] = docker.host
        async with JupyterServer(places, settings=settings, env=OWN_FIRST) as server:
            yield server


def _kernelspec(places: Places, backend: Backend, preload: Sequence[str] | None) -> None:
    content = json.loads((TOP / "kernel_provisioner" / "kernelspec" / "kernel.json").read_text())
    config: dict[str, Any] = {"backend": backend}
    if backend == "docker":
        config |= {"image": IMAGE, "mounts": [f"{LIBRARIES}:ro"], "env": {"PYTHONPATH": LIBRARIES}}
    if preload is not None:
        config["preload"] = list(preload)
    content["metadata"]["kernel_provisioner"]["config"] = config
    directory = Path(places.env["JUPYTER_DATA_DIR"]) / "kernels" / OURS
    directory.mkdir(parents=True)
    (directory / "kernel.json").write_text(json.dumps(content))
