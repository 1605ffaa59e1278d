"""What snapshots cost as a kernel's state grows, and what mapped memory costs when all of it is used.

`python -m benchmarks --sweep` stores `sweep-DATE.json`, of which `growth` makes a picture. For each size: a first
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

from benchmarks import growth, machine, results
from benchmarks.keeper import Keeper
from benchmarks.p4_resume import CHECK, FILL, copied, resumed
from benchmarks.p11_again import CHANGE, CHANGED_BYTES, saved
from benchmarks.rows import medians
from benchmarks.server import OURS, Channels, JupyterServer
from tests.leaks import own_places
from warmcell.sandbox.helper.program import PLAIN_VARIABLE

SIZES_MB = (10, 30, 100, 300, 1000, 3000, 8000)
SMALL_MB, TIMES = 300, 3
"""Up to this size each is measured so many times; what counts is the median."""
ROOM_ON_DISK, ROOM_IN_MEMORY = 3.0, 2.5
"""A size is left out if less than this many times of it is free."""

RESTORES: Mapping[str, Mapping[str, str]] = {"mapped": {}, "copied": {PLAIN_VARIABLE: "1"}}
USES: Mapping[str, str] = {
    "read all": "int(state.sum())",
    "write all": "state += 1",
}


async def run() -> int:
    """Measure, store, and put it into the documents; 0."""
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
    path = results.RESULTS / f"{growth.NAME}-{at[:10]}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    growth.write()
    for row in found:
        print(json.dumps(row))
    print(growth.price_table(content))
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
            times = TIMES if size_mb <= SMALL_MB else 1
            rows = [await cost(server, keeper, size_mb * 10**6) for _ in range(times)]
            phases_ms = medians([row.pop("phases_ms") for row in rows])
            found.append({"state_mb": size_mb, "n": times, **medians(rows), "phases_ms": phases_ms})
    return found, left_out


def no_room(state_bytes: int, directory: Path) -> str:
    """Why a state of this size is not tried; empty if it fits."""
    on_disk = shutil.disk_usage(directory).free
    in_memory = 1024 * int(machine.field("/proc/meminfo", "MemAvailable").split()[0])
    for what, there, needed in (("disk space", on_disk, ROOM_ON_DISK), ("memory", in_memory, ROOM_IN_MEMORY)):
        if there < needed * state_bytes:
            return f"{there / 2**30:.0f} GiB of {what} are too little"
    return ""


async def cost(server: JupyterServer, keeper: Keeper, state_bytes: int) -> dict[str, Any]:
    """One size, with a kernel of its own."""
    kernel_id = await server.start_kernel(OURS)
    try:
        async with server.channels(kernel_id) as kernel:
            await kernel.run(FILL.format(size=state_bytes))
            sandbox_id = (await keeper.sandbox(kernel_id))["id"]
            first, one = await saved(keeper, sandbox_id, "first")
            began = time.perf_counter()
            suspended = await keeper.do("suspend", sandbox_id)
            took = time.perf_counter() - began
            await keeper.settled()
            pages_copied = await copied(keeper, suspended["snapshot"], state_bytes)
            parts, told = await resumed(keeper, kernel, kernel_id)
            await kernel.run(CHANGE.format(size=CHANGED_BYTES))
            second, two = await saved(keeper, sandbox_id, "second")
            await kernel.execute(CHECK)
    finally:
        await server.delete_kernel(kernel_id)
    return {
        "first snapshot": round(first, 4),
        "suspend": round(took, 4),
        "second snapshot": round(second, 4),
        "resume → reply": round(parts["execute"], 4),
        "its pages copied": round(pages_copied, 4),
        "phases_ms": told["phases_ms"],
        "first_bytes": one["image_bytes"],
        "second_bytes": two["image_bytes"],
    }


async def used(state_bytes: int = 10**9) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of using all of a state before it was saved, and after a restore, the first time and again.

    Once with memory that is mapped from the image, as it is, and once with memory that each restore copies.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, env in RESTORES.items():
        async with contextlib.AsyncExitStack() as stack:
            places = stack.enter_context(own_places())
            server = await stack.enter_async_context(JupyterServer(places, env=env))
            stays = await server.start_kernel(OURS)
            stack.push_async_callback(server.delete_kernel, stays)
            keeper = await stack.enter_async_context(Keeper(places))
            await server.warm()
            found[kind] = {name: await _used_once(server, keeper, code, state_bytes) for name, code in USES.items()}
    return found


async def _used_once(server: JupyterServer, keeper: Keeper, code: str, state_bytes: int) -> dict[str, float]:
    """One kind of use, with a kernel of its own: what has been written since a restore is no longer of the image."""
    kernel_id = await server.start_kernel(OURS)
    try:
        async with server.channels(kernel_id) as kernel:
            await kernel.run(FILL.format(size=state_bytes))
            seconds = {"before": await took(kernel, code)}
            await keeper.do("suspend", (await keeper.sandbox(kernel_id))["id"])
            await keeper.settled()
            seconds["resume"] = (await resumed(keeper, kernel, kernel_id))[0]["execute"]
            seconds["first time"] = await took(kernel, code)
            seconds["again"] = await took(kernel, code)
    finally:
        await server.delete_kernel(kernel_id)
    return {what: round(took_s, 4) for what, took_s in seconds.items()}


async def took(kernel: Channels, code: str) -> float:
    """Seconds of a cell."""
    began = time.perf_counter()
    await kernel.execute(code)
    seconds = time.perf_counter() - began
    await kernel.run("1")
    return seconds
