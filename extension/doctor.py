"""What this machine can do, what is missing, and the cure: for `warmcell doctor` and the keeper's `GET /doctor`.

Drivers are given, not imported. Nothing here raises: what cannot be found out is a finding.
"""

import asyncio
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from warmcell.extension import environments, machine
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.choosing import AGENT, AUTO, Choice, Choosing
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.gpus.parking import ParkingPlace
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths, try_to_write
from warmcell.sandbox.reports import BackendReport, EngineReport
from warmcell.sandbox.wire import Wire

PROBE_TIMEOUT_S = 60.0
LIMITS = ("memory", "pids", "cpu", "layer")

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding(Wire):
    """Something that should be looked after."""

    severity: Severity
    """error: kernels cannot start; warning: they start, with less than they should have; note: good to know."""
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Wire):
    """A backend in a line."""

    backend: str
    ready: bool
    tried: bool
    """Whether a sandbox was made to know that."""
    isolation: str
    gpu: bool
    snapshot: str
    """The engine that saves its memory here; empty: none."""
    snapshot_by: str
    """What does that engine's work, where it is not as usual."""
    fork: bool
    rootless: bool
    """Whether ordinary users can have it on this machine."""
    why_not: str
    hint: str


async def collect(
    backends: Mapping[str, SandboxBackend],
    gpus: GpuPool,
    *,
    paths: Paths,
    configured: str = AUTO,
    among: Sequence[str] = (),
    engines: Sequence[EngineReport] = (),
    parking: ParkingPlace | None = None,
) -> dict[str, Any]:
    """Look at everything, and try each backend for real.

    Args:
        backends: All that are wired, by name.
        gpus: The machine's GPUs and leases.
        paths: Where this user's files lie.
        configured: `c.Warmcell.backend`.
        among: The backends that may be used.
        engines: What saves kernels' memory, as it was found.
        parking: Where the memory of GPUs goes while their kernels are idle.
    """
    places, reports, devices, versions, specs = await asyncio.gather(
        _places(paths),
        _probe_all(backends.values()),
        _gpus(gpus),
        asyncio.to_thread(machine.versions),
        asyncio.to_thread(environments.kernelspecs),
    )
    devices, gpu_findings = devices
    drivers = {str(device["driver_version"]) for device in devices if device["driver_version"]}
    versions = (*versions, *map(machine.driver_version, sorted(drivers)))
    parks, parking_findings = await _parking(parking, gpus) if devices and parking is not None else (None, [])
    choices = await _choices(backends, reports, configured=configured, among=among)
    default = choices["notebooks"].backend
    limits = _limits(next((report for report in reports if report.name == default), None))
    findings = (
        *places,
        *_backend_findings(reports, default, limits),
        *_engine_findings(engines, next((report for report in reports if report.name == default), None)),
        *gpu_findings,
        *parking_findings,
        *(
            Finding(severity=version.severity, message=version.message, hint=version.hint)
            for version in versions
            if not version.ok
        ),
        *(
            Finding(severity="warning", message=f"Kernelspec {spec.name}: {spec.why}", hint=spec.hint)
            for spec in specs
            if not spec.ok
        ),
    )
    return {
        "version": machine.own_version(),
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "user": machine.user(),
            "python": platform.python_version(),
            "cgroups": machine.cgroups(),
            "user_namespaces": machine.user_namespaces(as_root=os.getuid() == 0),
        },
        "paths": {"runtime": str(paths.runtime), "state": str(paths.state), "leases": str(paths.leases)},
        "default_backend": default,
        "chosen": {who: {"backend": choice.backend, "why": choice.why} for who, choice in choices.items()},
        "table": [row(report, engines).to_json() for report in reports],
        "backends": [report.to_json() for report in reports],
        "engines": [engine.to_json() for engine in engines],
        "limits": limits,
        "gpus": devices,
        "parking": parks,
        "versions": [version.to_json() for version in versions],
        "kernelspecs": [spec.to_json() for spec in specs],
        "findings": [finding.to_json() for finding in findings],
    }


def row(report: BackendReport, engines: Sequence[EngineReport]) -> Row:
    """What a backend gives on this machine: what it can do by itself, and by the engines that work here."""
    able = [engine for engine in _serving(engines, report) if engine.ready and report.ready]
    snapshot, by = (able[0].name, able[0].by) if able else ("", "")
    return Row(
        backend=report.name,
        ready=report.ready,
        isolation=report.capabilities.isolation,
        tried=report.tried,
        gpu=report.ready and report.capabilities.gpus and not report.no_gpus,
        snapshot=snapshot,
        snapshot_by=by,
        fork=bool(snapshot),
        rootless=report.ready and (report.capabilities.rootless if report.rootless is None else report.rootless),
        why_not=report.why_not,
        hint=report.hint,
    )


def _serving(engines: Sequence[EngineReport], report: BackendReport) -> Sequence[EngineReport]:
    """Those that save a backend's memory: its own, if there are such, else those of all."""
    able = [engine for engine in engines if engine.name in report.capabilities.memory_engines]
    own = [engine for engine in able if report.name in engine.backends]
    return own or [engine for engine in able if not engine.backends]


