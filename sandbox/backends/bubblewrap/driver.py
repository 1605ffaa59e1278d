"""The `bubblewrap` backend: namespaces, a private root, no capabilities, a system call filter. No daemon, no root."""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.bubblewrap import binary, diagnose, helped, rootfs, template_plan
from warmcell.sandbox.backends.bubblewrap.instance import BubblewrapInstance, Entrance, Remains
from warmcell.sandbox.backends.bubblewrap.nest import Nest
from warmcell.sandbox.backends.bubblewrap.plan import STATUS_FD, UP_FD, Prepared, prepare
from warmcell.sandbox.backends.bubblewrap.probe import probe
from warmcell.sandbox.backends.cgroups import Cgroups
from warmcell.sandbox.backends.child import START_TIMEOUT_S, Child, StageFailedError
from warmcell.sandbox.backends.fingerprint import fingerprint
from warmcell.sandbox.backends.identity import choose
from warmcell.sandbox.backends.nursery import Nursery
from warmcell.sandbox.backends.places import workspace_of
from warmcell.sandbox.backends.processes import only_child
from warmcell.sandbox.backends.threads import in_thread
from warmcell.sandbox.errors import UnsupportedOperationError, WarmcellError
from warmcell.sandbox.models import MIB, GpuDevice, LimitStatus, SandboxId, SandboxSpec
from warmcell.sandbox.paths import FULL, Paths, no_room, private_directory
from warmcell.sandbox.reports import BackendReport, Capabilities

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
RUN_LINK = "run"
"""In a sandbox's directory: leads to its run directory, by a descriptor of the keeper's."""
SLOWEST_BYTES_S = 20 * MIB
"""Saved files are copied at least that fast, or a start is given up."""
_LAYER_ON_DISK = "it is on disk: memory file systems of this kernel cannot hold it, those of Linux 6.6 or newer can"
_NO_LAYER = "packages cannot be installed: the environment is read-only, since this kernel refuses an overlay ({})"


class BubblewrapBackend:
    """Implements `SandboxBackend`."""

    name = "bubblewrap"

    def __init__(
        self,
        *,
        paths: Paths,
        hidden: Sequence[Path] = (),
        helper: helped.Connect | None = None,
        nursery: Nursery | None = None,
    ) -> None:
        """Configure it.

        Args:
            paths: The keeper's directories; persistent homes are below `state`, and no sandbox sees any of them.
            hidden: Further directories that no sandbox sees, even where a workspace contains them.
            helper: How to reach the system's helper, which makes an ordinary user's sandboxes where it can.
            nursery: What forks the processes that become sandboxes. The caller closes it.
        """
        self._nursery = nursery
        self._helper = helper if os.getuid() != 0 else None
        self._paths = paths
        self._hidden = tuple(hidden)
        self._cgroups = Cgroups()

    @property
    def capabilities(self) -> Capabilities:
        """The same everywhere where it is ready."""
        return Capabilities(
            isolated=True,
            gpus=True,
            networks=("none", "host"),
            snapshot_engines=("template", "criu"),
            layers=True,
        )

    async def probe(self) -> BackendReport:
        """Bring up a small sandbox and take it down again."""
        return await probe(self, self._cgroups)

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
        nest: Nest | None = None,
    ) -> BubblewrapInstance:
        """Bring up a sandbox; see the port.

        Args:
            spec: As in the port, like all the rest but the last.
            sandbox_id: Its name.
            directory: For it alone.
            gpus: Its devices.
            layer: What it begins with.
            named: Whose name it has as a host.
            later: Its init waits until somebody needs it.
            progress: Told what is being done.
            nest: Where it is made, so that kernels of that nest's template can enter it.
        """
        progress("looking at the Python environment")
        remains = Remains(directory)
        prepared = await in_thread(
            lambda: prepare(
                spec,
                sandbox_id=sandbox_id,
                directory=directory,
                gpus=gpus,
                paths=self._paths,
                hidden=self._hidden,
                bwrap=binary.find().path,
                layer=layer,
                named=named,
                later=later,
                nested=nest is not None,
            )
        )
        remains.layer = prepared.disk
        progress("starting bubblewrap")
        try:
            if layer is not None:
                remains.layer_fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if self._helper is not None and nest is None:
                try:
                    return await self._have_started(self._helper, spec, sandbox_id, prepared, remains)
                except UnsupportedOperationError as error:
                    log.info("sandbox %s is made without the helper: %s", sandbox_id, error.message)
            return await self._start(spec, sandbox_id, prepared, remains, nest)
        except BaseException as error:
            await asyncio.shield(asyncio.create_task(remains.release(timeout=STOP_TIMEOUT_S)))
            if isinstance(error, StageFailedError):
                raise diagnose.explain(error, as_root=os.getuid() == 0) from error
            if isinstance(error, OSError) and error.errno in FULL:
                raise no_room(directory.parent) from error
            raise

    async def may_share(self, spec: SandboxSpec) -> bool:
        """Whether kernels of sandboxes of that spec may come from one process: only then they may be in a nest."""
        why = await in_thread(template_plan.why_not, spec)
        if why:
            log.info("a sandbox of template %s shares no process: %s", spec.template, why)
        return not why

    async def nest(self, spec: SandboxSpec) -> Nest | None:
        """A nest for sandboxes of that spec, or None where there cannot be one now."""
        try:
            identity = await in_thread(lambda: choose(workspace_of(spec)))
            return await Nest.open(self, self._paths, self._cgroups, identity)
        except (StageFailedError, OSError, WarmcellError) as error:
            log.info("template %s has no process of its own: %s", spec.template, error)
            return None

    def _make_room(self, spec: SandboxSpec, sandbox_id: SandboxId, remains: Remains) -> dict[str, LimitStatus]:
        (remains.directory / rootfs.BASE).mkdir(0o700)
        if remains.layer is not None:
            private_directory(private_directory(self._paths.layers) / sandbox_id)
        remains.cgroup, limits = self._cgroups.make(sandbox_id, spec.limits)
        return limits

    async def _start(
        self, spec: SandboxSpec, sandbox_id: SandboxId, prepared: Prepared, remains: Remains, nest: Nest | None
    ) -> BubblewrapInstance:
        limits = await in_thread(self._make_room, spec, sandbox_id, remains)
        most = _most_processes(spec, limits["pids"], own_users=os.getuid() != 0 or nest is not None)
        if most is not None:
            limits["pids"] = LimitStatus(value=most, enforced=True)
        plan = {
            **_stage_plan(prepared, remains, most_processes=most),
            "nest": nest is not None,
            "alone": (os.getuid(), os.getgid()) if nest is None else None,
        }
        child = remains.child = await Child.start(
            plan, cgroup=remains.cgroup, nursery=self._nursery, nest=() if nest is None else nest.spaces
        )
        report, (remains.run_fd, remains.base_fd) = await child.stage_report(
            timeout_s=START_TIMEOUT_S + prepared.filled_bytes / SLOWEST_BYTES_S
        )
        await child.line()  # {"child-pid": …}, which is another number here.
        try:
            pid = await in_thread(_found, child.pid, remains)
        except ProcessLookupError:
            raise StageFailedError(f"it ended with exit code {await child.wait()}", 0, child.tail) from None
        await child.line()  # {"up": true}
        made = _instance(spec, prepared, remains, child=child, pid=pid, limits=limits, report=report)
        if nest is not None:
            made.entrance = Entrance(env=prepared.env, init_fd=remains.init_fd, most_processes=most or 0)
            made.entrance.visitors = nest.children
        return made

    async def _have_started(
        self, helper: helped.Connect, spec: SandboxSpec, sandbox_id: SandboxId, prepared: Prepared, remains: Remains
    ) -> BubblewrapInstance:
        """Let the helper make it.

        Raises:
            UnsupportedOperationError: It makes no such sandbox.
        """
        child, fds, limits, report = await helped.start(helper, prepared, spec, sandbox_id)
        remains.child = child
        remains.run_fd, remains.base_fd = fds
        await in_thread(_show_run, remains)
        return _instance(spec, prepared, remains, child=child, pid=child.first, limits=limits, report=report)


