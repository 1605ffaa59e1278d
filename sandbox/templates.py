"""Templates as snapshots: built once, kept on disk, and every new kernel and restart is a restore of one.

A template is a kernel with its modules imported that nobody has used. What it depends on is its identity; where any of
that changes, an upgraded package for example, another one is built and the old one goes.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from warmcell.sandbox import errors
from warmcell.sandbox.backends.threads import Threads
from warmcell.sandbox.guest.supervisor.template import read_at_start
from warmcell.sandbox.memory import Memory
from warmcell.sandbox.models import SandboxSpec, SnapshotId, TemplateStatus

log = logging.getLogger(__name__)

Build = Callable[[SandboxSpec, Mapping[str, str]], Awaitable[SnapshotId]]
"""Makes the template of a spec, with that identity."""


LOOKING = Threads("fingerprint", most=64)
"""For some milliseconds, but an engine of containers that is asked for an image may be stopped."""

LASTING = errors.UnsupportedOperationError
"""Mostly so for as long as the environment is the same. All else may be otherwise another time."""

RETRY_S, RETRY_MOST_S = 60.0, 3600.0
"""How long nobody tries again, the first time and at most: each further time twice as long."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """A template that could not be built."""

    times: int = 0
    until: float = -math.inf
    """When it may be tried again."""


class Templates:
    """Which snapshot is the template of a spec; builds those that are wanted, one after another."""

    def __init__(self, memory: Memory, build: Build, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = memory
        self._build = build
        self._building = asyncio.Lock()
        self._failed: dict[str, _Failure] = {}
        self._clock = clock

    async def find(self, spec: SandboxSpec) -> SnapshotId | None:
        """The template that a kernel of this spec can come from now."""
        if not spec.preload or not self._memory.store.infos(kind="template"):
            return None
        try:
            return await self._find(await LOOKING.run(self._identity, spec))
        except errors.WarmcellError as error:
            log.warning("template %s is not looked for: %s", spec.template, error)
            return None

    async def ensure(self, spec: SandboxSpec) -> SnapshotId | None:
        """The template of this spec, built first where there is none; None where there can be none."""
        if not spec.preload:
            return None
        try:
            engine = await self._memory.check(spec)
        except errors.UnsupportedOperationError:
            return None
        if engine.whole:  # Its kernels come with a sandbox, and are wanted in one that is there.
            return None
        async with self._building:
            try:
                wanted = await LOOKING.run(self._identity, spec)
            except errors.WarmcellError as error:
                log.warning("template %s cannot be made: %s", spec.template, error)
                return None
            found = await self._find(wanted)
            if found is not None or self._clock() < self._failed.get(wanted["digest"], _Failure()).until:
                return found
            log.info("template %s is built", spec.template)
            began = self._clock()
            try:
                made = await self._build(spec, wanted)
            except Exception as error:  # Whatever it is, kernels start without it.
                self._note(spec, wanted["digest"], error)
                return None
            self._failed.pop(wanted["digest"], None)
            log.info("template %s is there after %.1f s", spec.template, self._clock() - began)
            await self._replace(made, wanted)
            return made

    def _note(self, spec: SandboxSpec, digest: str, error: Exception) -> None:
        """Leave it alone for a while."""
        before = self._failed.get(digest, _Failure()).times
        pause_s = RETRY_MOST_S if isinstance(error, LASTING) else min(RETRY_S * 2**before, RETRY_MOST_S)
        self._failed[digest] = _Failure(before + 1, self._clock() + pause_s)
        known = isinstance(error, errors.WarmcellError)
        log.warning(
            "template %s cannot be kept as a snapshot, and is left alone for %.0f s: %s",
            *(spec.template, pause_s, error if known else repr(error)),
            exc_info=None if known else error,
        )

    def status(self, template: SnapshotId) -> TemplateStatus | None:
        """What a template has imported."""
        with contextlib.suppress(errors.WarmcellError, KeyError):
            return TemplateStatus.from_json(self._memory.store.get(template).kernel["template"])
        return None

    def _identity(self, spec: SandboxSpec) -> dict[str, str]:
        return identity(spec, self._memory.fingerprint(spec))

    async def _find(self, wanted: Mapping[str, str]) -> SnapshotId | None:
        store = self._memory.store
        for info in store.infos(kind="template"):
            if store.get(info.id).environment == wanted:
                return info.id
        return None

    async def _replace(self, made: SnapshotId, wanted: Mapping[str, str]) -> None:
        """Remove those that stood for the same thing before it changed."""
        store = self._memory.store
        for info in store.infos(kind="template"):
            if info.id != made and store.get(info.id).environment.get("name") == wanted["name"]:
                await store.discard(info.id)


def identity(spec: SandboxSpec, fingerprint: str) -> dict[str, str]:
    """What two specs share whose kernels can come from one template. Looks at the workspace's owner; blocks.

    Args:
        spec: Of sandboxes.
        fingerprint: As their backend knows their environment by.
    """
    name = {
        "template": spec.template,
        "backend": spec.backend,
        "python": spec.python if spec.image is None else [spec.image, spec.python],
        "preload": spec.preload,
        "warmup": spec.warmup,
        "umask": spec.files_umask,
        "home": spec.home,
        **({"user": spec.user} if spec.user else {}),  # Those from before there was one are what they were.
        "env": read_at_start(spec.env),
        "owner": _owner(spec),
    }
    written = {"name": _digest(name), "environment": _digest(fingerprint)}
    return {**written, "digest": _digest(written)}


def _owner(spec: SandboxSpec) -> int | None:
    """Whose files the workspace has: as root that decides who the guest is."""
    if spec.workspace is None or spec.workspace.mode == "none" or os.getuid() != 0:
        return None
    try:
        return os.stat(spec.workspace.path).st_uid
    except OSError:
        return None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
