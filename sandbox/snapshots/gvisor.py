"""The `gvisor` engine: whole sandboxes, memory and files at once, by the runsc that runs them.

Nothing of a sandbox that is saved may be bound on the host or connected with it. So its init, which alone has to do
with the host, closes all of that first, and has it again when a file appears in the run directory: of the sandbox that
goes on, and of each that is restored.
"""

import asyncio
import contextlib
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from warmcell.sandbox import guest_files
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.backends.gvisor import CommandError, GvisorBackend, GvisorInstance, no_images
from warmcell.sandbox.backends.threads import in_thread
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import (
    SnapshotError,
    StorageFullError,
    UnsupportedOperationError,
    WarmcellError,
)
from warmcell.sandbox.guest_wire import wait_for_socket
from warmcell.sandbox.models import GIB, MIB, GpuDevice, Limits, SandboxId, SandboxSpec, SnapshotId
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import BackendReport, Capabilities, EngineReport
from warmcell.sandbox.snapshots.base import Dumped, ImageInfo, Place, Restored, Then
from warmcell.sandbox.snapshots.disk import failure
from warmcell.sandbox.snapshots.whole import WholeImages, versions

SAVE_TIMEOUT_S = 600.0
BACK_TIMEOUT_S = 20.0
SAVE_TRIES, PAUSE_S = 4, 0.05
"""The sandbox's kernel may not be done yet with a connection that was closed."""
NAME_IN_USE = "Cannot save endpoint"
PROBE_TIMEOUT_S = 60.0


