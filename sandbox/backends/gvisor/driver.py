"""The `gvisor` backend: runsc, driven directly."""

import asyncio
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends import seccomp
from warmcell.sandbox.backends.cgroups import Cgroups
from warmcell.sandbox.backends.child import Child, StageFailedError
from warmcell.sandbox.backends.fingerprint import fingerprint
from warmcell.sandbox.backends.gvisor import binary, bundle, nvproxy
from warmcell.sandbox.backends.gvisor.bundle import AS_ASKED, READ_ONLY, Prepared, prepare
from warmcell.sandbox.backends.gvisor.instance import (
    IMAGE,
    NAME,
    PID,
    STATE,
    GvisorInstance,
    Remains,
    no_images,
    no_layers,
)
from warmcell.sandbox.backends.gvisor.probe import probe
from warmcell.sandbox.backends.gvisor.root import BASE
from warmcell.sandbox.backends.nursery import STAGE_ENV, Nursery
from warmcell.sandbox.backends.threads import in_thread
from warmcell.sandbox.errors import SandboxStartError, WarmcellError
from warmcell.sandbox.models import GpuDevice, LimitStatus, SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import BackendReport, Capabilities

STOP_TIMEOUT_S = 10.0
_LAYER = "what it changes of its environment is in its memory, which the memory limit alone caps"


class GvisorBackend:
    """Implements `SandboxBackend`."""

    name = "gvisor"

    def __init__(self, *, paths: Paths, hidden: Sequence[Path] = (), nursery: Nursery | None = None) -> None:
        """Configure it.

        Args:
            paths: The keeper's directories; persistent homes are below `state`, and no sandbox sees any of them.
            hidden: Further directories that no sandbox sees, even where a workspace contains them.
            nursery: What forks the processes that become sandboxes. The caller closes it.
        """
        self._paths = paths
        self._hidden = tuple(hidden)
        self._nursery = nursery
        self._cgroups = Cgroups()

    @property
    def capabilities(self) -> Capabilities:
        """The same everywhere where it is ready, but that its report may say why it has no GPUs there."""
        return Capabilities(
            isolated=True,
            gpus=True,
            networks=("none",),
            snapshot_engines=("template", "gvisor"),
            own_kernel=True,
            rootless=False,
        )

    async def probe(self) -> BackendReport:
        """Bring up a small sandbox and take it down again."""
        return await probe(self)

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
    ) -> GvisorInstance:
        """Bring up a sandbox; see the port. It has no layer, and comes with its init in any case."""
        if layer is not None:
            raise no_layers()
        return await self._make(
            spec, sandbox_id=sandbox_id, directory=directory, gpus=gpus, named=named, progress=progress
        )

    async def stand_by(
        self,
        spec: SandboxSpec,
        *,
        sandbox_id: SandboxId,
        directory: Path,
        gpus: Sequence[GpuDevice] = (),
        named: SandboxId | None = None,
        progress: Callable[[str], None] = lambda detail: None,
        beside: bool = False,
    ) -> GvisorInstance:
        """Make a sandbox that waits to go on from an image: nothing runs in it. Which one, `go_on` is told.

        Args:
            spec: As in the port, like all the rest but the last.
            sandbox_id: Its name.
            directory: For it alone.
            gpus: Its devices.
            named: Whose name it has as a host.
            progress: Told what is being done.
            beside: The saved one's folder was not copy-on-write, and this one's is. What it changes there, no image
                has.
        """
        return await self._make(
            spec,
            sandbox_id=sandbox_id,
            directory=directory,
            gpus=gpus,
            named=named,
            progress=progress,
            beside=beside,
            restores=True,
        )

    async def _make(
        self,
        spec: SandboxSpec,
        *,
        sandbox_id: SandboxId,
        directory: Path,
        gpus: Sequence[GpuDevice],
        named: SandboxId | None,
        progress: Callable[[str], None],
        beside: bool = False,
        restores: bool = False,
    ) -> GvisorInstance:
        progress("looking at the Python environment")
        runsc = await in_thread(nvproxy.serving, await in_thread(binary.find), gpus)
        if restores and runsc.driver:
            raise no_images()
        prepared = await in_thread(
            prepare,
            spec,
            sandbox_id=sandbox_id,
            directory=directory,
            gpus=gpus,
            paths=self._paths,
            hidden=self._hidden,
            named=named,
            beside=beside,
        )
        progress("starting gVisor")
        remains = Remains(directory)
        try:
            made = await self._start(spec, sandbox_id, prepared, remains, runsc, restores=restores)
            made.unsaved = beside
            if not restores:
                await made.come_up()
        except BaseException as error:
            await asyncio.shield(asyncio.create_task(remains.release(timeout=STOP_TIMEOUT_S)))
            if isinstance(error, StageFailedError):
                raise _explain(error) from error
            raise
        return made

    def _make_room(
        self, spec: SandboxSpec, sandbox_id: SandboxId, remains: Remains, prepared: Prepared
    ) -> dict[str, LimitStatus]:
        for name in (BASE, STATE):
            (remains.directory / name).mkdir(0o700)
        bundle.write(prepared, remains.directory)
        os.mkfifo(remains.directory / PID, 0o600)
        # Not its processes: those of the sandbox are not the host's, and the host's are threads of gVisor's.
        remains.cgroup, limits = self._cgroups.make(sandbox_id, replace(spec.limits, pids=None))
        limits["pids"] = LimitStatus(value=spec.limits.pids, enforced=True)
        limits["layer"] = LimitStatus(value=spec.limits.layer_bytes, enforced=False, why=_LAYER)
        return limits

    async def _start(
        self,
        spec: SandboxSpec,
        sandbox_id: SandboxId,
        prepared: Prepared,
        remains: Remains,
        runsc: binary.Runsc,
        *,
        restores: bool,
    ) -> GvisorInstance:
        limits = await in_thread(self._make_room, spec, sandbox_id, remains, prepared)
        directory = remains.directory
        begin = ["restore", f"--image-path={directory / IMAGE}"] if restores else ["run"]
        argv = runsc.argv(directory / STATE, *begin, f"--pid-file={directory / PID}")
        plan = _stage_plan(prepared, remains, [*argv, *_bundle_words(prepared, directory), NAME])
        child = remains.child = await Child.start(plan, cgroup=remains.cgroup, nursery=self._nursery)
        report, (remains.run_fd, remains.base_fd) = await child.stage_report()
        await child.executed()
        run = directory / "run"
        await in_thread(run.symlink_to, f"/proc/{os.getpid()}/fd/{remains.run_fd}")
        return GvisorInstance(
            remains,
            runsc=runsc,
            shape=shape_of(spec),
            child=child,
            run_directory=run,
            limits=limits,
            workspace_note=_workspace_note(spec, prepared, report),
        )


