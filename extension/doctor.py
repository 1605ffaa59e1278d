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
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.models import BackendReport, EngineReport, Wire
from warmcell.sandbox.paths import Paths

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


async def collect(
    backends: Mapping[str, SandboxBackend],
    gpus: GpuPool,
    *,
    paths: Paths,
    default: str = "bubblewrap",
    engines: Sequence[EngineReport] = (),
) -> dict[str, Any]:
    """Look at everything, and try each backend for real.

    Args:
        backends: All that are wired, by name.
        gpus: The machine's GPUs and leases.
        paths: Where this user's files lie.
        default: The backend of sandboxes that ask for none.
        engines: What saves kernels' memory, as it was found.
    """
    reports, devices, versions, specs = await asyncio.gather(
        _probe_all(backends.values()),
        _gpus(gpus),
        asyncio.to_thread(machine.versions),
        asyncio.to_thread(environments.kernelspecs),
    )
    devices, gpu_findings = devices
    drivers = {str(device["driver_version"]) for device in devices if device["driver_version"]}
    versions = (*versions, *map(machine.driver_version, sorted(drivers)))
    limits = _limits(next((report for report in reports if report.name == default), None))
    findings = (
        *_backend_findings(reports, default, limits),
        *_engine_findings(engines),
        *gpu_findings,
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
        "backends": [report.to_json() for report in reports],
        "engines": [engine.to_json() for engine in engines],
        "limits": limits,
        "gpus": devices,
        "versions": [version.to_json() for version in versions],
        "kernelspecs": [spec.to_json() for spec in specs],
        "findings": [finding.to_json() for finding in findings],
    }


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


def _engine_findings(engines: Sequence[EngineReport]) -> Iterable[Finding]:
    for engine in engines:
        if not engine.ready:
            yield Finding(
                severity="note",
                message=f"Kernels cannot be suspended, restored or forked: {engine.why_not}",
                hint=engine.hint,
            )


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
            hint='Set it to "bubblewrap".',
        )
    for name, limit in limits.items():
        if not limit["enforced"]:
            yield Finding(severity="warning", message=f"The {name} limit is not enforced", hint=limit["why"])
