"""Prepared sandboxes: up, with their template imported, waiting for the next kernel of that shape.

The pool keeps at most `per_template` of each shape in use and never holds more than `cap_bytes` of
memory; the shape that was asked for longest ago goes first.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.lifecycle import State
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
    ) -> None:
        """`make` brings up a sandbox and waits until its template is settled."""
        self._make = make
        self._per_template = per_template
        self._cap_bytes = cap_bytes
        self._ready: dict[Shape, list[LiveSandbox]] = {}
        """In the order in which shapes were last asked for."""
        self._filling: dict[Shape, asyncio.Task[None]] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._closed = False

    def prepared(self) -> Sequence[LiveSandbox]:
        """Those that wait now."""
        return [box for boxes in self._ready.values() for box in boxes]

    def take(self, shape: Shape) -> LiveSandbox | None:
        """A prepared sandbox of that shape, no longer the pool's; None if there is none."""
        boxes = self._ready.get(shape, [])
        while boxes:
            box = boxes.pop()
            if box.info.state is State.RUNNING and box.info.template and box.info.template.state == "ready":
                return box
            log.warning("prepared sandbox %s was no longer good: %s", box.info.id, box.info.state)
            task = asyncio.create_task(box.stop())
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)
        return None

    def want(self, spec: SandboxSpec) -> None:
        """Have sandboxes of this shape ready soon; returns at once."""
        shape = spec.shape()
        if self._closed or not spec.preload or self._per_template == 0:
            return
        self._ready[shape] = self._ready.pop(shape, [])
        if shape not in self._filling:
            task = asyncio.create_task(self._fill(shape, spec))
            self._filling[shape] = task
            task.add_done_callback(lambda _: self._filling.pop(shape, None))

    async def close(self) -> None:
        """Stop all of them."""
        self._closed = True
        filling = list(self._filling.values())
        for task in filling:
            task.cancel()
        await asyncio.gather(*filling, return_exceptions=True)
        boxes = list(self.prepared())
        self._ready.clear()
        await asyncio.gather(*(box.stop() for box in boxes), *self._stopping)

    async def _fill(self, shape: Shape, spec: SandboxSpec) -> None:
        while len(self._ready.get(shape, [])) < self._per_template:
            try:
                box = await self._make(spec)
            except WarmcellError as error:
                log.warning("no sandbox could be prepared for template %s: %s", spec.template, error)
                return
            if box.info.template is None or box.info.template.state != "ready":
                log.warning("template %s did not become ready; nothing is kept prepared for it", spec.template)
                await box.stop()
                return
            self._ready.setdefault(shape, []).append(box)
            if not await self._make_room(keep=shape):
                return

    async def _make_room(self, *, keep: Shape) -> bool:
        """Stop prepared sandboxes until the cap holds, the least recently wanted first; whether `keep` was spared."""
        while await asyncio.to_thread(self._bytes) > self._cap_bytes:
            shape = next((shape for shape, boxes in self._ready.items() if boxes), None)
            if shape is None:
                return True
            box = self._ready[shape].pop()
            log.info("prepared sandbox %s goes: the pool's cap of %d bytes is reached", box.info.id, self._cap_bytes)
            await box.stop()
            if shape == keep:
                return False
        return True

    def _bytes(self) -> int:
        return sum(memory_bytes(box.processes) for box in self.prepared())


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
