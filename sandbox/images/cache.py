"""`ImageCache`: images by what they are made of. Each is built once, kept while there is room, and found by name."""

import asyncio
import contextlib
import dataclasses
import logging
import time
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
from warmcell.sandbox.images.claims import Claims, Key
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.images.job import Job
from warmcell.sandbox.images.records import Record, Records
from warmcell.sandbox.images.steps import NamedBase
from warmcell.sandbox.models import ImageInfo, SandboxSpec

log = logging.getLogger(__name__)

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
        self._jobs: dict[Key, Job] = {}
        self._claims = Claims()
        self._writing = asyncio.Lock()

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
        """Give up what is being built; what is being removed goes."""
        for job in list(self._jobs.values()):
            job.task.cancel()
        await asyncio.gather(*(job.task for job in self._jobs.values()), return_exceptions=True)
        await self._claims.close()

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
        await self._claims.settled(key)
        known = self._records.get(*key)
        if again and known is not None and self._is_used(known):
            raise _in_use(name or image.digest)
        with self._claims.hold(key):
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = Job(again=again)
                job.task = asyncio.create_task(self._build(job, key, image, builder, again=again))
            record = await job.join(tell)
            if name:
                record = await self._call(record, name)
            await self.trim()
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

        The image stays from the moment in which it is found until this returns. From then on it does if `in_use` names
        it, so who asks puts the spec there before waiting for anything else.

        Raises:
            ImageNotFoundError: No such image was built for that backend, which takes no others.
            ConflictError: Several are called so, or it is being built anew.
        """
        if spec.image is None:
            return spec
        builder = self._builders.get(backend)
        if builder is None:
            return spec
        record = await self._found(spec.image, builder)
        if record is None:
            if builder.references:
                return spec
            raise self._missing(spec.image, backend)
        key = _key(record)
        job = self._jobs.get(key)
        if job is not None and job.again and not builder.references:  # An engine keeps what a container has.
            raise ConflictError(
                f"The image {spec.image} is being built anew", hint="Start it when that build has ended."
            )
        with self._claims.hold(key):
            # An engine says that by itself when it is asked for a container.
            if not builder.references and await builder.find(record.info.digest) is None:
                raise ImageNotFoundError(
                    f"The image {spec.image} was built, but is not there any more",
                    hint="Build it again: `warmcell images build`.",
                )
            now = time.time()
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self._records.touch, record, now)
                self._records.used(*key, now)
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
        while self._claims.is_going(key := _key(record := self._one(ref))):
            await self._claims.settled(key)
        if self._is_used(record):
            raise _in_use(ref)
        await self._claims.remove(key, self._remove(record))

    async def trim(self) -> Sequence[ImageInfo]:
        """Remove images until all that are left fit, those that were used longest ago first; those that went."""
        gone: list[ImageInfo] = []
        if self._quota_bytes is None:
            return gone
        left = sum(record.info.size_bytes for record in self._records.all if not self._claims.is_going(_key(record)))
        for record in reversed(self._records.all):
            if left <= self._quota_bytes:
                break
            key = _key(record)
            if self._records.get(*key) is None or self._claims.is_going(key) or self._is_used(record):
                continue
            try:
                await self._claims.remove(key, self._remove(record))
            except WarmcellError as error:
                log.warning("image %s could not be removed: %s", record.info.digest[7:19], error)
                continue
            log.info("image %s went, as all together were too large", record.info.digest[7:19])
            left -= record.info.size_bytes
            gone.append(record.info)
        return gone

    async def _remove(self, record: Record) -> None:
        # Without its file nothing counts as built, so that goes first.
        await asyncio.to_thread(self._records.unlink, record)
        builder = next((one for one in self._builders.values() if one.name == record.info.builder), None)
        try:
            if builder is not None:
                await builder.remove(record.info.digest)
        except WarmcellError:
            await asyncio.to_thread(self._records.put, record)
            raise
        self._records.forget(record)

    async def _found(self, ref: str, builder: ImageBuilder) -> Record | None:
        """The image of that name for that builder, which is not being removed when this returns.

        Raises:
            ConflictError: Several are called so.
        """
        while True:
            found = self._records.find(ref, builder.name)
            if len(found) > 1:
                raise _ambiguous(ref)
            if not found:
                return None
            if not self._claims.is_going(_key(found[0])):
                return found[0]
            await self._claims.settled(_key(found[0]))

    async def _build(
        self, job: "Job", key: tuple[str, str], image: Image, builder: ImageBuilder, *, again: bool
    ) -> Record:
        try:
            built = None if again else await builder.find(image.digest)
            began = time.monotonic()
            if built is None:
                built = await builder.build(image, tell=job.say, again=again)
                log.info("image %s was built in %.1f s", image.digest[7:19], time.monotonic() - began)
            async with self._writing:
                return await self._note(built, image, builder)
        finally:
            if self._jobs.get(key) is job:
                del self._jobs[key]

    async def _note(self, built: Built, image: Image, builder: ImageBuilder) -> Record:
        """Write down what is there now. Nobody else writes meanwhile."""
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
        async with self._writing:
            while (other := self._other(name, record)) is not None:
                key = _key(other)
                if self._claims.is_going(key):  # What is written of one that goes would outlive it.
                    await self._claims.settled(key)
                    continue
                names = tuple(one for one in other.info.names if one != name)
                with self._claims.hold(key):
                    await self._write(dataclasses.replace(other, info=dataclasses.replace(other.info, names=names)))
            record = self._records.get(*_key(record)) or record  # It may have got another name meanwhile.
            if name in record.info.names:
                return record
            names = (*record.info.names, name)
            named = dataclasses.replace(record, info=dataclasses.replace(record.info, names=names))
            await self._write(named)
            return named

    def _other(self, name: str, record: Record) -> Record | None:
        """Another image of that name."""
        found = self._records.find(name, record.info.builder)
        return next((one for one in found if name in one.info.names and _key(one) != _key(record)), None)

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
        key = _key(record)
        if self._claims.is_held(key):
            return True
        return any(_key(one) == key for ref in self.in_use() for one in self._records.find(ref, record.info.builder))


def _key(record: Record) -> Key:
    return record.info.builder, record.info.digest


def _in_use(ref: str) -> ConflictError:
    return ConflictError(
        f"The image {ref} is in use",
        hint="Shut down the kernels that run on it, and remove their snapshots (`warmcell snapshots ls`).",
    )


def _ambiguous(ref: str) -> ConflictError:
    return ConflictError(
        f"Several images are called {ref}", hint="Give more of the digest, as `warmcell images ls` shows it."
    )
