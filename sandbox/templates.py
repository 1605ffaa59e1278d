"""Templates as snapshots: built once, kept on disk, and every new kernel and restart is a restore of one.

A template is a kernel with its modules imported that nobody has used. What it depends on is its identity; where any of
that changes, an upgraded package for example, another one is built and the old one goes.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Awaitable, Callable, Mapping

from warmcell.sandbox import errors
from warmcell.sandbox.guest.supervisor.template import read_at_start
from warmcell.sandbox.memory import Memory
from warmcell.sandbox.models import SandboxSpec, SnapshotId, TemplateStatus

log = logging.getLogger(__name__)

Build = Callable[[SandboxSpec, Mapping[str, str]], Awaitable[SnapshotId]]
"""Makes the template of a spec, with that identity."""


class Templates:
    """Which snapshot is the template of a spec; builds those that are wanted, one after another."""

    def __init__(self, memory: Memory, build: Build) -> None:
        self._memory = memory
        self._build = build
        self._building = asyncio.Lock()
        self._failed: dict[str, errors.WarmcellError] = {}

    async def find(self, spec: SandboxSpec) -> SnapshotId | None:
        """The template that a kernel of this spec can come from now."""
        if not spec.preload:
            return None
        try:
            return await self._find(await asyncio.to_thread(self._identity, spec))
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
                wanted = await asyncio.to_thread(self._identity, spec)
            except errors.WarmcellError as error:
                log.warning("template %s cannot be made: %s", spec.template, error)
                return None
            found = await self._find(wanted)
            if found is not None or wanted["digest"] in self._failed:
                return found
            try:
                made = await self._build(spec, wanted)
            except errors.WarmcellError as error:
                log.warning("template %s cannot be kept as a snapshot: %s", spec.template, error)
                self._failed[wanted["digest"]] = error
                return None
            await self._replace(made, wanted)
            return made

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
        "home": spec.home,
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
