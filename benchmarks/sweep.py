"""What snapshots cost as a kernel's state grows, and what mapped memory costs when all of it is used.

`python -m benchmarks --sweep` stores `sweep-DATE.json` and draws `docs/images/snapshots.svg`. For each size: a first
snapshot, suspend, resume by the next cell, a small change, a second snapshot.
"""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine, pages, results
from benchmarks.keeper import Keeper
from benchmarks.p1_start import OURS
from benchmarks.p4_resume import CHECK, FILL, resumed
from benchmarks.p11_again import CHANGE, CHANGED_BYTES, saved
from benchmarks.server import Channels, JupyterServer
from tests.leaks import own_places

SIZES_MB = (10, 30, 100, 300, 1000, 3000, 8000)
ROOM = 3.0
"""A size is left out if free memory or disk are less than this many times of it."""

IMAGE = results.TOP / "docs" / "images" / "snapshots.svg"
COSTS = ("first snapshot", "second snapshot", "resume → reply", "its pages copied")
USES: Mapping[str, str] = {
    "read all": "int(state.sum())",
    "write all": "state += 1",
}


async def run() -> int:
    """Measure, store and draw; 0."""
    at = results.now()
    found, left_out = await costs()
    price = await used()
    content = {
        "format": results.FORMAT,
        "at": at,
        "commit": machine.commit(),
        "machine": machine.describe(),
        "costs": found,
        "left_out": left_out,
        "price": price,
    }
    path = results.RESULTS / f"sweep-{at[:10]}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    draw(content, IMAGE)
    print(json.dumps({"costs": found, "price": price, "left_out": left_out}, indent=1))
    print(f"stored in {path.relative_to(results.TOP)}", file=sys.stderr)
    return 0


async def costs() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each size, seconds and bytes; and the sizes that do not fit, with the reason."""
    found: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(JupyterServer(stack.enter_context(own_places())))
        stays = await server.start_kernel(OURS)
        stack.push_async_callback(server.delete_kernel, stays)
        keeper = await stack.enter_async_context(Keeper(server.places))
        await server.warm()
        for size_mb in SIZES_MB:
            why = no_room(size_mb * 10**6, server.places.state)
            if why:
                left_out[f"{size_mb} MB"] = why
                continue
            print(f"{size_mb} MB …", file=sys.stderr, flush=True)
            found.append({"state_mb": size_mb, **await cost(server, keeper, size_mb * 10**6)})
    return found, left_out


def no_room(state_bytes: int, directory: Path) -> str:
    """Why a state of this size is not tried; empty if it fits."""
    free = shutil.disk_usage(directory).free
    available = 1024 * int(machine.field("/proc/meminfo", "MemAvailable").split()[0])
    for what, there in (("disk space", free), ("memory", available)):
        if there < ROOM * state_bytes:
            return f"{there / 2**30:.0f} GiB of {what} are too little"
    return ""


async def cost(server: JupyterServer, keeper: Keeper, state_bytes: int) -> dict[str, Any]:
    """One size, with a kernel of its own."""
    kernel_id = await server.start_kernel(OURS)
    try:
        async with server.channels(kernel_id) as kernel:
            await kernel.execute(FILL.format(size=state_bytes))
            sandbox_id = (await keeper.sandbox(kernel_id))["id"]
            first, one = await saved(keeper, sandbox_id, "first")
            began = time.perf_counter()
            suspended = await keeper.do("suspend", sandbox_id)
            took = time.perf_counter() - began
            await keeper.settled()
            files = pages.page_files(keeper.image(suspended["snapshot"]))
            await pages.read_s(files)
            copied = await pages.read_s(files)
            parts, told = await resumed(keeper, kernel, kernel_id)
            await kernel.execute(CHANGE.format(size=CHANGED_BYTES))
            second, two = await saved(keeper, sandbox_id, "second")
            await kernel.execute(CHECK)
    finally:
        await server.delete_kernel(kernel_id)
    return {
        "first snapshot": round(first, 4),
        "suspend": round(took, 4),
        "second snapshot": round(second, 4),
        "resume → reply": round(parts["execute"], 4),
        "its pages copied": round(copied, 4),
        "phases_ms": told["phases_ms"],
        "first_bytes": one["image_bytes"],
        "second_bytes": two["image_bytes"],
    }


def draw(content: Mapping[str, Any], path: Path) -> None:
    """The picture of a stored sweep; the same bytes for the same content."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "warmcell", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        rows = content["costs"]
        for name, mark in zip(COSTS, "os^x", strict=True):
            axes.plot([row["state_mb"] for row in rows], [row[name] for row in rows], marker=mark, label=name)
        axes.set(xscale="log", yscale="log", xlabel="state in MB", ylabel="seconds")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "warmcell benchmarks"})
        pyplot.close(figure)


async def used(state_bytes: int = 10**9) -> dict[str, dict[str, float]]:
    """Seconds of using all of a state: before it was ever saved, and after a restore that maps it, once and again."""
    found: dict[str, dict[str, float]] = {}
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(JupyterServer(stack.enter_context(own_places())))
        kernel_id = await server.start_kernel(OURS)
        stack.push_async_callback(server.delete_kernel, kernel_id)
        keeper = await stack.enter_async_context(Keeper(server.places))
        kernel = await stack.enter_async_context(server.channels(kernel_id))
        await kernel.execute(FILL.format(size=state_bytes))
        sandbox_id = (await keeper.sandbox(kernel_id))["id"]
        for name, code in USES.items():
            await kernel.execute(code)
            found[name] = {"before": await took(kernel, code)}
            await keeper.do("suspend", sandbox_id)
            await keeper.settled()
            found[name]["resume"] = (await resumed(keeper, kernel, kernel_id))[0]["execute"]
            found[name]["first time"] = await took(kernel, code)
            found[name]["again"] = await took(kernel, code)
    return {name: {what: round(seconds, 4) for what, seconds in row.items()} for name, row in found.items()}


async def took(kernel: Channels, code: str) -> float:
    """Seconds of a cell."""
    began = time.perf_counter()
    await kernel.execute(code)
    return time.perf_counter() - began
