"""Which templates of a keeper have a process of their own."""

import asyncio
from collections.abc import Awaitable, Callable

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.shared_templates import SharedTemplate
from warmcell.sandbox.templates import identity


class SharedTemplates:
    """Those of one keeper."""

    def __init__(self, can_save: Callable[[SandboxSpec], Awaitable[bool]]) -> None:
        """`can_save` tells whether templates of a spec are kept as snapshots instead."""
        self._can_save = can_save
        self._open: dict[tuple[object, ...], SharedTemplate | None] = {}
        self._opening = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    async def of(self, spec: SandboxSpec, backend: SandboxBackend) -> SharedTemplate | None:
        """The template of sandboxes of that spec, which the caller follows before it awaits anything else.

        None where their kernels cannot come from a process that they share.
        """
        opener = getattr(backend, "nest", None)
        if opener is None or not spec.preload or await self._can_save(spec):
            return None
        key = await asyncio.to_thread(_digest, spec, backend), spec.mounts, spec.network
        async with self._opening:
            if key not in self._open:
                nest = await opener(spec)
                self._open[key] = None
                if nest is not None:
                    self._open[key] = SharedTemplate(nest, spec, left=lambda: self._on_left(key))
            return self._open[key]

    async def close(self) -> None:
        """End all of them."""
        for key in list(self._open):
            self._on_left(key)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _on_left(self, key: tuple[object, ...]) -> None:
        shared = self._open.pop(key, None)
        if shared is not None:
            task = asyncio.create_task(shared.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def _digest(spec: SandboxSpec, backend: SandboxBackend) -> str:
    return identity(spec, backend.fingerprint(spec))["digest"]
