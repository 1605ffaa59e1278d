"""The `process` backend: no isolation at all. For machines and tests that trust the code they run.

The guest's init runs as a plain child, with the user's own rights and files, in a process group and, where that can be
had, in a control group of its own. Whoever shows such a sandbox marks it as unsafe.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.base import ExitInfo
from warmcell.sandbox.backends.cgroups import Cgroup, Cgroups
from warmcell.sandbox.backends.child import Child, StageFailedError
from warmcell.sandbox.backends.fingerprint import fingerprint
from warmcell.sandbox.backends.processes import bearing, descendants, keeper_mark
from warmcell.sandbox.backends.threads import in_thread
from warmcell.sandbox.errors import (
    InvalidRequestError,
    OperationTimeoutError,
    SandboxStartError,
    UnsupportedOperationError,
)
from warmcell.sandbox.guest_tree import guest_tree
from warmcell.sandbox.models import GpuDevice, LimitStatus, SandboxId, SandboxSpec
from warmcell.sandbox.reports import BackendReport, Capabilities

MARK = "WARMCELL_PROCESS_SANDBOX"
"""In the environment of init and so of what it starts: by it a process is found that has left the group."""
PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TMPDIR", "TZ", "LD_LIBRARY_PATH")
"""Where the driver's libraries lie in a place of their own, the last one alone says where."""
NO_LAYER = "the process backend has no layer: packages are installed into the environment itself"
STOP_TIMEOUT_S = 30.0


@dataclass(slots=True)
class Remains:
    """What a sandbox, or the start of one, has to give back."""

    run: Path
    mark: str
    child: Child | None = None
    cgroup: Cgroup | None = None


class ProcessInstance:
    """Implements `SandboxInstance`."""

    workspace_note = ""
    waits = False
    stands_by = False
    shows_others = True
    """It sees all that the host has."""

    def __init__(self, remains: Remains, child: Child, limits: Mapping[str, LimitStatus]) -> None:
        self._remains = remains
        self._child = child
        self._cgroup = remains.cgroup
        self.pid = child.pid
        self.run_directory = remains.run
        self.guest_run_directory = str(remains.run)
        self.limits = limits
        self._oom_kills = 0
        self._stopping: asyncio.Task[None] | None = None
        self._ended = asyncio.create_task(self._watch())

    async def show_gpus(self, gpus: Sequence[GpuDevice]) -> None:
        """It sees them."""

    def processes(self) -> Sequence[int]:
        """Host pids of init and what it has started."""
        if self._child.ended:
            return ()
        found = set(self._cgroup.pids()) if self._cgroup is not None else set()
        return tuple(sorted({self.pid, *descendants(self.pid), *found}))

    def oom_kills(self) -> int:
        """As far as its memory group tells."""
        if self._cgroup is not None:
            self._oom_kills = max(self._oom_kills, self._cgroup.oom_kills())
        return self._oom_kills

    async def save_layer(self, target: Path) -> None:
        """Never: its files are the host's own."""
        raise _no_layers()

    async def can_be_replaced_by(self, other: object, *, fork_server: bool = False) -> bool:
        """Never: its files are the host's own."""
        return False

    async def wait(self) -> ExitInfo:
        """Wait for its end."""
        return await asyncio.shield(self._ended)

    async def stop(self, *, timeout: float = STOP_TIMEOUT_S) -> ExitInfo:
        """End it and all that it has started."""
        if self._stopping is None or (self._stopping.done() and self._stopping.exception() is not None):
            self._stopping = asyncio.create_task(_release(self._remains, timeout=timeout))
        await asyncio.shield(self._stopping)
        return await self.wait()

    async def _watch(self) -> ExitInfo:
        code = await self._child.wait()
        return ExitInfo(exit_code=code, oom_killed=self.oom_kills() > 0 and code == 137, message=self._child.tail)


