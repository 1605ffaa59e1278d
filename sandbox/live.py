"""One sandbox that is up or coming up: the backend's instance, the guest's channel, and what is told of it."""

import asyncio
import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from warmcell.sandbox import errors, guest_files
from warmcell.sandbox.backends.base import SandboxBackend, SandboxInstance
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.lifecycle import TERMINAL, Event, State, transition
from warmcell.sandbox.models import (
    ErrorInfo,
    ExecResult,
    GpuDevice,
    Phase,
    SandboxInfo,
    SandboxSpec,
    StartedFrom,
    TemplateStatus,
)

log = logging.getLogger(__name__)

GUEST_TIMEOUT_S = 15.0
"""From the start of the process tree until the guest's init answers. It takes some 20 ms."""

KERNEL_TIMEOUT_S = 60.0
"""Until a kernel has bound its sockets. A cold one on a busy machine takes seconds."""

Result = TypeVar("Result")


@dataclass
class KernelProcess:
    """One kernel of a sandbox: generation n is the n-th."""

    pid: int
    generation: int
    socket_prefix: Path
    """Host path; its sockets are `{prefix}-1` (shell) to `{prefix}-5` (heartbeat)."""
    started_from: StartedFrom
    exit_code: int | None = None
    exited: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def alive(self) -> bool:
        return not self.exited.is_set()


