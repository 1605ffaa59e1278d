"""`ImageCache`: images by what they are made of. Each is built once, kept while there is room, and found by name."""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.errors import (
    ConflictError,
    ImageNotFoundError,
    InvalidRequestError,
    StorageFullError,
    UnsupportedOperationError,
    WarmcellError,
)
from warmcell.sandbox.images import texts
from warmcell.sandbox.images.base import Built, ImageBuilder, Tell
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.images.records import Record, Records
from warmcell.sandbox.images.steps import NamedBase
from warmcell.sandbox.models import ImageInfo, SandboxSpec

log = logging.getLogger(__name__)

KEPT_LINES = 1000
"""Of a build under way, for who comes later."""
_LIST = "`warmcell images ls` lists what was built here."


class ImageCache:
    """The images of one keeper. On one loop."""

    def __init__(
        self,
        root: Path,
        builders: Mapping[str, ImageBuilder],
        *,
        quota_bytes: int | None = None,
        in_use: Callable[[], Collection[str]] = lambda: (),
    ) -> None:
        """Configure it.

        Args:
            root: A directory for what is known of images.
            builders: By backend; several backends may have one builder.
            quota_bytes: Most that all images together may take; those that were used longest ago go. None: no cap.
            in_use: What images specs name of which somebody has a sandbox or a snapshot. These are never removed.
        """
        self._builders = builders
        self._records = Records(root)
        self._quota_bytes = quota_bytes
        self.in_use = in_use
        self._jobs: dict[tuple[str, str], _Job] = {}

    @property
    def quota_bytes(self) -> int | None:
        return self._quota_bytes

    async def open(self) -> None:
        """Read what is known, and have builders remove the rest."""
        await asyncio.to_thread(self._records.load)
        for builder in set(self._builders.values()):
            known = {record.info.digest for record in self._records.all if record.info.builder == builder.name}
            await builder.open(known if not self._records.unreadable else None)

    async def close(self) -> None:
        """Give up what is being built."""
        for job in list(self._jobs.values()):
            job.task.cancel()
        await asyncio.gather(*(job.task for job in self._jobs.values()), return_exceptions=True)

    @property
    def building(self) -> bool:
        """Whether something is being built."""
        return bool(self._jobs)

    def infos(self) -> list[ImageInfo]:
        """All images, the one that was used last first."""
        return [record.info for record in self._records.all]

    def info(self, ref: str) -> ImageInfo:
        """One of them, by name, digest or the beginning of that.

        Raises:
            ImageNotFoundError: There is none.
            ConflictError: There are several.
        """
        return self._one(ref).info

    async def build(
        self, image: Image, *, backend: str, name: str = "", tell: Tell = lambda line: None, again: bool = False
    ) -> ImageInfo:
        """The image, built if it is not there. Who asks for one that is being built waits for that, and is told all.

        Args:
            image: What is declared.
            backend: For whose sandboxes.
            name: What it is to be called from now on; another image that was called so is not any more.
            tell: Gets each line of output.
            again: Build it although it is there.

        Raises:
            ImageBuildError: A step failed; nothing is kept, and what was there before is still.
            UnsupportedOperationError: That backend cannot have such an image; nothing was made.
            StorageFullError: The disk is full.
            ImageNotFoundError: It begins with an image that was not built here.
            ConflictError: It is to be built again, and somebody uses it.
        """
        if name:
            texts.image_name(name)
        builder = self._builder(backend)
        image = self._whole(image, builder)
        builder.check(image)
        key = (builder.name, image.digest)
        job = self._jobs.get(key)
        known = self._records.get(*key)
        if again and known is not None and self._is_used(known):
            raise _in_use(name or image.digest)
        if job is None:
            job = self._jobs[key] = _Job()
            job.task = asyncio.create_task(self._build(job, key, image, builder, again=again))
        record = await job.join(tell)
        if name:
            record = await self._call(record, name)
        await self.trim(keep=record)
        return record.info

    def backend_of(self, ref: str, *, default: str, among: Sequence[str]) -> str:
        """For whose sandboxes an image is, where nobody has said: the usual backend's, if it can have it.

        Args:
            ref: What the image is called.
            default: The usual backend.
            among: Those that may be used.
        """
        candidates = [name for name in dict.fromkeys((default, *among)) if name in self._builders]
        built = [name for name in candidates if self._records.find(ref, self._builders[name].name)]
        engines = [name for name in candidates if self._builders[name].references]
        return next(iter((*built, *engines)), default)

    def backend_for(self, image: Image, *, default: str, among: Sequence[str]) -> str:
        """Which backend to build for, where nobody has said: the usual one, if it can have such an image."""
        for name in dict.fromkeys((default, *among)):
            builder = self._builders.get(name)
            if builder is None:
                continue
            with contextlib.suppress(UnsupportedOperationError, ImageNotFoundError):
                builder.check(self._whole(image, builder))
                return name
        return default

    async def resolve(self, spec: SandboxSpec, backend: str) -> SandboxSpec:
        """The spec as a backend takes it: with its image's own name there, interpreter and variables.

        Raises:
            ImageNotFoundError: No such image was built for that backend, which takes no others.
        """
        if spec.image is None:
            return spec
        builder = self._builders.get(backend)
        if builder is None:
            return spec
        found = self._records.find(spec.image, builder.name)
        if len(found) > 1:
            raise _ambiguous(spec.image)
        if not found:
            if builder.references:
                return spec
            raise self._missing(spec.image, backend)
        record = found[0]
        # An engine says that by itself when it is asked for a container.
        if not builder.references and await builder.find(record.info.digest) is None:
            raise ImageNotFoundError(
                f"The image {spec.image} was built, but is not there any more",
                hint="Build it again: `warmcell images build`.",
            )
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._records.used, record, time.time())
        return dataclasses.replace(
            spec,
            image=record.info.reference,
            python=spec.python or record.info.python,
            env={**record.info.env, **spec.env},
        )

    async def remove(self, ref: str) -> None:
        """Remove an image.

        Raises:
            ImageNotFoundError: There is none.
            ConflictError: Somebody uses it, or several are called so.
        """
        record = self._one(ref)
        if self._is_used(record):
            raise _in_use(ref)
        await self._remove(record)

    async def trim(self, *, keep: Record | None = None) -> Sequence[ImageInfo]:
        """Remove images until all that are left fit, those that were used longest ago first; those that went."""
        gone: list[ImageInfo] = []
        if self._quota_bytes is None:
            return gone
        left = sum(info.size_bytes for info in self.infos())
        for record in reversed(self._records.all):
            if left <= self._quota_bytes:
                break
            if (keep is not None and record.info.digest == keep.info.digest) or self._is_used(record):
                continue
            try:
                await self._remove(record)
            except WarmcellError as error:
                log.warning("image %s could not be removed: %s", record.info.digest[7:19], error)
                continue
            log.info("image %s went, as all together were too large", record.info.digest[7:19])
            left -= record.info.size_bytes
            gone.append(record.info)
        return gone

    async def _remove(self, record: Record) -> None:
        # Without its record nothing counts as built, so that goes first.
        await asyncio.to_thread(self._records.drop, record)
        builder = next((one for one in self._builders.values() if one.name == record.info.builder), None)
        try:
            if builder is not None:
                await builder.remove(record.info.digest)
        except WarmcellError:
            await asyncio.to_thread(self._records.put, record)
            raise

    async def _build(
        self, job: "_Job", key: tuple[str, str], image: Image, builder: ImageBuilder, *, again: bool
    ) -> Record:
        try:
            built = None if again else await builder.find(image.digest)
            began = time.monotonic()
            if built is None:
                built = await builder.build(image, tell=job.say, again=again)
                log.info("image %s was built in %.1f s", image.digest[7:19], time.monotonic() - began)
            return await self._note(built, image, builder)
        finally:
            if self._jobs.get(key) is job:
                del self._jobs[key]

    async def _note(self, built: Built, image: Image, builder: ImageBuilder) -> Record:
        """Write down what is there now."""
        known = self._records.get(builder.name, built.digest)
        now = time.time()
        info = ImageInfo(
            digest=built.digest,
            names=known.info.names if known is not None else (),
            builder=builder.name,
            backends=tuple(sorted(name for name, one in self._builders.items() if one is builder)),
            reference=built.reference,
            python=built.python,
            env=image.variables,
            made_of=str(image),
            size_bytes=built.size_bytes,
            created_at=known.info.created_at if known is not None and known.info.reference == built.reference else now,
            last_used_at=now,
        )
        record = Record(info=info, image=image)
        await self._write(record)
        return record

    async def _call(self, record: Record, name: str) -> Record:
        """Give it that name, and take it from another."""
        for other in self._records.find(name, record.info.builder):
            if name in other.info.names and other.info.digest != record.info.digest:
                names = tuple(one for one in other.info.names if one != name)
                await self._write(dataclasses.replace(other, info=dataclasses.replace(other.info, names=names)))
        if name in record.info.names:
            return record
        names = (*record.info.names, name)
        named = dataclasses.replace(record, info=dataclasses.replace(record.info, names=names))
        await self._write(named)
        return named

    async def _write(self, record: Record) -> None:
        try:
            await asyncio.to_thread(self._records.put, record)
        except OSError as error:
            raise StorageFullError(
                f"What is known of the image cannot be written: {error.strerror}",
                hint="Free space on the disk of the state directory.",
            ) from error

    def _whole(self, image: Image, builder: ImageBuilder) -> Image:
        """With the declaration of the image that it begins with, where it names one."""
        while isinstance(image.base, NamedBase):
            found = [
                one for one in self._records.find(image.base.name, builder.name) if image.base.name in one.info.names
            ]
            if not found:
                raise self._missing(image.base.name, builder.name)
            image = Image(found[0].image.base, (*found[0].image.steps, *image.steps))
        return image

    def _builder(self, backend: str) -> ImageBuilder:
        builder = self._builders.get(backend)
        if builder is None:
            raise InvalidRequestError(
                f"There are no images for the backend {backend!r}",
                hint=f"Build for one of {', '.join(sorted(self._builders))}.",
            )
        return builder

    def _one(self, ref: str) -> Record:
        found = self._records.find(ref)
        if not found:
            raise ImageNotFoundError(f"There is no image {ref}", hint=_LIST)
        if len(found) > 1:
            raise _ambiguous(ref)
        return found[0]

    def _missing(self, ref: str, backend: str) -> ImageNotFoundError:
        elsewhere = sorted({name for record in self._records.find(ref) for name in record.info.backends})
        also = f" It was for {', '.join(elsewhere)}." if elsewhere else ""
        return ImageNotFoundError(f"No image {ref} was built for the {backend} backend.{also}", hint=_LIST)

    def _is_used(self, record: Record) -> bool:
        info = record.info
        return bool({info.digest, info.reference, *info.names} & set(self.in_use()))


class _Job:
    """A build under way, with all who wait for it; the last one to leave ends it."""

    task: "asyncio.Task[Record]"

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._tells: list[Tell] = []
        self._waiting = 0

    def say(self, line: str) -> None:
        """A line of output."""
        self._lines.append(line)
        for tell in self._tells:
            tell(line)

    async def join(self, tell: Tell) -> Record:
        """Wait for its end."""
        for line in self._lines:
            tell(line)
        self._tells.append(tell)
        self._waiting += 1
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is None or not current.cancelling():
                raise ConflictError("The build was given up", hint="Build it again later.") from None
            raise
        finally:
            self._tells.remove(tell)
            self._waiting -= 1
            if not self._waiting and not self.task.done():
                self.task.cancel()
                await asyncio.gather(self.task, return_exceptions=True)


def _in_use(ref: str) -> ConflictError:
    return ConflictError(
        f"The image {ref} is in use",
        hint="Shut down the kernels that run on it, and remove their snapshots (`warmcell snapshots ls`).",
    )


def _ambiguous(ref: str) -> ConflictError:
    return ConflictError(
        f"Several images are called {ref}", hint="Give more of the digest, as `warmcell images ls` shows it."
    )
