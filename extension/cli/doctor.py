"""`warmcell doctor`: what this machine can do, what is missing, and the cure."""

import argparse
import asyncio
from collections.abc import Mapping
from typing import Any

from warmcell.extension.cli.link import running_keeper
from warmcell.extension.cli.output import WARNING, add_json, print_json, print_table, yes_no
from warmcell.sandbox.models import GIB
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import BackendReport, EngineReport

HEADINGS = ("BACKEND", "READY", "ISOLATION", "GPU", "SNAPSHOT", "FORK", "ROOTLESS", "WHY NOT")
EXIT_CODES = {"error": 1, "warning": WARNING}


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine can do, what is missing, and the cure",
        description="Try each backend for real and say what this machine can do, what is missing, and the cure. "
        "Works without a GPU, without root, and without a running keeper. Exit code 0: all is well; 3: kernels "
        "start, but something should be looked after; 1: kernels cannot start.",
    )
    parser.add_argument("--start", action="store_true", help="start the keeper first if none is running")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look, print, and give the exit code of the worst finding."""
    told, keeper = _look(start=arguments.start)
    told = {**told, "keeper": keeper}
    if arguments.json:
        print_json(told)
    else:
        _print(told)
    severities = {finding["severity"] for finding in told["findings"]}
    return next((code for severity, code in EXIT_CODES.items() if severity in severities), 0)


def _look(*, start: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The findings, from the keeper if one runs, and who that is."""
    keeper = running_keeper(start=start)
    if keeper is None:
        return _look_ourselves(), None
    with keeper:
        return keeper.get("/doctor"), keeper.get("/status")


def _look_ourselves() -> dict[str, Any]:
    from warmcell.extension import config
    from warmcell.extension.keeper.wiring import Wiring

    async def look() -> dict[str, Any]:
        wiring = Wiring(config.settings(), Paths.default())
        try:
            return await wiring.doctor()
        finally:
            await wiring.parking.engine.close()
            await wiring.nursery.close()

    return asyncio.run(look())


def _print(told: Mapping[str, Any]) -> None:
    machine = told["machine"]
    print(f"Warmcell {told['version']} for {machine['user']} on {machine['system']}, Python {machine['python']}")
    print(f"Keeper: {_keeper(told['keeper'])}")
    print(f"Control groups: {machine['cgroups']}")
    print(f"User namespaces: {machine['user_namespaces']}")
    print()
    print_table(HEADINGS, [_row(row, told["default_backend"]) for row in told["table"]])
    for who, choice in told["chosen"].items():
        print(f"Chosen for {who} that name none: {choice['backend']}{', since ' * bool(choice['why'])}{choice['why']}")
    print()
    for report in map(BackendReport.from_json, told["backends"]):
        _print_backend(report, told["limits"])
    for engine in map(EngineReport.from_json, told["engines"]):
        _print_engine(engine)
    print()
    _print_gpus(told["gpus"], told["parking"])
    for spec in told["kernelspecs"]:
        print(f"Kernelspec {spec['name']}: {spec['display_name']}, {spec['python']}")
    if not told["kernelspecs"]:
        print("Kernelspecs: none. `warmcell kernelspec install` makes one.")
    for version in told["versions"]:
        if version["ok"]:
            print(f"{version['name']} {version['found']} (at least {version['required']})")
    print()
    for finding in told["findings"]:
        print(f"{finding['severity']}: {finding['message']}")
        if finding["hint"]:
            print(f"  cure: {finding['hint']}")
    if not told["findings"]:
        print("All is well.")


def _keeper(status: Mapping[str, Any] | None) -> str:
    if status is None:
        return "not running (it starts with the first kernel)"
    return f"running (process {status['pid']}, version {status['version']})"


def _row(row: Mapping[str, Any], default: str) -> tuple[str, ...]:
    return (
        f"{row['backend']} (default)" if row["backend"] == default else row["backend"],
        yes_no(row["ready"]) if row["tried"] or not row["ready"] else "untried",
        row["isolation"],
        yes_no(row["gpu"]),
        ", by ".join(filter(None, (row["snapshot"], row["snapshot_by"]))) or "no",
        yes_no(row["fork"]),
        yes_no(row["rootless"]),
        row["why_not"] or "-",
    )


def _print_backend(report: BackendReport, limits: Mapping[str, Mapping[str, Any]]) -> None:
    """The cure of what is not ready, else what was found and which limits are held."""
    if not report.ready:
        print(f"To have {report.name}: {report.hint}")
        return
    held = [name for name in limits if report.details.get(name, "").startswith("enforced")]
    details = [f"{name} {value}" for name, value in report.details.items() if name not in limits]
    if report.no_gpus:
        details.append(f"no GPUs: {report.no_gpus}")
    details.append(f"limits held: {', '.join(held) or 'none'}")
    print(f"{report.name}: {', '.join(details)}")


def _print_engine(engine: EngineReport) -> None:
    """Why memory is not saved is a finding, or told here."""
    details = ", ".join(f"{name} {value}" for name, value in engine.details.items())
    of = f" of {' and '.join(engine.backends)}" if engine.backends else ""
    found = f"{engine.name}{f' ({details})' if details else ''}" if engine.ready else "none"
    if engine.backends and not engine.ready:  # Of the engine of most backends it is a finding.
        found = f"none, since {engine.why_not}"
    print(f"Snapshots{of}: {found}")


DRIVER_PARKS = {"cuda": "by the NVIDIA driver (cuda.core.checkpoint)", "simulated": "simulated"}


def _print_gpus(devices: list[dict[str, Any]], parking: Mapping[str, Any] | None) -> None:
    if not devices:
        print("GPUs: none; kernels run on the CPU.")
        return
    print_table(
        ("GPU", "KIND", "MEMORY", "DRIVER", "LEASED TO"),
        [
            (
                str(device["index"]),
                f"{device['name']}{' (simulated)' if device['simulated'] else ''}",
                f"{device['memory_total_bytes'] / GIB:.0f} GiB",
                device["driver_version"] or "-",
                _lease(device["lease"]),
            )
            for device in devices
        ],
    )
    if parking is not None:
        print(_parks(parking))
    print()


def _parks(parking: Mapping[str, Any]) -> str:
    """Who takes out what idle kernels have on which GPUs; why not, where nobody does, is a finding."""
    words = {"driver": DRIVER_PARKS.get(parking["engine"], parking["engine"]), "torch": "by torch itself"}
    found = []
    for by, how in words.items():
        on = [str(device["index"]) for device in parking["devices"] if device["by"] == by]
        if on:
            found.append(f"{how} on GPU {', '.join(dict.fromkeys(on))}")
    if not found:
        return "Parking: not possible here; idle kernels keep their GPUs"
    return f"Parking: {'; '.join(found)}; in up to {parking['budget_bytes'] / GIB:.1f} GiB of the host's memory"


def _lease(lease: Mapping[str, Any] | None) -> str:
    if lease is None:
        return "-"
    if lease["mine"]:
        return f"sandbox {lease['sandbox_id']}"
    return f"user {lease['user'] or 'unknown'} (keeper {lease['pid']})"