class ProcessBackend:
    """Implements `SandboxBackend`."""

    name = "process"

    def __init__(self) -> None:
        self._cgroups = Cgroups()

    @property
    def capabilities(self) -> Capabilities:
        """No isolation: the host's network, files and devices."""
        return Capabilities(isolated=False, gpus=True, networks=("host",), snapshot_engines=("template",))

    async def probe(self) -> BackendReport:
        """It needs nothing."""
        return BackendReport(
            name=self.name,
            ready=True,
            capabilities=self.capabilities,
            details={"isolation": "none", **await asyncio.to_thread(self._cgroups.describe)},
        )

    def fingerprint(self, spec: SandboxSpec) -> str:
        """Of the environment on the host."""
        return fingerprint(spec.python, spec.preload)

    async def create(
        self,
        spec: SandboxSpec,
        *,
        sandbox_id: SandboxId,
        directory: Path,
        gpus: Sequence[GpuDevice] = (),
        layer: Path | None = None,
        named: SandboxId | None = None,
        later: bool = False,
        progress: Callable[[str], None] = lambda detail: None,
    ) -> ProcessInstance:
        """Start init as a plain process; see the port."""
        if layer is not None:
            raise _no_layers()
        await in_thread(_check, spec)
        progress("starting a process")
        remains = Remains(run=directory / "run", mark=f"{keeper_mark()}-{sandbox_id}")
        try:
            plan, limits = await in_thread(self._make_room, spec, sandbox_id, remains)
            child = remains.child = await Child.start(plan, cgroup=remains.cgroup)
            await child.stage_report()
            await child.executed()
        except BaseException as error:
            await asyncio.shield(asyncio.create_task(_release(remains, timeout=STOP_TIMEOUT_S)))
            if isinstance(error, StageFailedError):
                raise SandboxStartError(
                    f"The process could not start: {error.stderr or error}", hint="Check the interpreter."
                ) from error
            raise
        return ProcessInstance(remains, child, limits)

    def _make_room(
        self, spec: SandboxSpec, sandbox_id: SandboxId, remains: Remains
    ) -> tuple[Mapping[str, Any], Mapping[str, LimitStatus]]:
        """Make what is needed; what the stage is to do and which limits hold. Blocks."""
        tree = guest_tree()
        remains.run.mkdir(0o700)
        remains.cgroup, limits = self._cgroups.make(sandbox_id, spec.limits)
        limits["layer"] = LimitStatus(value=spec.limits.layer_bytes, enforced=False, why=NO_LAYER)
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment["PATH"] = f"{Path(spec.python).parent}:{environment.get('PATH', os.defpath)}"
        init = [spec.python, "-I", "-S", str(tree / "init.py")]
        plan = {
            "cgroups": [] if remains.cgroup is None else [str(file) for file in remains.cgroup.entrances],
            "keeper": os.getpid(),
            "session": True,
            "most_processes": None,
            "mounts": None,
            "argv": [
                *(*init, "--run", str(remains.run), "--guest", str(tree), "--python", spec.python),
                *("--umask", f"{spec.files_umask:o}"),
            ],
            "env": {**environment, MARK: remains.mark},
            "inherit": {"control": [], "files": {}},
        }
        return plan, limits


def _no_layers() -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "Files of a sandbox without isolation cannot be saved: they are the host's own",
        hint="Use the bubblewrap backend.",
    )


def _check(spec: SandboxSpec) -> None:
    if not os.access(spec.python, os.X_OK) or not os.path.isabs(spec.python):
        raise InvalidRequestError(
            f"There is no interpreter {spec.python}",
            hint="Give the path that `python -c 'import sys; print(sys.executable)'` prints.",
        )
    if spec.network != "host":
        raise UnsupportedOperationError(
            "Without isolation the network cannot be taken away", hint='Use the bubblewrap backend, or network "host".'
        )
    workspace = spec.workspace
    if workspace is not None and workspace.mode == "cow":
        raise UnsupportedOperationError(
            "Without isolation a folder cannot be given copy-on-write", hint="Use the bubblewrap backend, or mode rw."
        )
    if workspace is not None and workspace.mode != "none" and not os.path.isdir(workspace.path):
        raise InvalidRequestError(
            f"The workspace {workspace.path} is not a directory", hint="Create it, or choose another one."
        )


async def _release(remains: Remains, *, timeout: float) -> None:
    """Kill init and everything that came from it, wherever it went, and remove the group and the run directory.

    Raises:
        OperationTimeoutError: Processes are left.
    """
    child = remains.child
    try:
        async with asyncio.timeout(timeout):
            if child is not None:
                # What it started first: orphans come back to init, whose end would set them free.
                await _kill_around(child.pid, remains.mark)
                await child.kill()
                await _kill_around(child.pid, remains.mark)
            if remains.cgroup is not None:
                await remains.cgroup.remove()
            await asyncio.to_thread(shutil.rmtree, remains.run, ignore_errors=True)
    except TimeoutError:
        raise OperationTimeoutError(
            f"Processes of a sandbox did not end within {timeout:.0f} s",
            hint="They wait for a device or a network file system; they end when it answers.",
            details={"operation": "stop", "timeout": timeout},
        ) from None


async def _kill_around(pid: int, mark: str) -> None:
    """Kill whoever came from init, but not init itself, until nobody is left."""
    # They are not our children, so no event tells when the kernel is done with them.
    while await asyncio.to_thread(_kill_found, pid, mark):  # noqa: ASYNC110
        await asyncio.sleep(0.005)


def _kill_found(pid: int, mark: str) -> bool:
    """Kill them once; False if there was nobody."""
    found = {*descendants(pid), *(one for one, borne in bearing(MARK) if borne == mark)} - {pid}
    for one in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(one, signal.SIGKILL)
    return bool(found)
