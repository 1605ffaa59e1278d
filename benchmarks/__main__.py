"""`python -m benchmarks`: measure, store the results, put the tables into the documents.

As root everything is measured twice: as root, and as an ordinary user in a process of its own. `--python` measures
kernels of another environment and stores nothing. `--sweep` measures what snapshots cost as state grows instead, and
draws that; `--ranks` does so for cells and values on several ranks.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from benchmarks import (
    agents_page,
    contained,
    engines,
    growth,
    machine,
    ordinary,
    p1_start,
    p2_restart,
    p3_fork,
    p4_resume,
    p5_remote,
    p6_sending,
    p7_agents,
    p8_memory,
    p9_proxy,
    p11_again,
    results,
    spread,
    sweep,
)
from benchmarks.results import Result
from benchmarks.rows import ENGINES, Engine, Row
from benchmarks.server import BenchmarkError
from tests.lanes import absence

Engines = Sequence[Engine]

OF_KERNELS: Mapping[str, Callable[[int | None, Engines, str], Awaitable[Sequence[Row]]]] = {
    "P1": lambda rounds, engines, python: p1_start.measure(
        rounds=rounds or p1_start.ROUNDS, engines=engines, python=python
    ),
    "P2": lambda rounds, engines, python: p2_restart.measure(
        rounds=rounds or p2_restart.ROUNDS, engines=engines, python=python
    ),
    "P3": lambda rounds, engines, python: p3_fork.measure(rounds=rounds or p3_fork.ROUNDS, python=python),
    "P4": lambda rounds, engines, python: p4_resume.measure(rounds=rounds or p4_resume.ROUNDS, python=python),
    "P8": lambda rounds, engines, python: p8_memory.measure(engines=engines, python=python),
    "P11": lambda rounds, engines, python: p11_again.measure(
        rounds=min(rounds or p11_again.ROUNDS, p11_again.ROUNDS), python=python
    ),
}
"""What can be measured with kernels of another environment too."""

OTHERS: Mapping[str, Callable[[int | None], Awaitable[Sequence[Row]]]] = {
    "P5": lambda rounds: p5_remote.measure(rounds=rounds or p5_remote.ROUNDS),
    "P6": lambda rounds: p6_sending.measure(rounds=rounds or p6_sending.ROUNDS),
    "P9": lambda rounds: p9_proxy.measure(rounds=rounds or p9_proxy.ROUNDS),
}

CONTAINED: Mapping[str, Callable[[int | None, Sequence[str], Engines], Awaitable[Sequence[Row]]]] = {
    "P1": lambda rounds, backends, engines: contained.new_kernels(
        rounds=rounds or contained.START_ROUNDS, backends=backends, engines=engines
    ),
    "P2": lambda rounds, backends, engines: contained.restarts(
        rounds=rounds or contained.RESTART_ROUNDS, backends=backends, engines=engines
    ),
    "P7": lambda rounds, backends, engines: p7_agents.measure(
        rounds=rounds or p7_agents.ROUNDS, backends=backends, engines=engines
    ),
}
"""What is measured beside `docker run`, with an engine of its own, which only root starts."""

OF_STARTS, OF_SNAPSHOTS = ("P1", "P2", "P7", "P8"), ("P3", "P4", "P11")
"""Measured with each engine that new kernels come from; measured where memory can be saved at all."""

NAMES = sorted({*OF_KERNELS, *OTHERS, *CONTAINED}, key=lambda name: int(name[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every promise holds, 1 if one does not or something could not be measured."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.python:
        if options.sweep or options.ranks:
            parser.error("--python goes with promises, not with --sweep or --ranks")
        options.python = os.path.abspath(options.python)
        options.only = options.only or list(OF_KERNELS)
        options.store = False
        if others := sorted(set(options.only).difference(OF_KERNELS)):
            parser.error(f"--python does not go with {', '.join(others)}: choose from {', '.join(OF_KERNELS)}")
        try:
            machine.packages(options.python)
        except BenchmarkError as error:
            parser.error(f"--python: {error}")
    options.only = options.only or list(NAMES)
    if options.tables:
        _write_documents()
        return 0
    if options.sweep:
        return asyncio.run(sweep.run())
    if options.ranks:
        return asyncio.run(spread.run())
    if options.rows_only:
        print(json.dumps(asyncio.run(_measure(options)).to_json()))
        return 0
    found = [asyncio.run(_measure(options))]
    missing = None
    if os.getuid() == 0 and options.as_user:
        missing = absence("user")
        if missing is None:
            rounds = [] if options.rounds is None else ["--rounds", str(options.rounds)]
            python = ["--python", options.python] if options.python else []
            found.append(ordinary.measured([*rounds, *python, "--only", *options.only], engine="P7" in options.only))
        else:
            _say(f"not measured as an ordinary user: {missing.why}. Cure: {missing.cure}")
    print(results.long_table(found))
    if options.store:
        path = results.store(found, options.name, commit=machine.commit())
        _write_documents()
        _say(f"stored in {path.relative_to(results.TOP)}")
    broken = [
        f"{row.promise} ({row.engine}: {row.ratio:.3f}×, {one.user})"
        for one in found
        for row in one.rows
        if not row.kept
    ]
    if broken:
        _say(f"not kept: {', '.join(broken)}")
    return 1 if broken or missing or any(one.absent for one in found) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=NAMES, nargs="+", help="these promises only")
    parser.add_argument("--rounds", type=int, help="rounds of each, instead of its own number")
    parser.add_argument("--python", default="", help="interpreter of the kernels that are measured; prints only")
    parser.add_argument("--name", default="bench", help="first part of the result's file name")
    parser.add_argument("--no-store", dest="store", action="store_false", help="print only")
    parser.add_argument("--no-user", dest="as_user", action="store_false", help="not as an ordinary user too")
    parser.add_argument("--sweep", action="store_true", help="measure snapshots as state grows instead, and draw it")
    parser.add_argument("--ranks", action="store_true", help="measure one to eight ranks instead, and draw it")
    parser.add_argument("--tables", action="store_true", help="measure nothing; write the tables from what is stored")
    parser.add_argument("--rows-only", action="store_true", help=argparse.SUPPRESS)
    return parser


async def _measure(options: argparse.Namespace) -> Result:
    user: results.User = "root" if os.getuid() == 0 else "ordinary"
    at, load, busy = results.now(), machine.load(), machine.busy_pct()
    if busy > machine.BUSY_PCT:
        _say(f"others use {busy} % of the processors: these numbers are not worth keeping")
    rows: list[Row] = []
    snapshots = (
        await engines.why_no_snapshots(python=options.python)
        if {*OF_STARTS, *OF_SNAPSHOTS}.intersection(options.only)
        else ""
    )
    starts = snapshots or (
        await engines.why_no_starts(python=options.python) if set(OF_STARTS).intersection(options.only) else ""
    )
    absent = {f"{name} with criu": starts for name in OF_STARTS if starts and name in options.only}
    absent |= {name: snapshots for name in OF_SNAPSHOTS if snapshots and name in options.only}
    for what, why in absent.items():
        _say(f"not measured as {user}: {what}: {why}")
    served: Engines = [one for one in ENGINES if one != "criu" or not starts]
    for name in options.only:
        if name in absent:
            continue
        if name in OF_KERNELS:
            rows.extend(await _tried(name, user, OF_KERNELS[name](options.rounds, served, options.python), absent))
        elif name in OTHERS:
            rows.extend(await _tried(name, user, OTHERS[name](options.rounds), absent))
    if user == "ordinary" and "P7" in options.only:
        if (engine := ordinary.lent()) is None:
            absent["P7"] = "`docker run` needs an engine of containers, which root's run of the benchmarks lends"
        else:
            measured = p7_agents.measure(
                rounds=options.rounds or p7_agents.ROUNDS, backends=["bubblewrap"], engines=served, docker=engine
            )
            rows.extend(await _tried("P7", user, measured, absent))
    for name in [name for name in options.only if name in CONTAINED and user == "root" and not options.python]:
        missing = {backend: found for backend in ("docker", "gvisor") if (found := absence(backend)) is not None}
        if "docker" in missing:
            absent[f"{name} in containers"] = missing["docker"].why
            continue
        absent |= {f"{name} in {backend}": found.why for backend, found in missing.items()}
        backends = [backend for backend in ("bubblewrap", "docker", "gvisor") if backend not in missing]
        measured = CONTAINED[name](options.rounds, backends, served)
        rows.extend(await _tried(f"{name} in containers", user, measured, absent))
    return Result(
        user=user,
        at=at,
        machine=machine.describe(options.python),
        load_before=load,
        busy_pct=busy,
        rows=rows,
        absent=absent,
    )


async def _tried(
    name: str, user: results.User, measured: Awaitable[Sequence[Row]], absent: dict[str, str]
) -> Sequence[Row]:
    """The rows of a measurement; why there are none goes to `absent`."""
    _say(f"{name} as {user} …")
    began = time.monotonic()
    try:
        found = await measured
    except BenchmarkError as error:  # What has been measured until then is worth keeping.
        absent[name] = f"{error}"
        _say(f"  {error}")
        return ()
    for row in found:
        _say(f"  {row.what}, {row.engine}: {row.ratio:.3f}×")
    _say(f"  after {time.monotonic() - began:.0f} s")
    return found


def _write_documents() -> None:
    for path, content in results.documents(results.newest()).items():
        path.write_text(content)
    growth.write()
    spread.write()
    agents_page.write()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