def _found(child: int, remains: Remains) -> int:
    """Host pid of the sandbox's first process; raises ProcessLookupError."""
    pid = only_child(child)
    remains.init_fd = os.pidfd_open(pid)
    _show_run(remains)
    return pid


def _show_run(remains: Remains) -> None:
    os.symlink(f"/proc/{os.getpid()}/fd/{remains.run_fd}", remains.directory / RUN_LINK)


def _instance(
    spec: SandboxSpec,
    prepared: Prepared,
    remains: Remains,
    *,
    child: Child | helped.HelperChild,
    pid: int,
    limits: Mapping[str, LimitStatus],
    report: Mapping[str, str],
) -> BubblewrapInstance:
    layer_why = _why_no_layer(prepared, report)
    layer = LimitStatus(value=spec.limits.layer_bytes, enforced=not layer_why, why=layer_why)
    return BubblewrapInstance(
        remains,
        child=child,
        pid=pid,
        run_directory=remains.directory / RUN_LINK,
        limits={**limits, "layer": layer},
        workspace_note=_workspace_note(spec, report),
        parts=prepared.parts,
        waits=bool(prepared.view.pipes),
        shown=prepared.view.nodes,
    )


def _most_processes(spec: SandboxSpec, status: LimitStatus, *, own_users: bool) -> int | None:
    """RLIMIT_NPROC, where it has to stand in for a control group and can.

    Since Linux 5.14 it counts per user namespace, of which a sandbox has its own unless root made it outside of nests.
    """
    return spec.limits.pids if not status.enforced and own_users else None


def _stage_plan(prepared: Prepared, remains: Remains, *, most_processes: int | None) -> Mapping[str, Any]:
    return {
        "cgroups": [] if remains.cgroup is None else [str(file) for file in remains.cgroup.entrances],
        "keeper": os.getpid(),
        "session": False,
        "most_processes": most_processes,
        "mounts": prepared.mounts,
        "argv": prepared.argv,
        "env": {},
        "inherit": {
            "control": [STATUS_FD, UP_FD],
            "files": {str(number): content for number, content in prepared.files.items()},
        },
    }


def _why_no_layer(prepared: Prepared, report: Mapping[str, str]) -> str:
    if report.get("layer"):
        return _NO_LAYER.format(report["layer"])
    return _LAYER_ON_DISK if prepared.disk is not None else ""


def _workspace_note(spec: SandboxSpec, report: Mapping[str, str]) -> str:
    if report.get("changes"):
        return f"read-only, since this kernel refuses an overlay on it ({report['changes']}). Choose mode rw or ro."
    why = report.get("workspace", "")
    if not why or spec.workspace is None or spec.workspace.mode not in ("rw", "cow"):
        return ""
    return (
        f"read-only, since its files belong to root, who is not let into a sandbox, and cannot be shown as the guest's"
        f" ({why}). Give the folder to an ordinary user: chown -R USER {spec.workspace.path}"
    )
