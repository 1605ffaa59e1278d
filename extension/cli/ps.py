"""`warmcell ps`: the sandboxes that run, and what went wrong with those that failed."""

import argparse
import time
from collections.abc import Iterator, Sequence

from warmcell.extension.cli.link import running_keeper
from warmcell.extension.cli.output import add_json, duration, print_json, print_table
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import GIB, MIB, SandboxInfo, SnapshotInfo

HEADINGS = ("SANDBOX", "STATE", "FOR", "ISOLATION", "GPU", "NETWORK", "START", "AGE", "NOTEBOOK")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser(
        "ps",
        help="list sandboxes",
        description="List your sandboxes: what each is for, what isolates it, which GPUs it has, and how its kernel "
        "started. Those that failed in the last ten minutes are listed with the reason and the cure.",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the list."""
    keeper = running_keeper()
    if keeper is None:
        return _no_keeper(as_json=arguments.json)
    with keeper:
        answer = keeper.get("/sandboxes")
        status = keeper.get("/status")
        saved = keeper.get("/snapshots")["snapshots"]
    if arguments.json:
        print_json({"keeper": status, **answer, "snapshots": saved})
        return 0
    infos = [SandboxInfo.from_json(one) for one in answer["sandboxes"]]
    if not infos:
        print(f"No sandboxes. The keeper (process {status['pid']}) is running.")
        return 0
    snapshots = [SnapshotInfo.from_json(one) for one in saved]
    print_table(HEADINGS, [row(info, snapshots) for info in infos])
    for info in infos:
        for line in notes(info, snapshots):
            print(line)
    for line in choices(infos):
        print(line)
    return 0


def choices(infos: Sequence[SandboxInfo]) -> Iterator[str]:
    """Why those that named no backend have theirs, once for each reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for info in infos:
        if info.backend_why:
            reasons.setdefault((info.backend, info.backend_why), []).append(info.id)
    for (backend, why), ids in reasons.items():
        yield f"{', '.join(ids)}: {backend} was chosen, since {why}"


def _no_keeper(*, as_json: bool) -> int:
    if as_json:
        print_json({"keeper": None, "sandboxes": [], "snapshots": []})
    else:
        print("No keeper is running, so there are no sandboxes. It starts with the first kernel.")
    return 0


def row(info: SandboxInfo, snapshots: Sequence[SnapshotInfo] = ()) -> tuple[str, ...]:
    """A sandbox under the headings."""
    return (
        info.id,
        info.state,
        info.owner,
        info.backend if info.isolated else f"NONE ({info.backend})",
        _gpus(info),
        "hosts" if info.egress is not None else "open" if info.network == "host" else info.network,
        _asleep(info, snapshots) if info.state is State.SUSPENDED else _start(info),
        duration(time.time() - info.created_at),
        info.notebook or "-",
    )


def _gpus(info: SandboxInfo) -> str:
    if info.parked is not None:
        stays = f", {info.parked.stays_bytes / GIB:.1f} GiB stay" if info.parked.stays_bytes else ""
        return f"parked ({info.parked.vram_bytes / GIB:.1f} GiB{stays})"
    if not info.gpus:
        return "CPU"
    return ", ".join(f"{gpu.index}: {gpu.name}{' (simulated)' if gpu.simulated else ''}" for gpu in info.gpus)


def _start(info: SandboxInfo) -> str:
    if info.phase is not None and info.state is not State.FAILED:
        return f"{info.phase.name} for {duration(time.time() - info.phase.since)}"
    if info.started_from is None or info.started_ms is None:
        return "-"
    return f"{info.started_from}, {info.started_ms:.0f} ms"


def _asleep(info: SandboxInfo, snapshots: Sequence[SnapshotInfo]) -> str:
    saved = next((one for one in snapshots if one.id == info.snapshot), None)
    return "-" if saved is None else f"{(saved.image_bytes + saved.layer_bytes) / MIB:.0f} MiB on disk"


def notes(info: SandboxInfo, snapshots: Sequence[SnapshotInfo] = ()) -> Iterator[str]:
    """What does not fit into a row."""
    if info.phase is not None and info.state is not State.FAILED and (info.phase.detail or info.phase.hint):
        yield f"{info.id}: {info.phase.name}: {info.phase.detail} {info.phase.hint}".rstrip()
    if info.error is not None:
        yield f"{info.id}: {info.error.message}"
        if info.error.hint:
            yield f"  cure: {info.error.hint}"
    for module, why in (info.template.failed if info.template is not None else {}).items():
        yield f"{info.id}: the template is without {module}: {why}"
    named = [one.name for one in snapshots if one.kind == "named" and one.kernel_id == info.kernel_id and one.name]
    if named and info.kernel_id is not None:
        yield f"{info.id}: snapshots: {', '.join(named)}"
    if info.gpu_note:
        yield f"{info.id}: GPU: {info.gpu_note}"
    if info.workspace_note:
        yield f"{info.id}: workspace: {info.workspace_note}"
    for name, limit in info.limits.items():
        if limit.value is not None and not limit.enforced:
            yield f"{info.id}: the {name} limit is not enforced: {limit.why}"
