"""`warmcell gpus`: the machine's GPUs, who has which, and who waits."""

import argparse
import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from warmcell.extension.cli.link import running_keeper
from warmcell.extension.cli.output import add_json, duration, print_cure, print_json, print_table
from warmcell.sandbox.models import GIB
from warmcell.sandbox.paths import Paths

HEADINGS = ("GPU", "NAME", "MEMORY", "USED", "BUSY", "HELD BY", "FOR")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser(
        "gpus",
        help="list GPUs, who has which, and who waits",
        description="List the machine's GPUs: what is used of each, which sandbox of which user holds it and for how "
        "long, and who waits in the queue, the next one first. Works without a running keeper and without a GPU.",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print them."""
    told, notebooks = _look()
    if arguments.json:
        print_json(told)
        return 0
    if told["gpus"]:
        print_table(HEADINGS, [row for gpu in told["gpus"] for row in rows(gpu, notebooks)])
    else:
        print("No GPU: kernels run on the CPU.")
    for line in waiting(told["queue"], notebooks):
        print(line)
    if told["problem"]:
        print(f"GPUs may be missing: {told['problem']}")
    if told["queue"]:
        print_cure("stop a sandbox that holds one (`warmcell ps`), or wait")
    return 0


def rows(gpu: Mapping[str, Any], notebooks: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """A GPU under the headings, a line for each who has it or a share of it."""
    used, busy = gpu["memory_used_bytes"], gpu["utilization_pct"]
    name = f"{gpu['name']}{' (simulated)' * gpu['simulated']}{' (does not answer)' * gpu['lost']}"
    first = (
        str(gpu["index"]),
        name,
        f"{gpu['memory_total_bytes'] / GIB:.0f} GiB",
        "-" if used is None else f"{used / GIB:.1f} GiB",
        "-" if busy is None else f"{busy:.0f} %",
    )
    for lease in gpu["leases"] or [None]:
        yield (*first, *(("free", "-") if lease is None else _holder(lease, notebooks)))
        first = ("", "", "", "", "")


def waiting(queue: Sequence[Mapping[str, Any]], notebooks: Mapping[str, str]) -> Iterator[str]:
    """A line for each who waits."""
    for n, one in enumerate(queue, 1):
        who = notebooks.get(one["sandbox_id"]) or f"sandbox {one['sandbox_id']}"
        if not one["mine"]:
            who = f"user {one['user']}"
        about = "" if one["estimate_s"] is None else f", about {duration(one['estimate_s'])} more"
        yield f"{n}. {who} waits for {one['request']} since {duration(time.time() - one['since'])}{about}"


def _holder(lease: Mapping[str, Any], notebooks: Mapping[str, str]) -> tuple[str, str]:
    part = f"1/{lease['parts']}: " if lease["parts"] > 1 else ""
    if lease["mine"]:
        who = notebooks.get(lease["sandbox_id"]) or f"sandbox {lease['sandbox_id']}"
    else:
        who = f"user {lease['user']}" if lease["user"] else "somebody unknown"
    return f"{part}{who}", duration(time.time() - lease["since"]) if lease["since"] else "-"


def _look() -> tuple[dict[str, Any], dict[str, str]]:
    """The answer of `GET /gpus`, from the keeper if one runs, and the notebooks of this user's sandboxes."""
    keeper = running_keeper()
    if keeper is None:
        return asyncio.run(_look_ourselves()), {}
    with keeper:
        boxes = keeper.get("/sandboxes")["sandboxes"]
        return keeper.get("/gpus"), {box["id"]: box["notebook"] for box in boxes if box["notebook"]}


async def _look_ourselves() -> dict[str, Any]:
    from warmcell.extension import config
    from warmcell.extension.keeper.wiring import gpu_pool

    pool = gpu_pool(config.settings(), Paths.default())
    rows, queue = await pool.status(), await pool.queue()
    return {"gpus": rows, "queue": queue, "shares": pool.most_parts, "problem": pool.problem}
