"""`warmcell usage`: what sandboxes have used, and what was given back."""

import argparse
from typing import get_args

from warmcell.extension.cli.link import running_keeper
from warmcell.extension.cli.output import add_json, duration, print_json, print_table
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.usage import By, Usage, UsageRow, UsageStore, from_answer, total

HEADINGS = ("GPU BUSY", "GPU IDLE", "GIVEN BACK", "CPU BUSY", "CPU IDLE", "GiB-HOURS", "SUSPENDED")
DAYS = 30


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser(
        "usage",
        help="say what sandboxes have used",
        description="Say what your sandboxes have used: GPU and processor time, while they worked and while they were "
        "idle; memory over time; and the GPU time that parked and suspended kernels gave back, which others could use. "
        "Works without a running keeper.",
    )
    parser.add_argument("--by", choices=get_args(By), default="notebook", help="a line for each of these")
    parser.add_argument("--days", type=_days, default=DAYS, help=f"of so many days, today included; 0: all ({DAYS})")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    rows, whole = _look(arguments.by, arguments.days)
    if arguments.json:
        print_json({"by": arguments.by, "total": whole.to_json(), "rows": [row.to_json() for row in rows]})
        return 0
    if not rows:
        print("Nothing was used.")
        return 0
    table = [(*line(row.usage), _name(row)) for row in rows]
    print_table((*HEADINGS, arguments.by.upper()), [*table, (*line(whole), "all")])
    held = whole.gpu_active_s + whole.gpu_idle_s + whole.gpu_given_back_s
    if whole.gpu_given_back_s:
        part = 100 * whole.gpu_given_back_s / (whole.gpu_idle_s + whole.gpu_given_back_s)
        given = duration(whole.gpu_given_back_s)
        print(f"Of {duration(held)} of GPU time that kernels would have held, {given} was given back:")
        print(f"  {part:.0f} % of what they would have held idle.")
    return 0


def line(usage: Usage) -> tuple[str, ...]:
    """What was used, under the headings."""
    gib_hours = (usage.memory_active_gib_s + usage.memory_idle_gib_s) / 3600
    return (
        duration(usage.gpu_active_s),
        duration(usage.gpu_idle_s),
        duration(usage.gpu_given_back_s),
        duration(usage.cpu_active_s),
        duration(usage.cpu_idle_s),
        f"{gib_hours:.2f}",
        duration(usage.suspended_s),
    )


def _name(row: UsageRow) -> str:
    named = [row.sandbox_id, row.notebook, row.owner]
    return " · ".join(filter(None, named))


def _look(by: By, days: int) -> tuple[list[UsageRow], Usage]:
    keeper = running_keeper()
    if keeper is None:
        rows = UsageStore(Paths.default().usage).rows(by=by, days=days or None)
        return rows, total(rows)
    with keeper:
        return from_answer(keeper.get(f"/usage?by={by}&days={days}"))


def _days(text: str) -> int:
    if not text.isdecimal() or int(text) > 400:
        raise argparse.ArgumentTypeError("give 0 to 400 days")
    return int(text)
