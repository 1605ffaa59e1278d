"""Whether a sandbox can be had here, found out by making one."""

import asyncio
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.backends.gvisor import binary, nvproxy
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import GIB, MIB, Limits, SandboxId, SandboxSpec
from warmcell.sandbox.reports import BackendReport

TIMEOUT_S = 30.0


async def probe(backend: SandboxBackend) -> BackendReport:
    """Make a sandbox of this very Python and take it down. Never raises."""
    details = {"machine": f"{platform.machine()}, Linux {platform.release()}"}
    why, hint, no_gpus = "", "", ""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            found = await asyncio.to_thread(binary.find)
            details["runsc"] = f"{found.version} ({found.path})"
            no_gpus = await asyncio.to_thread(_why_no_gpus, found)
            details |= await _try(backend)
    except WarmcellError as error:
        why, hint = str(error.message), error.hint
    except Exception as error:  # A probe tells what is wrong; it must not fail itself.
        why, hint = f"{type(error).__name__}: {error}", "Report this: it is not a known lack."
    return BackendReport(
        name=backend.name,
        ready=not why,
        capabilities=backend.capabilities,
        why_not=why,
        hint=hint,
        details=details,
        no_gpus=no_gpus,
    )


def _why_no_gpus(runsc: binary.Runsc) -> str:
    try:
        nvproxy.check(runsc)
    except WarmcellError as error:
        return f"{error.message}. {error.hint}".rstrip(".")
    return ""


async def _try(backend: SandboxBackend) -> Mapping[str, str]:
    sandbox_id = SandboxId(secrets.token_hex(6))
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="warmcell-probe-"))
    limits = Limits(memory_bytes=GIB, pids=256, cpus=1.0, layer_bytes=64 * MIB, shm_bytes=16 * MIB)
    spec = SandboxSpec(python=sys.executable, backend=backend.name, limits=limits)
    try:
        instance = await backend.create(spec, sandbox_id=sandbox_id, directory=directory)
        await instance.stop()
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
    return {
        name: "enforced" if status.enforced else f"not enforced: {status.why}"
        for name, status in instance.limits.items()
    }