class GvisorEngine:
    """Implements `SnapshotEngine`. Its images are of whole sandboxes: restored are sandboxes, by `maker`."""

    name = "gvisor"
    whole = True
    backends: tuple[str, ...] = ()

    def __init__(self, *, paths: Paths, backend: GvisorBackend) -> None:
        """Configure it; nothing is made yet."""
        self._backend = backend
        self.kept = WholeImages(paths)
        self._swept = False

    async def probe(self) -> EngineReport:
        """Save and restore a small sandbox, once for each boot and version."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                found = await asyncio.to_thread(versions)
                tried = await asyncio.to_thread(self.kept.tried, found)
                if not tried:
                    await self._try()
                    await asyncio.to_thread(self.kept.note, found)
        except WarmcellError as error:
            return EngineReport(name=self.name, ready=False, why_not=error.message, hint=error.hint)
        except Exception as error:  # A probe tells what is wrong; it must not fail itself.
            why = f"{type(error).__name__}: {error}"
            return EngineReport(name=self.name, ready=False, why_not=why, hint="Report this: it is not a known lack.")
        return EngineReport(name=self.name, ready=True, details={"runsc": found["runsc"]})

    async def enroll(self, place: Place, *, template: bool = False) -> None:
        """Nothing needs to be done."""

    async def dump(
        self,
        place: Place,
        *,
        pid: int,
        image: SnapshotId,
        then: Then,
        while_frozen: Callable[[], Awaitable[None]],
        when_stopped: Callable[[], Awaitable[None]] | None = None,
        passing: bool = False,
    ) -> Dumped:
        """Save the whole sandbox that a kernel is in; see the port.

        Whatever the host is connected with there is cut off. `when_stopped` is not awaited: there are no files apart.
        """
        if not isinstance(place, GvisorInstance):
            raise UnsupportedOperationError(
                "Only gVisor sandboxes are saved by this engine", hint="Choose the gvisor backend."
            )
        if place.runsc.driver:
            raise no_images()
        if place.unsaved:
            raise UnsupportedOperationError(
                "What a clone has changed in its copy of the folder cannot be saved",
                hint="Save the kernel that it was made from, or let it write to files elsewhere.",
            )
        until = f"back-{image}"
        began = time.perf_counter()
        found = await asyncio.to_thread(versions)
        try:
            draft = await in_thread(self.kept.draft, image)
            # Whoever gives up, or is answered too late, may have an init that has left all the same.
            await GuestChannel(place.run_directory).leave(until)
            left = time.perf_counter()
            await _save(place, draft)
            about = await asyncio.to_thread(
                self.kept.finish, image, until=until, pid=pid, shape=place.shape, versions=found
            )
            saved = time.perf_counter()
            await while_frozen()
            if then == "go_on":
                await asyncio.shield(asyncio.ensure_future(_go_on(place, until)))
        except BaseException as error:
            await asyncio.shield(asyncio.ensure_future(self._undo(place, image, until)))
            if isinstance(error, CommandError):
                raise _explain(error) from error
            if isinstance(error, OSError) and not isinstance(error, WarmcellError):
                raise failure(error, "save the sandbox") from error
            raise
        done = time.perf_counter()
        return Dumped(
            image_bytes=about.image_bytes,
            memory_bytes=about.memory_bytes,
            pids=(pid,),
            versions=found,
            ms={
                "leave": round(1000 * (left - began), 1),
                "save": round(1000 * (saved - left), 1),
                "back": round(1000 * (done - saved), 1),
            },
        )

    def maker(self, backend: SandboxBackend, image: SnapshotId | None) -> "Maker":
        """What makes sandboxes that go on from an image, or wait for one. Whatever the backend is, it is this engine's
        own.
        """
        return Maker(self.kept, self._backend, image)

    async def restore(
        self, place: Place, *, image: SnapshotId, told: Callable[[int, int], None] | None = None
    ) -> Restored:
        """Tell of the kernel in a sandbox that `maker` has made; it goes on, if it did not already.

        Raises:
            UnsupportedOperationError: The sandbox was made in another way.
            SnapshotNotFoundError: There is no such image.
            SnapshotIncompatibleError: The image is of another runsc, machine or spec.
            SnapshotError: It was tried and failed; the image is as before.
        """
        about = await asyncio.to_thread(self.kept.about, image)
        if isinstance(place, GvisorInstance) and place.stands_by:
            await asyncio.to_thread(self.kept.check, about, place.shape)
            await place.go_on(self.kept.path(image), until=about.until)
        if not isinstance(place, GvisorInstance) or place.image != self.kept.path(image):
            raise UnsupportedOperationError(
                "An image of a whole sandbox cannot be restored in another one",
                hint="Restore it as a sandbox of its own.",
            )
        return Restored(pid=about.pid)

    async def populate(self, image: SnapshotId) -> int:
        """Nothing is left to be read: all memory is."""
        await asyncio.to_thread(self.kept.about, image)
        return 0

    async def settle(self, image: SnapshotId) -> None:
        """It was put on the disk before it had its name."""
        await asyncio.to_thread(self.kept.about, image)

    async def images(self) -> list[ImageInfo]:
        """See the port. A keeper asks before it saves anything, so what is unfinished then is a killed one's."""
        if not self._swept:
            self._swept = True
            await in_thread(self.kept.sweep)
        return await asyncio.to_thread(self.kept.all)

    async def drop(self, image: SnapshotId) -> None:
        """See the port."""
        await asyncio.to_thread(self.kept.drop, image)

    async def close(self) -> None:
        """Nothing was started."""

    async def _undo(self, place: GvisorInstance, image: SnapshotId, until: str) -> None:
        await asyncio.to_thread(self.kept.drop, image)
        with contextlib.suppress(WarmcellError, CommandError):  # What went wrong first is what the caller is told.
            await _go_on(place, until, given_up=True)

    async def _try(self) -> None:
        """Raises WarmcellError: It cannot be done here."""
        image = SnapshotId(secrets.token_hex(6))
        spec = SandboxSpec(
            python=sys.executable,
            backend=self._backend.name,
            limits=Limits(memory_bytes=GIB, layer_bytes=64 * MIB, shm_bytes=16 * MIB),
        )
        where = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="warmcell-probe-"))
        try:
            for number, make in enumerate((self._backend.create, self.maker(self._backend, image).create)):
                directory = where / str(number)
                directory.mkdir(mode=0o700)
                made = await make(spec, sandbox_id=SandboxId(secrets.token_hex(6)), directory=directory)
                try:
                    hello = await (await GuestChannel.open(made.run_directory)).hello()
                    if number == 0:
                        await self.dump(made, pid=hello.pid, image=image, then="stop", while_frozen=_nothing)
                finally:
                    await made.stop()
        finally:
            await self.drop(image)
            await asyncio.to_thread(shutil.rmtree, where, ignore_errors=True)