async def _choices(
    backends: Mapping[str, SandboxBackend], reports: Sequence[BackendReport], *, configured: str, among: Sequence[str]
) -> Mapping[str, Choice]:
    """What sandboxes get that name neither backend nor image."""
    choosing = Choosing(backends, configured=configured, among=among)
    for report in reports:
        choosing.know(report)
    spec = SandboxSpec(python="")
    return {"notebooks": choosing.for_notebook(spec), "agents": await choosing.for_owner(spec, AGENT)}


async def _probe_all(backends: Iterable[SandboxBackend]) -> list[BackendReport]:
    return list(await asyncio.gather(*(_probe(backend) for backend in backends)))


async def _probe(backend: SandboxBackend) -> BackendReport:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            return await backend.probe()
    except TimeoutError:
        return BackendReport(
            name=backend.name,
            ready=False,
            capabilities=backend.capabilities,
            why_not=f"trying it did not end within {PROBE_TIMEOUT_S:.0f} s",
            hint="See what the machine is busy with, then try again.",
        )


async def _gpus(gpus: GpuPool) -> tuple[list[dict[str, Any]], tuple[Finding, ...]]:
    try:
        devices = await gpus.status()
    except WarmcellError as error:
        return [], (Finding(severity="warning", message=f"GPUs: {error.message}", hint=error.hint),)
    if gpus.problem:
        return devices, (Finding(severity="warning", message=f"GPUs: {gpus.problem}"),)
    return devices, ()


async def _parking(place: ParkingPlace, gpus: GpuPool) -> tuple[dict[str, Any], list[Finding]]:
    """For each device who takes out what idle kernels have there, and why not the driver."""
    told: dict[str, Any] = {"engine": place.engine.name, "budget_bytes": place.budget_bytes, "devices": []}
    kept: dict[tuple[str, str], list[str]] = {}
    for device in await gpus.devices():
        why = hint = ""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await place.engine.check_device(device)
        except WarmcellError as error:
            why, hint = error.message, error.hint
        except TimeoutError:
            why, hint = f"The driver did not answer within {PROBE_TIMEOUT_S:.0f} s", "Look at `nvidia-smi`."
        by = "driver" if not why else "torch" if place.by_torch else None
        told["devices"].append({"uuid": device.uuid, "index": device.index, "by": by, "why": why, "hint": hint})
        if by is None:
            kept.setdefault((why, hint), []).append(str(device.index))
    told["ready"] = any(one["by"] is not None for one in told["devices"])
    return told, [
        Finding(
            severity="note",
            message=f"Idle kernels keep GPU {', '.join(dict.fromkeys(indexes))}: {why}",
            hint=f"{hint} Or let torch move its own tensors there: c.Warmcell.park_with_torch = True.",
        )
        for (why, hint), indexes in kept.items()
    ]


def _engine_findings(engines: Sequence[EngineReport], chosen: BackendReport | None) -> Iterable[Finding]:
    """Of the engine of the usual backend; others are for who asks for theirs, and in the table."""
    none = [engine for engine in engines if engine.name == "none"]
    for engine in (*none, *(() if chosen is None else _serving(engines, chosen))):
        if not engine.ready:
            yield Finding(
                severity="note",
                message=f"Kernels cannot be suspended, restored or forked: {engine.why_not}",
                hint=engine.hint,
            )


async def _places(paths: Paths) -> Sequence[Finding]:
    """Whether a keeper can write where it has to."""
    try:
        await asyncio.to_thread(try_to_write, paths)
    except WarmcellError as error:
        return [Finding(severity="error", message=f"Kernels cannot start: {error.message}", hint=error.hint)]
    return []


def _limits(report: BackendReport | None) -> dict[str, dict[str, Any]]:
    """Which limits the machine holds, as the default backend's probe tells them."""
    told = {} if report is None else report.details
    found = {}
    for name in LIMITS:
        enforced = told.get(name, "").startswith("enforced")
        why = "" if enforced else told.get(name, "not known").removeprefix("not enforced: ")
        found[name] = {"enforced": enforced, "why": why}
    return found


def _backend_findings(
    reports: Sequence[BackendReport], default: str, limits: Mapping[str, Mapping[str, Any]]
) -> Iterable[Finding]:
    chosen = next((report for report in reports if report.name == default), None)
    if chosen is None:
        known = ", ".join(sorted(report.name for report in reports))
        yield Finding(
            severity="error",
            message=f"There is no backend {default!r}, so kernels cannot start",
            hint=f"Set c.Warmcell.backend to one of {known}.",
        )
        return
    if not chosen.ready:
        yield Finding(severity="error", message=f"Kernels cannot start: {default}: {chosen.why_not}", hint=chosen.hint)
        return
    if not chosen.capabilities.isolated:
        yield Finding(
            severity="warning",
            message=f"Kernels run without isolation, since c.Warmcell.backend is {default!r}",
            hint='Set it to "auto".',
        )
    for name, limit in limits.items():
        if not limit["enforced"]:
            yield Finding(severity="warning", message=f"The {name} limit is not enforced", hint=limit["why"])