class LiveSandbox:
    """A sandbox and the tasks that watch it. `SandboxService` owns it; nobody else changes it."""

    def __init__(
        self,
        info: SandboxInfo,
        spec: SandboxSpec,
        directory: Path,
        on_change: Callable[["LiveSandbox"], None],
    ) -> None:
        self.info = info
        self.spec = spec
        self.directory = directory
        self.gpus: tuple[GpuDevice, ...] = ()
        self.kernel: KernelProcess | None = None
        self.template_settled = asyncio.Event()
        """Set while the fork server is neither starting nor importing."""
        self.ended = asyncio.Event()
        self._on_change = on_change
        self._instance: SandboxInstance | None = None
        self._channel: GuestChannel | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._early_exits: dict[int, int] = {}
        self._starting = False

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for sandboxes that can stand in for each other."""
        return self.spec.shape(self.gpus)

    @property
    def run_directory(self) -> Path:
        return self._up().run_directory

    @property
    def guest_run_directory(self) -> str:
        return self._up().guest_run_directory

    @property
    def processes(self) -> Sequence[int]:
        """Host pids of everything in it; empty when it is not up."""
        return self._instance.processes() if self._instance is not None else ()

    def tell(self, **changes: Any) -> None:
        """Change what is told about it, and tell it."""
        self.info = dataclasses.replace(self.info, **changes)
        self._on_change(self)

    def phase(self, name: str, detail: str = "", hint: str = "") -> None:
        """Say what the start is busy with; the clock restarts with each new name."""
        now = self.info.phase
        since = now.since if now is not None and now.name == name else time.time()
        self.tell(phase=Phase(name=name, since=since, detail=detail, hint=hint))

    async def bring_up(self, backend: SandboxBackend, gpus: Sequence[GpuDevice]) -> None:
        """Create it and wait for its guest.

        Raises:
            WarmcellError: What the backend raises, or `SandboxStartError` where the guest does not answer.
        """
        self.gpus = tuple(gpus)
        self.phase("sandbox")
        instance = await backend.create(
            self.spec,
            sandbox_id=self.info.id,
            directory=self.directory,
            gpus=self.gpus,
            progress=lambda detail: self.phase("sandbox", detail),
        )
        self._instance = instance
        self.phase("guest")
        self._channel = await self._unless_dead(
            GuestChannel.open(instance.run_directory, timeout=GUEST_TIMEOUT_S), "its first process ended"
        )
        self._watchers = [asyncio.create_task(self._watch_guest()), asyncio.create_task(self._watch_instance())]
        self.tell(
            state=transition(self.info.state, Event.CREATED),
            limits=dict(instance.limits),
            workspace_note=instance.workspace_note,
            gpus=self.gpus,
            phase=None,
        )

    async def prepare(self) -> None:
        """Start the fork server and its imports; `template_settled` and the template's status tell the rest."""
        if not self.spec.preload:
            self.template_settled.set()
            return
        self.template_settled.clear()
        self.tell(template=TemplateStatus(name=self.spec.template, state="importing", since=time.time()))
        await self._guest().prepare(self.spec.preload, name=self.spec.template, env=self.spec.env)

    async def start_kernel(self, *, env: Mapping[str, str], cwd: str) -> KernelProcess:
        """Start the next kernel, from the template where it is ready; returns once its sockets are bound.

        Raises:
            ConflictError: One runs already.
            SandboxDiedError: It ended before it had bound its sockets.
        """
        if self._starting or (self.kernel is not None and self.kernel.alive):
            raise errors.ConflictError(f"Sandbox {self.info.id} has a kernel", hint="End it first.")
        self._starting = True
        try:
            generation = self.info.generation + 1
            prefix = f"k{generation}"
            connection = {
                "transport": "ipc",
                "ip": f"{self.guest_run_directory}/{prefix}",
                **{f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)},
                "key": "",
                "signature_scheme": "hmac-sha256",
            }
            with guest_files.create(self.run_directory / f"{prefix}.json") as file:
                file.write(json.dumps(connection).encode())
            started = await self._unless_dead(
                self._guest().start_kernel(
                    f"{self.guest_run_directory}/{prefix}.json", env=env, cwd=cwd, timeout=KERNEL_TIMEOUT_S
                ),
                "its sandbox ended while the kernel started",
            )
            kernel = KernelProcess(
                pid=started.pid,
                generation=generation,
                socket_prefix=self.run_directory / prefix,
                started_from=started.started_from,
            )
            self.kernel = kernel
            self.tell(generation=generation, exit_code=None, started_from=None, started_ms=None)
            early = self._early_exits.pop(kernel.pid, None)
            if early is not None:
                self._kernel_exited(early)
            return kernel
        finally:
            self._starting = False

    async def signal_kernel(self, signum: int) -> None:
        """Send a signal to the kernel's process group; nothing happens when it is gone."""
        kernel = self.kernel
        if kernel is not None and kernel.alive and self._channel is not None:
            try:
                await self._channel.signal(kernel.pid, signum, group=True)
            except errors.WarmcellError:
                if not kernel.exited.is_set() and self.info.state not in TERMINAL:
                    raise

    async def end_kernel(self, *, grace: float) -> int | None:
        """Give the kernel `grace` seconds to leave by itself, then kill it; its exit code, None if there was none."""
        kernel = self.kernel
        if kernel is None:
            return None
        if kernel.alive and grace > 0:
            await _within(kernel.exited.wait(), grace)
        if kernel.alive:
            await self.signal_kernel(9)
            if not await _within(kernel.exited.wait(), GUEST_TIMEOUT_S):
                raise errors.OperationTimeoutError(
                    f"The kernel of {self.info.id} did not end", hint=f"Stop it: DELETE /sandboxes/{self.info.id}."
                )
        return kernel.exit_code

    async def exec(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None = None,
        input: bytes = b"",
        timeout: float = 60.0,
    ) -> ExecResult:
        """Run a process in it to its end; raises as `GuestChannel.exec`."""
        return await self._guest().exec(argv, env=env, cwd=cwd, input=input, timeout=timeout)

    async def stop(self) -> None:
        """End it and remove all of it, its directory included. Idempotent."""
        if self.info.state not in (*TERMINAL, State.STOPPING):
            self.tell(state=transition(self.info.state, Event.STOP), phase=None)
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers = []
        if self._channel is not None:
            await self._channel.close()
        if self._instance is not None:
            await self._instance.stop()
        self._kernel_exited(137)
        self.template_settled.set()
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)
        if self.info.state is State.STOPPING:
            self.tell(state=transition(self.info.state, Event.STOP_DONE))
        self.template_settled.set()
        self.ended.set()

    def fail(self, error: errors.WarmcellError) -> None:
        """Its end by itself: state `failed`, with the reason."""
        if self.info.state not in TERMINAL:
            self.tell(
                state=transition(self.info.state, Event.DIED), phase=None, error=ErrorInfo.from_json(error.to_json())
            )

    def _kernel_exited(self, code: int) -> None:
        kernel = self.kernel
        if kernel is not None and kernel.alive:
            kernel.exit_code = code
            kernel.exited.set()

    async def _watch_guest(self) -> None:
        try:
            await self._follow_events()
        except errors.ProtocolError as error:
            log.warning("sandbox %s: %s", self.info.id, error)
            await self._up().stop()  # a guest that breaks the protocol cannot be watched any more

    async def _follow_events(self) -> None:
        async for event in self._guest().events():
            if event["event"] == "template":
                self._template_event(event)
            elif event["event"] == "kernel" and event["state"] == "exited":
                if self.kernel is not None and self.kernel.pid == event["pid"]:
                    self._kernel_exited(event["exit_code"])
                else:  # it ended while `start_kernel` still waits for the answer that names its pid
                    self._early_exits[event["pid"]] = event["exit_code"]

    def _template_event(self, event: Mapping[str, Any]) -> None:
        status = TemplateStatus.from_json({key: value for key, value in event.items() if key != "event"})
        if status.state in ("ready", "failed"):
            self.template_settled.set()
        if status.state != "none" or self.info.template is not None:
            self.tell(template=status)

    async def _watch_instance(self) -> None:
        """Its end by itself becomes state `failed`."""
        instance = self._up()
        ended = await instance.wait()
        self._kernel_exited(ended.exit_code)
        self.template_settled.set()
        why = "was killed for memory" if ended.oom_killed else f"ended with exit code {ended.exit_code}"
        self.fail(
            errors.SandboxDiedError(
                f"Sandbox {self.info.id} {why}",
                hint="Give it more memory." if ended.oom_killed else ended.message or "Start it again.",
                details={"exit_code": ended.exit_code, "oom_killed": ended.oom_killed},
            )
        )
        self.ended.set()

    def oom_kills(self) -> int:
        """How many of its processes the kernel has killed for memory so far."""
        return self._instance.oom_kills() if self._instance is not None else 0

    async def _unless_dead(self, what: Awaitable[Result], why: str) -> Result:
        """Await `what`, but fail at once if the sandbox ends meanwhile."""
        instance = self._up()
        work = asyncio.ensure_future(what)
        death = asyncio.ensure_future(instance.wait())
        try:
            await asyncio.wait({work, death}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            ended = death.result()
            raise errors.SandboxStartError(
                f"The sandbox could not start: {why} with exit code {ended.exit_code}",
                hint=ended.message.strip() or "`warmcell doctor` says what this machine lacks.",
                details={"exit_code": ended.exit_code, "oom_killed": ended.oom_killed},
            )
        finally:
            for task in (work, death):
                if not task.done():
                    task.cancel()
            await asyncio.gather(work, death, return_exceptions=True)

    def _up(self) -> SandboxInstance:
        if self._instance is None:
            raise errors.ConflictError(f"Sandbox {self.info.id} is not up", hint="Wait until it is running.")
        return self._instance

    def _guest(self) -> GuestChannel:
        if self._channel is None or self.info.state in TERMINAL:
            raise errors.ConflictError(
                f"Sandbox {self.info.id} is {self.info.state}", hint="Only a running sandbox can do that."
            )
        return self._channel


async def _within(what: Awaitable[object], seconds: float) -> bool:
    """Whether it came to an end in that time."""
    try:
        async with asyncio.timeout(seconds):
            await what
    except TimeoutError:
        return False
    return True