class Maker:
    """Implements `SandboxBackend`: each sandbox goes on from one image, or, where none is named, waits for one."""

    def __init__(self, images: WholeImages, backend: GvisorBackend, image: SnapshotId | None) -> None:
        self.name = backend.name
        self._images = images
        self._backend = backend
        self._image = image

    @property
    def capabilities(self) -> Capabilities:
        """As any of this backend."""
        return self._backend.capabilities

    async def probe(self) -> BackendReport:
        """As any of this backend."""
        return await self._backend.probe()

    def fingerprint(self, spec: SandboxSpec) -> str:
        """As any of this backend."""
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
    ) -> GvisorInstance:
        """Bring up a sandbox that goes on from the image; it needs the image no more once it is up.

        A layer is taken and not looked at: the image has the files.

        Raises:
            SnapshotIncompatibleError: The image is of another runsc, machine or spec; nothing was made.
            SnapshotError: It was tried and failed; the image is as before.
        """
        about, beside = None, False
        if self._image is not None:
            about, beside = await asyncio.to_thread(self._images.fit, self._image, spec)
        made = await self._backend.stand_by(
            spec,
            sandbox_id=sandbox_id,
            directory=directory,
            gpus=gpus,
            named=named,
            progress=progress,
            beside=beside,
        )
        if about is not None and self._image is not None:
            try:
                await made.go_on(self._images.path(self._image), until=about.until)
            except BaseException:
                await asyncio.shield(asyncio.create_task(made.stop()))
                raise
        return made


async def _nothing() -> None:
    return


async def _save(place: GvisorInstance, draft: Path) -> None:
    """Have the sandbox stand still, and write it.

    Raises:
        CommandError: It could not be written.
    """
    await place.tell("pause")
    for attempt in range(SAVE_TRIES):
        try:
            await place.tell(
                "checkpoint",
                "--compression=none",
                "--leave-running",
                f"--image-path={draft}",
                timeout_s=SAVE_TIMEOUT_S,
            )
        except CommandError as error:
            if NAME_IN_USE not in str(error) or attempt == SAVE_TRIES - 1:
                raise
            await asyncio.sleep(PAUSE_S)
            await asyncio.to_thread(_empty, draft)
        else:
            return


async def _go_on(place: GvisorInstance, until: str, *, given_up: bool = False) -> None:
    """Let a sandbox that was paused go on, and wait until its init is back.

    Args:
        place: Which.
        until: The file for which its init was told to wait.
        given_up: Init may still be about to leave. The file stays for it then.

    Raises:
        WarmcellError: It does not come back.
    """
    path = place.run_directory / until
    with contextlib.suppress(OSError, WarmcellError):
        guest_files.create(path).close()
    with contextlib.suppress(CommandError):  # It was not paused yet.
        await place.tell("resume")
    back = asyncio.ensure_future(wait_for_socket(place.run_directory))
    ended = asyncio.ensure_future(place.wait())
    try:
        await asyncio.wait({back, ended}, timeout=BACK_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not back.done():
            raise SnapshotError(
                f"The sandbox {'ended while' if ended.done() else 'did not come back after'} it was saved",
                hint="Restart its kernel.",
            )
        back.result()
    finally:
        for task in (back, ended):
            task.cancel()
        await asyncio.gather(back, ended, return_exceptions=True)
    if not given_up:
        path.unlink(missing_ok=True)


def _empty(draft: Path) -> None:
    for path in draft.iterdir():
        path.unlink()


def _explain(error: CommandError) -> WarmcellError:
    said = str(error)
    if "no space left" in said.lower():
        return StorageFullError(
            "The sandbox cannot be saved: the disk is full", hint="Free space where Warmcell keeps its state."
        )
    return SnapshotError(f"The sandbox cannot be saved: {said}", hint="It goes on as before; try again later.")
