"""Many sandboxes for agents: the time to the first command, alone and in a burst, a thousand that wait, wide forks.

`python -m benchmarks.agents` stores `agents-DATE.json`, prints it, and puts its tables into the reference page. What a
machine has no room for is left out, with the reason. Times to the first command are taken as ComputeSDK's benchmarks
do: from the request for a sandbox until a command in it has answered, one after another, and for all of a burst from
its beginning.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import time
import unittest.mock
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import agents_page, machine, results
from benchmarks.docker_run import gone
from benchmarks.keeper import Keeper
from benchmarks.p2_restart import IMPORTS
from benchmarks.p7_agents import keeper_alone
from benchmarks.rows import medians
from benchmarks.server import BenchmarkError
from tests.engines import Dockerd, own_engine
from tests.leaks import own_places
from warmcell import AsyncSandbox

COMMAND = ("echo", "up")
SEQUENTIAL = 100
BURST = {"bubblewrap": 100, "gvisor": 16}
"""One that does nothing takes 2 % of a processor in gVisor: a hundred of them would have little left for each other."""
DOCKER_SEQUENTIAL = 20
DOCKER_BURST = 100
IDLE = 1000
AT_ONCE = 8
"""Sandboxes that are made side by side where only their number counts."""
SETTLE_S = 10.0
LOOK_S = 60.0
SPARE_BYTES = 2 * 2**30
"""Memory that those that wait leave free."""
STATE_BYTES = 10**9
FORKS = (16, 64)
SETTINGS: Mapping[str, object] = {"max_sandboxes": 5000, "keeper_idle_s": 600.0, "prepared_memory": 8.0}
FILL = f"import numpy\nstate = numpy.random.default_rng(3).integers(0, 256, {STATE_BYTES}, dtype='uint8')"
READY = "int(state[::100_000_000].sum())"


async def first_commands(backend: str) -> dict[str, Any]:
    """Seconds until the first command, one after another and in a burst, once what starts come from is there."""
    async with _engine(backend) as keeper:
        await _in_use(keeper, backend)
        alone, until_gone = [], []
        for _ in range(SEQUENTIAL):
            began = time.perf_counter()
            async with await _up(backend):
                alone.append(time.perf_counter() - began)
            until_gone.append(time.perf_counter() - began)
        await _in_use(keeper, backend)
        boxes: list[AsyncSandbox] = []
        began = time.perf_counter()
        burst = await asyncio.gather(*(_up_since(backend, began, boxes) for _ in range(BURST[backend])))
        took = time.perf_counter() - began
        infos = await asyncio.gather(*(box.info() for box in boxes))
        phases = medians([info.phases_ms for info in infos])
        await asyncio.gather(*(box.kill() for box in boxes))
    return {
        "backend": backend,
        "sequential": _quantiles(alone),
        "sequential_until_gone": _quantiles(until_gone),
        "burst": {**_quantiles(burst), "per_second": round(len(burst) / took, 1), "phases_ms": phases},
    }


async def docker_runs() -> dict[str, Any] | None:
    """Seconds of `docker run --rm` of the same command, one after another and in a burst; None: there is no Docker."""
    if shutil.which("dockerd") is None:
        return None
    with own_engine() as docker:
        await gone(docker, *COMMAND)
        alone = [await gone(docker, *COMMAND) for _ in range(DOCKER_SEQUENTIAL)]
        began = time.perf_counter()
        burst = await asyncio.gather(*(_gone_since(docker, began) for _ in range(DOCKER_BURST)))
    return {
        "sequential": _quantiles(alone),
        "burst": {**_quantiles(burst), "per_second": round(DOCKER_BURST / max(burst), 1)},
    }


async def waiting(count: int, backend: str) -> dict[str, Any]:
    """Memory of so many sandboxes with torch imported, each of which has run a cell."""
    preload = ["torch"]
    async with _engine(backend) as keeper:
        async with await _up(backend, preload) as first:
            await first.run("import torch")
            await keeper.warm()
        before, began = _available_bytes(), time.perf_counter()
        boxes: list[AsyncSandbox] = []
        full = ""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one() -> None:
            nonlocal full
            async with slots:
                if not full and _available_bytes() < SPARE_BYTES:
                    full = f"less than {SPARE_BYTES >> 30} GiB of memory are left"
                if not full:
                    box = await _up(backend, preload)
                    boxes.append(box)
                    await box.run("import torch")

        try:
            await asyncio.gather(*(one() for _ in range(count)))
            took = time.perf_counter() - began
            each = (before - _available_bytes()) / max(1, len(boxes))
            await asyncio.sleep(SETTLE_S)
            busy = await _busy_pct(keeper.pid())
            answers = []
            for box in boxes[:: max(1, len(boxes) // 20)]:
                asked = time.perf_counter()
                await box.run("1")
                answers.append(time.perf_counter() - asked)
        finally:
            removing = time.perf_counter()
            await asyncio.gather(*(box.kill() for box in boxes))
        return {
            "asked": count,
            "made": len(boxes),
            "left_out": full,
            "seconds": round(took, 1),
            "keeper_busy_pct": busy,
            "per_second": round(len(boxes) / took, 2),
            "memory_bytes_each": round(each),
            "answer": _quantiles(answers),
            "seconds_to_remove": round(time.perf_counter() - removing, 1),
        }


async def forks(counts: Sequence[int], backend: str) -> list[dict[str, Any]]:
    """Seconds until all clones of one sandbox with much state have answered, beside a plain start with its imports."""
    found = []
    async with _engine(backend), await _up(backend, ["torch", "numpy", "pandas"]) as source:
        await source.run(IMPORTS)
        wanted = (await source.run(f"{FILL}\n{READY}")).text
        for count in counts:
            plain = await _plain_start()
            began = time.perf_counter()
            clones = await source.fork(count)
            forked = time.perf_counter()
            answers = await asyncio.gather(*(clone.run(READY) for clone in clones))
            answered = time.perf_counter()
            phases = medians([(await clone.info()).phases_ms for clone in clones])
            await asyncio.gather(*(clone.kill() for clone in clones))
            if [answer.text for answer in answers] != [wanted] * count:
                raise BenchmarkError(f"not all of {count} clones have the state of their source")
            found.append(
                {
                    "clones": count,
                    "state_bytes": STATE_BYTES,
                    "fork_s": round(forked - began, 3),
                    "all_answered_s": round(answered - began, 3),
                    "plain_start_with_imports_s": round(plain, 3),
                    "ratio": round((answered - began) / plain, 3),
                    "phases_ms": phases,
                }
            )
    return found


async def _plain_start() -> float:
    """Seconds in which a plain interpreter has started and has the same imports."""
    began = time.perf_counter()
    code = f"import ipykernel.ipkernel\n{IMPORTS}"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    if await process.wait():
        raise BenchmarkError("a plain start failed")
    return time.perf_counter() - began


async def _in_use(keeper: Keeper, backend: str) -> None:
    """Have what sandboxes start from be there; it goes when nobody has wanted a kernel for a while."""
    async with await _up(backend) as box:
        await box.run("1")
        await keeper.warm()


async def _up(backend: str, preload: Sequence[str] | None = None) -> AsyncSandbox:
    """A sandbox in which a command has answered."""
    box = await AsyncSandbox.create(backend=backend, preload=preload, timeout=3600)
    answer = await box.exec(*COMMAND)
    if answer.stdout != "up\n":
        raise BenchmarkError(f"a sandbox's first command gave {answer}")
    return box


async def _up_since(backend: str, began: float, boxes: list[AsyncSandbox]) -> float:
    boxes.append(await _up(backend))
    return time.perf_counter() - began


async def _gone_since(docker: Dockerd, began: float) -> float:
    await gone(docker, *COMMAND)
    return time.perf_counter() - began


async def _busy_pct(pid: int) -> float:
    """Of one processor, for some seconds in which nobody asks anything of a process."""
    before = _cpu_s(pid)
    await asyncio.sleep(LOOK_S)
    return round(100 * (_cpu_s(pid) - before) / LOOK_S, 2)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def _engine(backend: str) -> AsyncIterator[Keeper]:
    """A keeper of its own, which this process's sandboxes are made by."""
    with own_places() as places, unittest.mock.patch.dict(os.environ, places.env):
        async with keeper_alone(places, {**SETTINGS, "backend": backend}) as keeper:
            yield keeper


