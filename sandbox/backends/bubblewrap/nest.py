"""Where a template has a process of its own, whose forks enter sandboxes and are their kernels."""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from warmcell.sandbox.backends.base import SandboxInstance
from warmcell.sandbox.backends.bubblewrap import binary, rootfs
from warmcell.sandbox.backends.bubblewrap.instance import BubblewrapInstance
from warmcell.sandbox.backends.bubblewrap.template_plan import TemplatePlan, plan_template
from warmcell.sandbox.backends.cgroups import Cgroup, Cgroups
from warmcell.sandbox.backends.child import START_TIMEOUT_S, Child, StageFailedError
from warmcell.sandbox.backends.control import Control
from warmcell.sandbox.backends.identity import Identity, choose
from warmcell.sandbox.backends.nursery import STAGE_ENV, START_NEST
from warmcell.sandbox.backends.places import workspace_of
from warmcell.sandbox.backends.processes import children_of, has_ended, only_child
from warmcell.sandbox.backends.threads import in_thread
from warmcell.sandbox.errors import SandboxStartError
from warmcell.sandbox.ids import new_sandbox_id
from warmcell.sandbox.models import GpuDevice, SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import BackendReport, Capabilities

if TYPE_CHECKING:
    from warmcell.sandbox.backends.bubblewrap.driver import BubblewrapBackend

log = logging.getLogger(__name__)

FORK_TIMEOUT_S = 30.0
LATE = 1
"""In a request for a fork: it comes up only when it knows what is asked for."""
REQUEST = struct.Struct("<BII")
"""Flags, a number, and the most processes."""


