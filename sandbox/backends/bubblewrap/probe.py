"""Whether a sandbox can be had here, found out by making one."""

import asyncio
import contextlib
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.backends.bubblewrap import binary
from warmcell.sandbox.backends.cgroups import Cgroups
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import GIB, MIB, Limits, SandboxId, SandboxSpec
from warmcell.sandbox.reports import BackendReport

TIMEOUT_S = 60.0
NOBODY = 65534


async def probe(backend: SandboxBackend, cgroups: Cgroups) -> BackendReport:
    """Make a sandbox of this very Python, look at it, and take it down. Never raises."""
    details = {
        "user": "root" if os.getuid() == 0 else f"uid {os.getuid()}",
        "machine": f"{platform.machine()}, Linux {platform.release()}",
    }
    try:
        async with asyncio.timeout(TIMEOUT_S):
            found = await asyncio.to_thread(binary.find)
            details["bubblewrap"] = f"{found.version_text} ({found.path})"
            rootless = await asyncio.to_thread(_as_somebody, found.path)
            by_groups = await asyncio.to_thread(cgroups.describe)
            details |= {
                **await _try(backend),
                **{n: line for n, line in by_groups.items() if line.startswith("enforced")},
            }
    except WarmcellError as error:
        return _not_ready(backend, str(error.message), error.hint, details)
    except Exception as error:  # A probe tells what is wrong; it must not fail itself.
        return _not_ready(backend, f"{type(error).__name__}: {error}", "Report this: it is not a known lack.", details)
    return BackendReport(
        name=backend.name, ready=True, capabilities=backend.capabilities, details=details, rootless=rootless
    )


def _as_somebody(bwrap: Path) -> bool:
    """Whether an ordinary user can make the namespaces too; as one, that was tried already. Blocks."""
    if os.getuid() != 0:
        return True
    argv = [str(bwrap), "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "true"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # The first where they may not enter its folder.
        tried = subprocess.run(
            argv, user=NOBODY, group=NOBODY, extra_groups=(), cwd="/", capture_output=True, timeout=30, check=False
        )
        return tried.returncode == 0
    return False


async def _try(backend: SandboxBackend) -> Mapping[str, str]:
    sandbox_id = SandboxId(secrets.token_hex(6))
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="warmcell-probe-"))
    limits = Limits(memory_bytes=GIB, pids=256, cpus=1.0, layer_bytes=64 * MIB, shm_bytes=16 * MIB)
    spec = SandboxSpec(python=sys.executable, limits=limits)
    try:
        instance = await backend.create(spec, sandbox_id=sandbox_id, directory=directory)
        await instance.stop()
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
    return {
        name: "enforced" if status.enforced else f"not enforced: {status.why}"
        for name, status in instance.limits.items()
    }


def _not_ready(backend: SandboxBackend, why: str, hint: str, details: Mapping[str, str]) -> BackendReport:
    return BackendReport(
        name=backend.name,
        ready=False,
        capabilities=backend.capabilities,
        why_not=why,
        hint=hint,
        details=details,
    )
