"""Prepared sandboxes: up, with their template imported, waiting for the next kernel of that shape.

The pool keeps at most `per_template` of each shape in use and never holds more than `cap_bytes` of
memory; the shape that was asked for longest ago goes first.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxSpec

log = logging.getLogger(__name__)

Shape = tuple[object, ...]


class WarmPool:
    """Owns the prepared sandboxes of one keeper."""

    def __init__(
        self,
        make: Callable[[SandboxSpec], Awaitable[LiveSandbox]],
        *,
        per_template: int,
        cap_bytes: int,
        changed: Callable[[LiveSandbox], None] = lambda box: None,
        measure: Callable[[LiveSandbox], int] = lambda box: memory_bytes(box.processes),
    ) -> None:
        """`make` brings up a sandbox and waits until its template is settled.

        Args:
            make: Raises `WarmcellError` where it cannot.
            per_template: Most sandboxes of one shape.
            cap_bytes: Most memory of all together.
            changed: Told of a sandbox that has joined the pool or has left it.
            measure: Memory of one in bytes; runs in a thread.
        """
        self._make = make
        self._per_template = per_template
        self._cap_bytes = cap_bytes
        self._changed = changed
        self._measure = measure
        self._ready: dict[Shape, list[LiveSandbox]] = {}
        """In the order in which shapes were last asked for."""
        self._filling: dict[Shape, asyncio.Task[None]] = {}
        self._too_large: set[Shape] = set()
        """One alone is more than the cap."""
        self._making_room = asyncio.Lock()
        self._watchers: dict[LiveSandbox, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def prepared(self) -> Sequence[LiveSandbox]:
        """Those that wait now."""
        return [box for boxes in self._ready.values() for box in boxes]

    def take(self, shape: Shape) -> LiveSandbox | None:
        """A prepared sandbox of that shape, no longer the pool's; None if there is none."""
        while (box := self._leave(shape)) is not None:
            if box.prepared:
                return box
            log.warning("prepared sandbox %s was no longer good: %s", box.info.id, box.info.state)
            self._spawn(box.stop())
        return None

    def want(self, spec: SandboxSpec) -> None:
        """Have sandboxes of this shape ready soon; returns at once."""
        shape = spec.shape()
        if self._closed or not spec.preload or self._per_template == 0 or shape in self._too_large:
            return
        self._ready[shape] = self._ready.pop(shape, [])
        if shape not in self._filling:
            task = self._filling[shape] = self._spawn(self._fill(shape, spec))
            task.add_done_callback(lambda _: self._filling.pop(shape, None))

    async def close(self) -> None:
        """Stop all of them."""
        self._closed = True
        for task in self._filling.values():
            task.cancel()
        await asyncio.gather(*self._filling.values(), return_exceptions=True)
        for shape in list(self._ready):
            while (box := self._leave(shape)) is not None:
                self._spawn(box.stop())
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _fill(self, shape: Shape, spec: SandboxSpec) -> None:
        while len(self._ready.get(shape, ())) < self._per_template:
            try:
                box = await self._make(spec)
            except WarmcellError as error:
                log.warning("no sandbox could be prepared for template %s: %s", spec.template, error)
                return
            if not box.prepared:
                log.warning("template %s did not become ready; nothing is kept prepared for it", spec.template)
                await box.stop()
                return
            self._ready.setdefault(shape, []).append(box)
            self._watchers[box] = self._spawn(self._watch(shape, box))
            self._changed(box)
            if not await self._make_room(keep=shape):
                return

    def _leave(self, shape: Shape) -> LiveSandbox | None:
        """The latest of that shape, no longer the pool's."""
        boxes = self._ready.get(shape)
        if not boxes:
            return None
        box = boxes.pop()
        watcher = self._watchers.pop(box, None)
        if watcher is not None:
            watcher.cancel()
        self._changed(box)
        return box

    async def _watch(self, shape: Shape, box: LiveSandbox) -> None:
        """One that ends while it waits leaves nothing behind."""
        await box.ended.wait()
        del self._watchers[box]
        self._ready[shape].remove(box)
        self._changed(box)
        await box.stop()

    async def _make_room(self, *, keep: Shape) -> bool:
        """Stop prepared sandboxes until the cap holds, the least recently wanted first; whether `keep` was spared."""
        async with self._making_room:
            while await asyncio.to_thread(self._bytes, self.prepared()) > self._cap_bytes:
                shape = next((shape for shape, boxes in self._ready.items() if boxes), None)
                if shape is None:
                    return True
                alone = len(self.prepared()) == 1
                box = self._leave(shape)
                assert box is not None
                log.info("prepared sandbox %s goes: the cap of %d bytes is reached", box.info.id, self._cap_bytes)
                if alone:
                    self._too_large.add(shape)
                    log.warning(
                        "template %s alone needs more than c.Warmcell.prepared_memory; nothing is prepared for it",
                        box.spec.template,
                    )
                await box.stop()
                if shape == keep:
                    return False
            return True

    def _bytes(self, boxes: Sequence[LiveSandbox]) -> int:
        return sum(self._measure(box) for box in boxes)

    def _spawn(self, what: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("preparing sandboxes failed", exc_info=task.exception())


def memory_bytes(pids: Sequence[int]) -> int:
    """Proportional set size of these processes: shared pages count by the share of each."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024
    return total
