"""One sandbox with its kernels: how they start, are signalled, and end."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from warmcell.sandbox import errors, guest_files
from warmcell.sandbox.background import Background
from warmcell.sandbox.box import GUEST_TIMEOUT_S, Box, within
from warmcell.sandbox.channel import KernelStarted
from warmcell.sandbox.following import follow
from warmcell.sandbox.kernel import KernelProcess
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxInfo, SandboxSpec, TemplateStatus
from warmcell.sandbox.shared_templates import SharedTemplate, ask
from warmcell.sandbox.told import plausible

KERNEL_TIMEOUT_S = 60.0
"""Until a kernel has bound its sockets. A cold one on a busy machine takes seconds."""

EARLY_EXITS_MAX = 100

ENDED_MEANWHILE = "its sandbox ended while the kernel started"

log = logging.getLogger(__name__)


class LiveSandbox(Box):
    """A sandbox and the tasks that watch it. `SandboxService` owns it; nobody else changes it."""

    def __init__(
        self,
        info: SandboxInfo,
        spec: SandboxSpec,
        directory: Path,
        on_change: Callable[["LiveSandbox"], None],
    ) -> None:
        super().__init__(info, spec, directory, on_change)
        self._early_exits: dict[int, int] = {}
        """Kernels that ended while `start_kernel` still waits for the answer that names its own."""
        self._starting = False
        self._attempts = 0
        self.shared: SharedTemplate | None = None
        """The template in whose nest it is made, if its kernels come from a process that several sandboxes share."""
        self._ahead: socket.socket | None = None
        """Where a kernel that has come up ahead waits to be asked for."""
        self.is_missed = False
        """Its kernels have left something that a prepared sandbox lacks, so that none takes its place."""
        self._coming_up = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        """Follows a kernel that nobody in it looks after yet."""
        self.beside: dict[int, KernelProcess] = {}
        """Further kernels in it, by pid: ranks of a fan-out above the first."""
        self._starts_beside = 0
        self._beside_starting = 0
        self.imports = False
        """Whether its own kernels' template was begun; what is told of one may be of another sandbox's."""
        self.stays = False
        """It outlives the sandbox from which it was made: a clone that a Jupyter server has."""

    @property
    def prepared(self) -> bool:
        """Whether the next kernel in it is there in an instant."""
        if self.info.state is not State.RUNNING:
            return False
        waiting = self.kernel is not None and self.kernel.alive and bool(self.kernel.token)
        return waiting or (self.info.template is not None and self.info.template.state == "ready")

    @property
    def has_ahead(self) -> bool:
        """Whether a kernel has come up ahead in it, and waits to be asked for."""
        return self._ahead is not None

    @property
    def has_fork_server(self) -> bool:
        """Whether its kernels are forks of a process in it that has imported."""
        return (
            self.shared is None
            and self.imports
            and self.info.template is not None
            and self.info.template.state == "ready"
        )

    async def take_on(self, kernel: KernelProcess, *, host_pid: int = 0) -> None:
        """A kernel was restored in it: follow it as one that was started here.

        Args:
            kernel: Which.
            host_pid: As the host sees it, by which it is followed as long as the guest's init waits.

        Raises:
            TransportError: The guest is gone.
        """
        channel = self._reached()
        await channel.adopt(kernel.pid)
        self.kernel = kernel
        if host_pid and not channel.came.is_set():
            self._following = asyncio.create_task(follow(kernel, host_pid, until=channel.came))

    async def background(self) -> Background:
        """What runs in it besides kernels.

        Raises:
            ConflictError: It is not up.
            TransportError: The guest is gone.
        """
        return await self._reached().background()

    async def end_process(self, pid: int) -> None:
        """Kill a kernel that has come with it, and is not wanted. Nothing happens when it is gone."""
        with contextlib.suppress(errors.NotFoundError):
            await self._reached().signal(pid, signal.SIGKILL, group=True)

    async def give_way(self, other: "LiveSandbox") -> bool:
        """Exchange what is behind this one with `other`, which has a kernel already, if the next kernel misses nothing
        there; whether it was done. `other` is then what is to be removed.
        """
        async with self._coming_up:
            exchanged = False
            try:
                for box in (self, other):
                    await box.unwatch()
                channel = self._reached()
                asked = channel.asked
                same = (
                    channel.idle
                    and not self.beside
                    and await self.instance.can_be_replaced_by(other.instance, fork_server=self.has_fork_server)
                )
                if same and channel.asked == asked and not (self._starting or self._beside_starting or self.beside):
                    await self.become(other)  # Without a wait, so nobody has asked anything of it since.
                    self.named, other.named = other.named, self.named
                    self._ahead, other._ahead = other._ahead, self._ahead
                    exchanged = True
            finally:
                if not exchanged:
                    self.watch()
            return exchanged

    async def prepare(self) -> None:
        """Start the imports, here or in a process that is shared; `template_settled` and the template's status tell."""
        if not self.spec.preload:
            self.template_settled.set()
            return
        self.imports = True
        self.template_settled.clear()
        self.tell(template=TemplateStatus(name=self.spec.template, state="importing", since=time.time()))
        if self.shared is not None and await self.shared.prepare():
            return
        try:
            await self._guest().prepare(self.spec.preload, name=self.spec.template, env=self.spec.env)
        except BaseException:
            self.tell(template=TemplateStatus(name=self.spec.template, state="failed"))
            self.template_settled.set()
            raise

    async def wait_template(self) -> None:
        """Wait until its template is neither being started nor importing, or the sandbox has ended."""
        while not self.template_settled.is_set():
            await self.template_settled.wait()

    async def start_kernel(self, *, env: Mapping[str, str], cwd: str) -> KernelProcess:
        """Start the next kernel, from the template where it is ready; returns once its sockets are bound.

        Raises:
            ConflictError: One runs already.
            SandboxStartError: The sandbox ended meanwhile, or the kernel before it had bound its sockets.
        """
        if self._busy():
            raise errors.ConflictError(f"Sandbox {self.info.id} has a kernel", hint="End it first.")
        self._starting = True
        self._forget_early_exits()
        self._remove_kernel_files()
        self._attempts += 1
        template = self.info.template
        if template is not None and template.state == "importing":
            self.phase("kernel", f"importing {template.importing}")
        else:
            self.phase("kernel")
        try:
            return await self._start_kernel(f"k{self._attempts}", env=env, cwd=cwd)
        except BaseException:
            self.tell(phase=None)
            raise
        finally:
            self._starting = False
            self._forget_early_exits()

    def _forget_early_exits(self) -> None:
        if not self._beside_starting:
            self._early_exits.clear()

    async def _start_kernel(self, prefix: str, *, env: Mapping[str, str], cwd: str) -> KernelProcess:
        began = time.perf_counter()
        started = await self._started(prefix, env=env, cwd=cwd)
        kernel = KernelProcess(
            pid=started.pid,
            generation=self.info.generation + 1,
            socket_prefix=self.run_directory / started.sockets,
            started_from=started.started_from,
        )
        self.kernel = kernel
        before = {} if self.info.generation else self.info.phases_ms
        fresh = {"exit_code": None, "started_from": None, "started_ms": None, "not_saved": ()}
        self.tell(generation=kernel.generation, phases_ms=before, **fresh)
        self.took(start=1000 * (time.perf_counter() - began))
        early = self._early_exits.get(kernel.pid)
        if early is not None:
            self._kernel_exited(early)
        return kernel

    async def start_beside(self, *, env: Mapping[str, str], cwd: str) -> KernelProcess:
        """Start one more kernel, which shares the sandbox with the others; returns once its sockets are bound.

        Raises:
            SandboxStartError: The sandbox ended meanwhile, or the kernel before it had bound its sockets.
        """
        self._starts_beside += 1
        self._beside_starting += 1
        try:
            started = await self._started(f"r{self._starts_beside}", env=env, cwd=cwd)
            kernel = KernelProcess(
                pid=started.pid,
                generation=self._starts_beside,
                socket_prefix=self.run_directory / started.sockets,
                started_from=started.started_from,
            )
            self.beside[kernel.pid] = kernel
            early = self._early_exits.pop(kernel.pid, None)
            if early is not None:
                self._beside_exited(kernel, early)
            return kernel
        finally:
            self._beside_starting -= 1

    async def _started(self, prefix: str, *, env: Mapping[str, str], cwd: str) -> KernelStarted:
        """A kernel whose sockets are bound, from a shared process, the guest's template, or cold."""
        guest = self._guest()
        connection = {
            "transport": "ipc",
            "ip": f"{self.guest_run_directory}/{prefix}",
            **{f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)},
            "key": "",
            "signature_scheme": "hmac-sha256",
        }
        with guest_files.create(self.run_directory / f"{prefix}.json") as opened:
            opened.write(json.dumps(connection).encode())
        file = f"{self.guest_run_directory}/{prefix}.json"
        started = await self._from_shared(file, env=env, cwd=cwd)
        if started is None:
            started = await self._unless_dead(
                guest.start_kernel(file, env=env, cwd=cwd, timeout=KERNEL_TIMEOUT_S), ENDED_MEANWHILE
            )
        self._guest()  # it may have been stopped in this very moment
        return started

    def _beside_exited(self, kernel: KernelProcess, code: int) -> None:
        del self.beside[kernel.pid]
        kernel.exit_code = code
        kernel.exited.set()

    def _all_exited(self, code: int) -> None:
        super()._all_exited(code)
        for kernel in list(self.beside.values()):
            self._beside_exited(kernel, code)

    async def come_up(self, *, beside: KernelProcess | None = None) -> None:
        """Have the next kernel come up ahead, where it comes from a shared process and none lives.

        Args:
            beside: Unless it is this one, which is about to end.
        """
        async with self._coming_up:
            if self.shared is None or self._ahead is not None or not self.up:
                return
            if self._busy() and (self._starting or self.kernel is not beside):
                return
            try:
                self._ahead = await self.shared.fork(self.instance)
            except (errors.WarmcellError, OSError) as error:
                log.info("sandbox %s: no kernel comes up ahead: %s", self.info.id, error)

    async def _from_shared(self, file: str, *, env: Mapping[str, str], cwd: str) -> KernelStarted | None:
        """A kernel from a shared process, one that has come up ahead if there is one; None where it must be another."""
        async with self._coming_up:
            ahead, self._ahead = self._ahead, None
        try:
            begun = None if self.shared is None else self.shared.nest.environment(self.instance)
            if self.shared is None or begun is None:
                return None
            wanted = {**begun, **env}
            request = {"kernel": 0, "connection": file, "env": wanted, "cwd": cwd or wanted["HOME"]}
            if self.shared.why_not(wanted):
                return None
            if ahead is not None and self.shared.suits(wanted):
                with contextlib.suppress(errors.SandboxStartError):
                    return await self._ask(ahead, request)
            return await self._ask(await self.shared.fork(self.instance, late=True), request)
        except (errors.WarmcellError, TimeoutError) as error:
            self._guest()  # If the sandbox has ended, that is why.
            log.warning("sandbox %s: no kernel from the template's process: %s", self.info.id, error)
            return None
        finally:
            if ahead is not None:
                ahead.close()

    async def _ask(self, waiting: socket.socket, request: Mapping[str, Any]) -> KernelStarted:
        started = await self._unless_dead(ask(waiting, request, timeout_s=KERNEL_TIMEOUT_S), ENDED_MEANWHILE)
        await self._guest().adopt(started.pid)
        return started

    def _busy(self) -> bool:
        return self._starting or (self.kernel is not None and self.kernel.alive)

    async def fall(self) -> None:
        """As of any sandbox; what waits in it goes, and nothing keeps its template."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
            self._following = None
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        await super().fall()
        if self.shared is not None:
            self.shared.leave(self)

    def _remove_kernel_files(self) -> None:
        """What the kernel before, or one that failed to start, has left; what else the guest puts there is its own."""
        asked = self.run_directory / f"k{self._attempts}"
        prefixes = {asked, asked if self.kernel is None else self.kernel.socket_prefix}
        for name in (f"{asked}.json", *(f"{prefix}-{n}" for prefix in prefixes for n in range(1, 7))):
            with contextlib.suppress(OSError):
                os.unlink(name)

    def remove_sockets(self, prefix: str) -> None:
        """Make way for a kernel that binds these names."""
        for n in range(1, 6):
            with contextlib.suppress(OSError):
                os.unlink(self.run_directory / f"{prefix}-{n}")

    async def signal_kernel(self, signum: int) -> None:
        """Send a signal to the kernel's process group; nothing happens when it is gone."""
        if self.kernel is not None:
            await self.signal_process(self.kernel, signum)

    async def signal_process(self, kernel: KernelProcess, signum: int) -> None:
        """The same for any kernel in it."""
        if kernel.alive and self._channel is not None:
            try:
                await self._channel.signal(kernel.pid, signum, group=True)
            except errors.NotFoundError:
                pass  # it has ended; the event that says so is on its way
            except errors.WarmcellError:
                if self.info.state is State.RUNNING and not kernel.exited.is_set():
                    raise

    async def end_kernel(self, *, grace: float) -> int | None:
        """Give the kernel `grace` seconds to leave by itself, then kill it; its exit code, None if there was none."""
        kernel = self.kernel
        if kernel is None:
            return None
        if self._channel is None:  # It is suspended: there is nobody who could leave.
            self._kernel_exited(128 + signal.SIGKILL)
        if kernel.alive and grace > 0:
            await within(kernel.exited.wait(), grace)
        if kernel.alive:
            await self.signal_kernel(signal.SIGKILL)
            if not await within(kernel.exited.wait(), GUEST_TIMEOUT_S):
                raise errors.OperationTimeoutError(
                    f"The kernel of {self.info.id} did not end", hint=f"Stop it: DELETE /sandboxes/{self.info.id}."
                )
        return kernel.exit_code

    def _event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "template":
            self._template_event(event)
        elif event["event"] == "kernel" and event["state"] == "exited":
            if self.kernel is not None and self.kernel.pid == event["pid"]:
                self._kernel_exited(event["exit_code"])
            elif event["pid"] in self.beside:
                self._beside_exited(self.beside[event["pid"]], event["exit_code"])
            elif (self._starting or self._beside_starting) and len(self._early_exits) < EARLY_EXITS_MAX:
                self._early_exits[event["pid"]] = event["exit_code"]

    def _template_event(self, event: Mapping[str, Any]) -> None:
        said = TemplateStatus.from_json({key: value for key, value in event.items() if key != "event"})
        self.template_told(said)

    def template_told(self, said: TemplateStatus) -> None:
        """This is said of its template now."""
        status = plausible(said, self.spec.preload)
        if status.state in ("ready", "failed"):
            self.template_settled.set()
        if status.state == "importing":  # also again, without the module that has killed it
            self.template_settled.clear()
        if status.state == "none":  # It has no fork server; its kernels may come from a snapshot.
            return
        if status != self.info.template:
            self.tell(template=status)
