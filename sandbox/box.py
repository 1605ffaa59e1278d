"""A sandbox from its rise to its fall: the backend's instance, the guest's channel, and what is told of it."""

import abc
import asyncio
import contextlib
import dataclasses
import logging
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from warmcell.sandbox import errors, freezing
from warmcell.sandbox.backends.base import SandboxBackend, SandboxInstance
from warmcell.sandbox.backends.threads import in_thread, to_its_end
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.guest_process import GuestProcess
from warmcell.sandbox.kernel import Frontend, KernelProcess, LeftKernel
from warmcell.sandbox.lifecycle import TERMINAL, Event, State, transition
from warmcell.sandbox.models import (
    ErrorInfo,
    ExecResult,
    GpuDevice,
    Phase,
    QueuePlace,
    SandboxId,
    SandboxInfo,
    SandboxSpec,
)
from warmcell.sandbox.network.egress import Door
from warmcell.sandbox.network.streams import Tally
from warmcell.sandbox.told import end_of

log = logging.getLogger(__name__)

DOOR_TIMEOUT_S = 10.0
"""Until programs in it can reach the proxy, which takes some milliseconds."""

GUEST_TIMEOUT_S = 60.0
"""From the start of the process tree until the guest's init answers. It takes some 20 ms."""

END_TIMEOUT_S = 10.0
"""From the end of the guest's event stream until its sandbox has ended too."""

DEATH_TIMEOUT_S = 5.0
"""From the moment in which a guest that comes up hangs up until it is known that it has ended, and how."""

EVENTS_AT_ONCE = 50
EVENTS_PAUSE_S = 0.25
"""After so many events of a guest, so that a flood of them costs little. A template's are two for each module."""

Result = TypeVar("Result")