def shape_of(spec: SandboxSpec) -> str:
    """Names what must be equal where an image goes on: the same mounts at the same places, with the same caps."""
    parts = (spec.python, spec.workspace, spec.mounts, spec.home, spec.limits, *([spec.user] if spec.user else []))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _bundle_words(prepared: Prepared, directory: Path) -> list[Any]:
    asked = f"--bundle={directory / AS_ASKED}"
    if prepared.workspace is None:
        return [asked]
    return [{"tree": prepared.workspace, "ok": [asked], "else": [f"--bundle={directory / READ_ONLY}"]}]


def _stage_plan(prepared: Prepared, remains: Remains, argv: Sequence[Any]) -> Mapping[str, Any]:
    return {
        "cgroups": [] if remains.cgroup is None else [str(file) for file in remains.cgroup.entrances],
        "keeper": os.getpid(),
        "session": False,
        "most_processes": None,
        "mounts": prepared.mounts,
        "argv": argv,
        # Each of its five programs would register for it as it begins, and wait 10 ms for all processors to take note.
        "filter": seccomp.absent("membarrier"),
        "env": dict(STAGE_ENV),
        "inherit": {"control": [], "files": {}},
    }


def _explain(failure: StageFailedError) -> WarmcellError:
    return SandboxStartError(
        f"The sandbox could not start: {binary.first_line(failure.stderr) or failure}",
        hint="`warmcell doctor` says what this machine lacks.",
        details={"step": str(failure), "stderr": failure.stderr[-1000:]},
    )


def _workspace_note(spec: SandboxSpec, prepared: Prepared, report: Mapping[str, str]) -> str:
    why = report.get(prepared.workspace or "", "")
    if not why or spec.workspace is None:
        return ""
    return (
        f"read-only, since its files belong to somebody who is not let into a sandbox, and cannot be shown as the"
        f" guest's ({why}). Give the folder to an ordinary user: chown -R USER {spec.workspace.path}"
    )