class Nest:
    """A user and a pid namespace of the keeper's. Makes sandboxes in it, and the process whose forks enter them.

    All that lives in it ends with it, and it ends with the keeper.
    """

    def __init__(
        self,
        backend: "BubblewrapBackend",
        paths: Paths,
        cgroups: Cgroups,
        server: asyncio.subprocess.Process,
        control: Control,
        spaces: Sequence[int],
        first: int,
        identity: Identity,
    ) -> None:
        self._backend = backend
        self._ids = (identity.uid, identity.gid)
        self._paths = paths
        self._cgroups = cgroups
        self._server = server
        self._control = control
        self._spaces = tuple(spaces)
        self._first = first
        """Host pid of its first process, the parent of those whose own has ended."""
        self._process: TemplateProcess | None = None

    @property
    def spaces(self) -> Sequence[int]:
        """Descriptors of its user and its pid namespace."""
        return self._spaces

    @property
    def name(self) -> str:
        """Of the backend whose sandboxes it makes."""
        return self._backend.name

    @property
    def capabilities(self) -> Capabilities:
        """As of that backend, but for the host's network, into which no template's process gets."""
        return replace(self._backend.capabilities, networks=("none",))

    async def probe(self) -> BackendReport:
        """As of that backend."""
        return await self._backend.probe()

    @classmethod
    async def open(cls, backend: "BubblewrapBackend", paths: Paths, cgroups: Cgroups, identity: Identity) -> Self:
        """Make one.

        Args:
            backend: Whose sandboxes are made in it.
            paths: The keeper's.
            cgroups: Those of that backend.
            identity: Who the guests of its sandboxes are.

        Raises:
            StageFailedError: The kernel does not let it be.
            OperationTimeoutError: It said nothing for too long.
        """
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                server = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", "-c", START_NEST, str(theirs.fileno()), str(os.getpid())),
                    *(str(identity.uid), str(identity.gid)),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=dict(STAGE_ENV),
                    cwd="/",
                )
            undo.pop_all()
        ours.setblocking(False)
        control = Control(ours)
        try:
            said = await control.line(START_TIMEOUT_S)
            if said is None or "failed" in said:
                said = said or {}
                raise StageFailedError(said.get("failed", "make a nest"), said.get("errno", 0), "")
        except BaseException:
            control.close()
            with contextlib.suppress(ProcessLookupError):
                server.kill()
            await asyncio.shield(server.wait())
            raise
        return cls(backend, paths, cgroups, server, control, control.take_fds(), said["pid"], identity)

    def fingerprint(self, spec: SandboxSpec) -> str:
        """As of that backend."""
        return self._backend.fingerprint(spec)

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
    ) -> BubblewrapInstance:
        """Bring up a sandbox in it; see the port `SandboxBackend`.

        Beside it, where the guest is somebody else by now: whose the workspace is decides that.
        """
        identity = await in_thread(lambda: choose(workspace_of(spec)))
        return await self._backend.create(
            spec,
            sandbox_id=sandbox_id,
            directory=directory,
            gpus=gpus,
            layer=layer,
            named=named,
            later=later,
            progress=progress,
            nest=self if (identity.uid, identity.gid) == self._ids else None,
        )

    def environment(self, instance: SandboxInstance) -> Mapping[str, str] | None:
        """With what environment that sandbox began; None where it is not in a nest."""
        if isinstance(instance, BubblewrapInstance) and instance.entrance is not None:
            return instance.entrance.env
        return None

    def children(self) -> Sequence[int]:
        """Host pids of living kernels that have come from its template's processes."""
        parents = [self._first] if self._process is None else [self._process.pid, self._first]
        return [child for parent in parents for child in children_of(parent) if not has_ended(child)]

    async def start_template(
        self,
        spec: SandboxSpec,
        *,
        modules: Sequence[str],
        env: Mapping[str, str],
        told: Callable[[Mapping[str, Any]], None],
    ) -> "TemplateProcess":
        """Start the process that imports `modules`; it may end at any time, and another one be started.

        Args:
            spec: Of sandboxes that its forks will enter.
            modules: What it imports, in this order.
            env: What it has in its environment besides what a sandbox begins with.
            told: Gets what it says: `importing`, `imported`, `failed`, `unfit`, `ready`.

        Raises:
            SandboxStartError: It could not be started.
            WarmcellError: What a sandbox of that spec would raise.
        """
        name = new_sandbox_id()
        directory = self._paths.sandboxes / name
        await in_thread(lambda: (directory / rootfs.BASE).mkdir(parents=True, mode=0o700))
        cgroup: Cgroup | None = None
        child: Child | None = None
        try:
            bwrap = await in_thread(binary.find)
            plan = await in_thread(
                lambda: plan_template(
                    spec,
                    modules=tuple(modules),
                    env=env,
                    directory=directory,
                    paths=self._paths,
                    bwrap=bwrap.path,
                )
            )
            cgroup, _ = await in_thread(self._cgroups.make, name, spec.limits)
            child = await Child.start(_stage_plan(plan, cgroup), cgroup=cgroup, nest=self._spaces)
            _, handles = await child.stage_report()
            for handle in handles:
                os.close(handle)
            await child.line()  # {"child-pid": …}, which is another number there.
            pid = await in_thread(only_child, child.pid)
        except BaseException as error:
            await asyncio.shield(_remove(child, cgroup, directory))
            if isinstance(error, StageFailedError | OSError):
                raise SandboxStartError(
                    f"The template's process could not start: {error}", hint="`warmcell doctor` says what is missing."
                ) from error
            raise
        self._process = TemplateProcess(
            child, pid, env=plan.env, told=told, remove=lambda: _remove(child, cgroup, directory)
        )
        return self._process

    async def close(self) -> None:
        """End all that lives in it. Idempotent."""
        if self._process is not None:
            await self._process.close()
        self._control.close()
        with contextlib.suppress(ProcessLookupError):
            self._server.kill()
        await self._server.wait()
        for fd in self._spaces:
            os.close(fd)
        self._spaces = ()