class Box(abc.ABC):
    """What a sandbox is apart from how its kernels start and end, and the tasks that watch it."""

    def __init__(
        self,
        info: SandboxInfo,
        spec: SandboxSpec,
        directory: Path,
        on_change: Callable[[Any], None],
    ) -> None:
        self.info = info
        self.spec = spec
        self.directory = directory
        self.named = SandboxId(directory.name)
        """Whose name it has as a host. Unlike the directory it stays when a twin takes its place."""
        self.gpus: tuple[GpuDevice, ...] = ()
        self.kernel: KernelProcess | None = None
        self.frontend: Frontend | None = None
        """None where no client is connected through one."""
        self.left: LeftKernel | None = None
        """Of a sandbox that is parked: how its kernel was left."""
        self.layer: contextlib.AsyncExitStack | None = None
        """Holds the snapshot whose files it has."""
        self.lock = asyncio.Lock()
        """Held while its memory is saved or brought back, and by a start of a kernel."""
        self.template_settled = asyncio.Event()
        """Set while the fork server is neither starting nor importing."""
        self.ended = asyncio.Event()
        self.awaited = True
        """Whether anybody waits for what is done with it. What is done in advance lets others go first."""
        self._on_change = on_change
        self._instance: SandboxInstance | None = None
        self._channel: GuestChannel | None = None
        self.idle: Callable[[], Coroutine[Any, Any, None]] = _at_once
        """Awaited before something is done in it that can wait."""
        self.door: Door | None = None
        """Through which it reaches what it may, if it has no network and may reach something."""
        self.tally = Tally()
        """What went through its doors."""
        self._watchers: list[asyncio.Task[None]] = []
        self._serving: asyncio.Task[None] | None = None
        self._on_trial = False
        self._frozen = self._falling = False
        self._freezing = asyncio.Lock()
        self._changed_at = time.monotonic()

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for sandboxes that can stand in for each other."""
        return self.spec.shape(self.gpus)

    @property
    def up(self) -> bool:
        """Whether there is a backend's sandbox behind it."""
        return self._instance is not None

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

    def took(self, **phases_ms: float) -> None:
        """Add to what the start under way has spent its time on, in milliseconds."""
        self.tell(phases_ms={**self.info.phases_ms, **{name: round(ms, 1) for name, ms in phases_ms.items()}})

    def waited(self, ms: float) -> None:
        """Add to the time that the start under way has waited."""
        if ms:
            self.took(queue=self.info.phases_ms.get("queue", 0.0) + ms)

    def tell(self, **changes: Any) -> None:
        """Change what is told about it, and tell it."""
        before = self.info.state
        self.info = dataclasses.replace(self.info, **changes)
        if self.info.state is not before:
            now = time.monotonic()
            log.info(
                "sandbox %s (%s, %s) is %s after %.3f s %s",
                *(self.info.id, self.info.backend, self.info.owner, self.info.state),
                *(now - self._changed_at, before),
            )
            self._changed_at = now
        self._on_change(self)

    def phase(self, name: str, detail: str = "", hint: str = "") -> None:
        """Say what the start is busy with; the clock restarts with each new name."""
        now = self.info.phase
        since = now.since if now is not None and now.name == name else time.time()
        self.tell(phase=Phase(name=name, since=since, detail=detail, hint=hint))

    def stands(self, place: QueuePlace | None) -> None:
        """Say where it stands in the queue for a GPU; None: nowhere any more."""
        if place is not None:
            phase = Phase(name="lease", since=place.since, detail=str(place), hint=place.why)
            self.tell(queue=place, phase=phase)
        elif self.info.queue is not None:
            self.tell(queue=None, phase=None)

    async def bring_up(self, backend: SandboxBackend, gpus: Sequence[GpuDevice]) -> None:
        """Create it and wait for its guest.

        Raises:
            WarmcellError: What the backend raises, or `SandboxStartError` where the guest does not answer.
        """
        self.gpus = tuple(gpus)
        await self.rise(backend)
        self.tell(state=transition(self.info.state, Event.CREATED), phase=None)
        self.watch()

    async def rise(self, backend: SandboxBackend, *, layer: Path | None = None, later: bool = False) -> None:
        """Have a backend's sandbox behind it whose guest answers, with `gpus`. Its state is the caller's to tell.

        Args:
            backend: Makes it.
            layer: Of a snapshot; the sandbox has these files. They must stay as long as it does.
            later: Its guest comes when somebody needs it, or a while after nobody waits for a start any more, if that
                is something that the backend can do.

        Raises:
            WarmcellError: As `bring_up`.
        """
        self.phase("sandbox")
        instance = await backend.create(
            self.spec,
            sandbox_id=SandboxId(self.directory.name),  # A twin is there at the same time.
            directory=self.directory,
            gpus=self.gpus,
            layer=layer,
            named=self.named,
            later=later,
            progress=lambda detail: self.phase("sandbox", detail),
        )
        self._instance = instance
        if instance.waits:
            self._channel = GuestChannel(instance.run_directory, waits=True)
        elif not instance.stands_by:
            self.phase("guest")
            await self.meet()
        self.tell(limits=dict(instance.limits), workspace_note=instance.workspace_note, gpus=self.gpus)

    async def meet(self) -> None:
        """Have a channel to its guest, once that answers. Idempotent.

        Raises:
            WarmcellError: As `bring_up`.
        """
        if self._channel is None:
            opening = GuestChannel.open(self.run_directory, timeout=GUEST_TIMEOUT_S)
            self._channel = await self._unless_dead(opening, "its first process ended")

    def watch(self) -> None:
        """Follow what happens in it from now on."""
        self._watchers = [asyncio.create_task(self._watch_guest()), asyncio.create_task(self._watch_instance())]
        self.serve_door()

    def serve_door(self) -> None:
        """Have programs in it reach what its door lets them, if it has one and runs."""
        if self.door is not None and self._watchers and self._serving is None:
            self._serving = asyncio.create_task(self._serve(self.door))

    async def _serve(self, door: Door) -> None:
        try:
            await asyncio.to_thread(door.trust, self.run_directory)
            await door.serve(self._reached())
        except (errors.WarmcellError, OSError) as error:
            log.warning("sandbox %s reaches nothing: %s", self.info.id, error)
        door.opened.set()  # Nobody need wait any longer for what does not come.

    async def use_door(self, door: Door | None) -> None:
        """Have it reach what that lets it, from now on; connections of until now end."""
        await self._stop_serving()
        self.door = door
        self.serve_door()

    async def _stop_serving(self) -> None:
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    async def network_environment(self) -> Mapping[str, str]:
        """What programs in it are told of the proxy, once they can reach it; empty where there is none."""
        door = self.door
        if door is None:
            return {}
        if not await within(door.opened.wait(), DOOR_TIMEOUT_S):
            log.warning("sandbox %s: its proxy is not there", self.info.id)
        return door.environment(self.guest_run_directory)

    async def become(self, other: Self, *, on_trial: bool = False) -> Self:
        """Exchange what is behind this one with what is behind `other`, its twin, which is returned unwatched.

        Args:
            other: The twin.
            on_trial: Until `accept`, the end of what is behind this one now is not the end of this one.

        Raises:
            CancelledError: Nothing was exchanged, and this one is followed as before.
        """
        try:
            for box in (self, other):
                await box.unwatch()
        except BaseException:
            if self._instance is not None:
                self.watch()
            raise
        self._on_trial = on_trial
        for name in ("_instance", "_channel", "directory", "layer", "kernel"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, theirs)
            setattr(other, name, mine)
        if self._instance is not None:
            instance = self._instance
            self.tell(limits=dict(instance.limits), workspace_note=instance.workspace_note)
            self.watch()
        return other

    async def accept(self) -> None:
        """What was on trial stays."""
        await self.unwatch()
        self._on_trial = False
        self.watch()

    async def discard(self) -> None:
        """Remove a twin, or what was exchanged for it, without a word; whole, even if cancelled. Idempotent."""
        await to_its_end(self._discard())

    async def _discard(self) -> None:
        await self.fall()
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)
        await self.let_go_of_layer()

    async def let_go_of_layer(self) -> None:
        """It needs the files of the snapshot it came from no more. Idempotent."""
        layer, self.layer = self.layer, None
        if layer is not None:
            await layer.aclose()

    async def unwatch(self) -> None:
        """Follow it no more: what happens in it now is no news. Idempotent."""
        await self._stop_serving()
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers = []

    async def fall(self) -> None:
        """Remove the backend's sandbox behind it, whatever runs there. Its kernel counts as alive. Idempotent."""
        self._falling = True
        try:
            await self.unwatch()
            if self._frozen:  # Whoever is to see its processes end must run.
                await self.thaw()
            channel, self._channel = self._channel, None
            if channel is not None:
                await channel.close()
            instance = self._instance
            if instance is not None:
                await instance.stop()
            self._instance = None
        finally:
            self._falling = False

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

    def exec_stream(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: str = "", pty: tuple[int, int] | None = None
    ) -> contextlib.AbstractAsyncContextManager[GuestProcess]:
        """Start a process in it and hold its streams; raises as `GuestChannel.exec_stream`."""
        return self._guest().exec_stream(argv, env=env, cwd=cwd, pty=pty)

    def files_stream(self) -> contextlib.AbstractAsyncContextManager[GuestProcess]:
        """A process in it that does one thing with its files; raises as `GuestChannel.files_stream`."""
        return self._guest().files_stream()

    def forward(
        self, port: int
    ) -> contextlib.AbstractAsyncContextManager[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection to a TCP port of its loopback interface; raises as `GuestChannel.forward`."""
        return self._guest().forward(port)

    async def freeze(self) -> None:
        """Stop everything in it where it is, memory kept. Idempotent.

        Raises:
            UnsupportedOperationError: Its processes are not ours to stop; nothing was changed.
            ConflictError: It is going away; likewise.
        """
        async with self._freezing:
            if self._falling:
                raise errors.ConflictError("The sandbox is going away", hint="There is nothing to be frozen any more.")
            self._frozen = True
            try:
                await in_thread(freezing.freeze, lambda: self.processes)
            except errors.WarmcellError:
                self._frozen = False
                raise

    async def thaw(self) -> None:
        """Have what was frozen go on. Idempotent."""
        async with self._freezing:
            await in_thread(freezing.thaw, lambda: self.processes)
            self._frozen = False

    async def stop(self) -> None:
        """End it and remove all of it, its directory included; whole, even if cancelled. Idempotent."""
        await to_its_end(self._stop())

    async def _stop(self) -> None:
        if self.info.state not in (*TERMINAL, State.STOPPING):
            self.tell(state=transition(self.info.state, Event.STOP), phase=None)
        await self.discard()
        self._all_exited(128 + signal.SIGKILL)
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

    def _all_exited(self, code: int) -> None:
        """It has ended, with every kernel in it."""
        self._kernel_exited(code)

    async def _watch_guest(self) -> None:
        """Follow what the guest tells. A sandbox of which nothing is heard any more cannot be watched, so it ends."""
        try:
            await self._until_needed(self._reached())
            await self._follow_events()
            why = "its first process said no more"
        except errors.WarmcellError as error:
            why = str(error)
        instance = self._up()
        if not await within(instance.wait(), END_TIMEOUT_S):
            log.warning("sandbox %s is stopped: %s", self.info.id, why)
            await instance.stop()

    async def _until_needed(self, channel: GuestChannel) -> None:
        """Until somebody has its init come, or what that takes is in nobody's way any more."""
        if channel.came.is_set():
            return
        waits = [asyncio.create_task(channel.came.wait()), asyncio.create_task(self.idle())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _follow_events(self) -> None:
        count = 0
        async for event in self._reached().events():
            count += 1
            self._event(event)
            if count % EVENTS_AT_ONCE == 0:
                await asyncio.sleep(EVENTS_PAUSE_S)

    @abc.abstractmethod
    def _event(self, event: Mapping[str, Any]) -> None:
        """The guest has told this."""

    async def _watch_instance(self) -> None:
        """Its end by itself becomes state `failed`."""
        ended = await self._up().wait()
        self._all_exited(ended.exit_code)
        if self._on_trial:
            return
        self.template_settled.set()
        self.fail(end_of(errors.SandboxDiedError, f"Sandbox {self.info.id}", ended, hint="Restart the kernel."))
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
            if work.done() and isinstance(work.exception(), errors.TransportError):
                # Its first process hangs up as it ends, and how it ended is told a moment later.
                await asyncio.wait({death}, timeout=DEATH_TIMEOUT_S)
            if work.done() and (not death.done() or work.exception() is None):
                return work.result()
            raise end_of(
                errors.SandboxStartError,
                f"The sandbox could not start: {why}; it",
                death.result(),
                hint="`warmcell doctor` says what this machine lacks.",
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

    @property
    def instance(self) -> SandboxInstance:
        """The backend's sandbox.

        Raises:
            ConflictError: There is none now.
        """
        return self._up()

    def _reached(self) -> GuestChannel:
        """The channel, also before its state says running."""
        if self._channel is None:
            raise errors.ConflictError(f"Sandbox {self.info.id} is not up", hint="Wait until it is running.")
        return self._channel

    def _guest(self) -> GuestChannel:
        if self.info.state is State.FAILED and self.info.error is not None:
            raise errors.from_json(self.info.error.to_json())
        if self._channel is None or self.info.state is not State.RUNNING:
            raise errors.ConflictError(
                f"Sandbox {self.info.id} is {self.info.state}", hint="Only a running sandbox can do that."
            )
        return self._channel


async def _at_once() -> None:
    """Nothing is in the way."""


async def within(what: Awaitable[object], seconds: float) -> bool:
    """Whether it came to an end in that time."""
    try:
        async with asyncio.timeout(seconds):
            await what
    except TimeoutError:
        return False
    return True
