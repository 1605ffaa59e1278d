"""Which templates of a keeper have a process of their own."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol, runtime_checkable

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.shared_templates import Nest, SharedTemplate
from warmcell.sandbox.templates import identity

RETRY_S = 60.0
"""For so long nobody tries again to have a process where there could be none: what was in the way may have gone."""


@runtime_checkable
class Nesting(Protocol):
    """A backend that makes nests; `backends.bubblewrap.BubblewrapBackend` is one."""

    async def may_share(self, spec: SandboxSpec) -> bool: ...
    async def nest(self, spec: SandboxSpec) -> Nest | None: ...


class SharedTemplates:
    """Those of one keeper."""

    def __init__(
        self, can_save: Callable[[SandboxSpec], Awaitable[bool]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`can_save` tells whether templates of a spec are kept as snapshots instead."""
        self._can_save = can_save
        self._clock = clock
        self._open: dict[tuple[object, ...], SharedTemplate] = {}
        self._refused: dict[tuple[object, ...], float] = {}
        """Until when nobody tries again."""
        self._opening = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    async def of(self, spec: SandboxSpec, backend: SandboxBackend) -> SharedTemplate | None:
        """The template of sandboxes of that spec, which the caller follows before it awaits anything else.

        None where their kernels cannot come from a process that they share.
        """
        if not isinstance(backend, Nesting) or not spec.preload or await self._can_save(spec):
            return None
        if not await backend.may_share(spec):  # Others of the same key may.
            return None
        key = await asyncio.to_thread(_digest, spec, backend), spec.mounts, spec.network
        async with self._opening:
            if key not in self._open and self._clock() >= self._refused.get(key, 0.0):
                nest = await backend.nest(spec)
                if nest is None:
                    self._refused[key] = self._clock() + RETRY_S
                else:
                    self._open[key] = SharedTemplate(nest, spec, left=lambda: self._on_left(key))
            return self._open.get(key)

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
