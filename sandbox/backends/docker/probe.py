"""Whether containers can be had here, found out by asking the engine and making one."""

import asyncio
import grp
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.backends.docker import graphics
from warmcell.sandbox.backends.docker.about import EngineInfo
from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.backends.threads import ENGINE
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.models import GIB, MIB, Limits, SandboxId, SandboxSpec
from warmcell.sandbox.reports import BackendReport

TIMEOUT_S = 60.0
NOT_TRIED = "no sandbox was tried: c.Warmcell.docker_image names no image"


async def probe(
    backend: SandboxBackend, engine: Engine, image: str, *, check: Callable[[EngineInfo], object]
) -> BackendReport:
    """Ask the engine, make a sandbox of an image if one is named, and take it down. Never raises.

    Args:
        backend: Which is asked.
        engine: What it uses.
        image: Empty: no sandbox is tried.
        check: Raises `WarmcellError` where an engine that says this of itself is of no use.
    """
    details = {"engine": engine.address}
    why, hint, no_gpus = "", "", ""
    rootless: bool | None = None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            info = await ENGINE.run(engine.info, fresh=True)
            details |= {
                "version": f"{info.version}, API {info.api[0]}.{info.api[1]}",
                "runtimes": ", ".join(sorted(info.runtimes)),
                "storage": info.driver,
                "after a restart of the engine": "sandboxes stay" if info.live_restore else "sandboxes have ended",
            }
            if info.untried:
                details["no test was run with"] = ", ".join(info.untried)
            no_gpus = _why_no_gpus(info)
            rootless, details["for ordinary users"] = _for_others(info, _socket(engine.address))
            check(info)
            details |= await _try(backend) if image else {"tried": NOT_TRIED}
    except WarmcellError as error:
        why, hint = error.message, error.hint
    except Exception as error:  # A probe tells what is wrong; it must not fail itself.
        why, hint = f"{type(error).__name__}: {error}", "Report this: it is not a known lack."
    return BackendReport(
        name=backend.name,
        ready=not why,
        capabilities=backend.capabilities,
        why_not=why,
        hint=hint,
        details=details,
        tried=bool(image),
        no_gpus=no_gpus,
        rootless=rootless,
    )


def _socket(address: str) -> os.stat_result | None:
    try:
        return os.stat(address.removeprefix("unix://"))
    except OSError:
        return None


def _for_others(info: EngineInfo, socket: os.stat_result | None) -> tuple[bool, str]:
    """Whether users who are not root can have containers of this engine, and how."""
    if info.rootless:
        return True, "each has an engine of their own, as this one is"
    if socket is None:
        return False, "its socket cannot be looked at"
    if socket.st_mode & stat.S_IWOTH:
        return True, "everybody may use it, and so has root's rights"
    if socket.st_mode & stat.S_IWGRP and socket.st_gid != 0:
        return True, f"the group {_group(socket.st_gid)} may use it, and so has root's rights"
    return socket.st_uid != 0, "only the owner of its socket may use it"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _why_no_gpus(info: EngineInfo) -> str:
    try:
        graphics.check(info)
    except WarmcellError as error:
        return f"{error.message}. {error.hint}"
    return ""


async def _try(backend: SandboxBackend) -> Mapping[str, str]:
    sandbox_id = SandboxId(secrets.token_hex(6))
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="warmcell-probe-"))
    limits = Limits(memory_bytes=GIB, pids=256, cpus=1.0, layer_bytes=64 * MIB, shm_bytes=16 * MIB)
    try:
        instance = await backend.create(
            SandboxSpec(python="", limits=limits), sandbox_id=sandbox_id, directory=directory
        )
        await instance.stop()
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
    told = {
        name: "enforced" if status.enforced else f"not enforced: {status.why}"
        for name, status in instance.limits.items()
    }
    return {"user": "root" if os.getuid() == 0 else f"uid {os.getuid()}", **told}