def _available_bytes() -> int:
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024


def _quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Seconds; the smallest sample that so many of a hundred do not exceed."""
    ordered = sorted(samples)
    at = {percent: ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in (95, 99)}
    return {
        "n": len(ordered),
        "median_s": round(statistics.median(ordered), 4),
        **{f"p{percent}_s": round(value, 4) for percent, value in at.items()},
    }


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"at": results.now(), "commit": machine.commit(), "machine": machine.describe()}
    if "first" in options.only:
        found["first_commands"] = [await first_commands(backend) for backend in options.backends]
        found["docker_run"] = await docker_runs()
    if "idle" in options.only:
        found["idle"] = await waiting(options.idle, "bubblewrap")
    if "fork" in options.only:
        found["forks"] = await forks(options.forks, "bubblewrap")
    return found


def main() -> None:
    """Measure, store and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("first", "idle", "fork"), default=["first", "idle", "fork"])
    parser.add_argument("--backends", nargs="+", default=["bubblewrap", "gvisor"])
    parser.add_argument("--idle", type=int, default=IDLE)
    parser.add_argument("--forks", type=int, nargs="+", default=FORKS)
    parser.add_argument("--no-store", dest="store", action="store_false")
    options = parser.parse_args()
    found = asyncio.run(_measure(options))
    if options.store:
        path = results.RESULTS / f"agents-{found['at'][:10]}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        agents_page.write()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