class TemplateProcess:
    """Has imported, or imports, what kernels are to have, and forks them into sandboxes of its nest."""

    def __init__(
        self,
        child: Child,
        pid: int,
        *,
        env: Mapping[str, str],
        told: Callable[[Mapping[str, Any]], None],
        remove: Callable[[], Awaitable[None]],
    ) -> None:
        self.pid = pid
        self.env = env
        """With which it was started."""
        self.exit_code: int | None = None
        self._child = child
        self._told = told
        self._remove = remove
        self._count = 0
        self._forking = asyncio.Lock()
        self._answer: asyncio.Future[Mapping[str, Any]] | None = None
        self._reading = asyncio.create_task(self._read())

    async def fork(self, instance: SandboxInstance, *, late: bool) -> socket.socket:
        """Fork a kernel into a sandbox of the nest; a socket on which it waits for what it is asked to be.

        Args:
            instance: The sandbox.
            late: It begins to come up only then, and not at once.

        Raises:
            SandboxStartError: It could not be forked, or not be confined.
        """
        assert isinstance(instance, BubblewrapInstance)
        entrance = instance.entrance
        if entrance is None:
            raise _cannot("the sandbox is not in its nest")
        async with self._forking:
            self._count += 1
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            with theirs, contextlib.ExitStack() as files:
                try:
                    groups = [os.open(path, os.O_WRONLY | os.O_CLOEXEC) for path in instance.entrances]
                    for fd in groups:
                        files.callback(os.close, fd)
                    self._answer = asyncio.get_running_loop().create_future()
                    request = REQUEST.pack(LATE if late else 0, self._count, entrance.most_processes)
                    self._child.send(request, [entrance.init_fd, theirs.fileno(), *groups])
                    async with asyncio.timeout(FORK_TIMEOUT_S):
                        said = await self._answer
                except TimeoutError:
                    ours.close()
                    await self.close()  # Whatever it says later would be taken for another answer.
                    raise _cannot("it does not answer") from None
                except OSError as error:
                    ours.close()
                    raise _cannot(os.strerror(error.errno or errno.EIO)) from None
                except BaseException:
                    ours.close()
                    raise
                finally:
                    self._answer = None
            if said.get("forked") != self._count:
                ours.close()
                raise _cannot(str(said.get("cannot", "it has ended")))
            return ours

    async def wait(self) -> int:
        """Wait for its end; its exit code."""
        await asyncio.shield(self._reading)
        assert self.exit_code is not None
        return self.exit_code

    @property
    def words(self) -> str:
        """Its last words."""
        return self._child.tail

    async def close(self) -> None:
        """Kill it; kernels that came from it live on. Idempotent."""
        if not self._child.ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, 9)
        await self.wait()

    async def _read(self) -> None:
        code = 1
        try:
            while True:
                said = await self._child.line(timeout_s=None)
                if "forked" in said or "cannot" in said:
                    if self._answer is not None and not self._answer.done():
                        self._answer.set_result(said)
                elif "exit-code" in said:
                    code = int(said["exit-code"])
                else:
                    self._told(said)
        except StageFailedError:
            pass  # It has ended.
        except Exception:
            log.exception("a template's process said what it should not")
        finally:
            self.exit_code = code
            if self._answer is not None and not self._answer.done():
                self._answer.set_result({})
            await self._remove()


def _stage_plan(plan: TemplatePlan, cgroup: Cgroup | None) -> Mapping[str, Any]:
    return {
        "cgroups": [] if cgroup is None else [str(file) for file in cgroup.entrances],
        "keeper": os.getpid(),
        "nest": True,
        "session": False,
        "most_processes": None,
        "mounts": plan.mounts,
        "argv": plan.argv,
        "env": {},
        "inherit": plan.inherit,
    }


async def _remove(child: Child | None, cgroup: Cgroup | None, directory: Path) -> None:
    if child is not None:
        await child.kill()
    if cgroup is not None:
        await cgroup.remove()
    await in_thread(shutil.rmtree, directory, True)


def _cannot(why: str) -> SandboxStartError:
    return SandboxStartError(f"No kernel could be forked from the template's process: {why}", hint="Start it again.")
