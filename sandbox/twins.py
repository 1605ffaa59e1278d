"""Sandboxes that wait for kernels to come back: up, with the files of the snapshot, and no process but their first.

To make one is half of what a resume takes. So whoever was suspended a short while ago, or is looked at by a page, has
one ready: few of them, for some minutes, and none that would need a GPU. Where images are of whole sandboxes, what
waits stands by for any of them, so who runs has one ready as well once it has a snapshot to be put back to.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxSpec, SnapshotId

log = logging.getLogger(__name__)

MOST = 4
"""So many wait at once; who was suspended or looked at longest ago loses its own first."""

KEPT_S = 600.0
"""So long one waits."""


class _Waiting:
    """One that is to come, or is there."""

    def __init__(self, spec: SandboxSpec, snapshot: SnapshotId | None) -> None:
        self.spec = spec
        self.snapshot = snapshot
        """Whose files it has; None: of any."""
        self.places: tuple[object, ...] = ()
        """What it has of the machine's files, as they were."""
        self.begun = False
        self.taken = False
        self.made: asyncio.Future[LiveSandbox | None] = asyncio.get_running_loop().create_future()
        self.patience: asyncio.Timeout | None = None
        self.task: asyncio.Task[None] | None = None


class Twins:
    """Owns those that wait. On one loop."""

    def __init__(
        self,
        make: Callable[[LiveSandbox, SnapshotId | None], Awaitable[LiveSandbox]],
        *,
        layer_of: Callable[[SnapshotId], Path],
        most: int = MOST,
        kept_s: float = KEPT_S,
    ) -> None:
        """Nothing is made yet.

        Args:
            make: Brings up a sandbox like this one, with a snapshot's files if there is one; raises `WarmcellError`.
            layer_of: Where the files of a snapshot are.
            most: So many wait at once. 0: none ever.
            kept_s: Seconds that one waits.
        """
        self.may: Callable[[], Awaitable[bool]] = _always
        """Awaited before one is made: whether there is room for it, when nothing more urgent is under way."""
        self._make = make
        self._layer_of = layer_of
        self._most = most
        self._kept_s = kept_s
        self._waiting: dict[SandboxId, _Waiting] = {}
        """In the order in which they were last wanted."""
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def boxes(self) -> list[LiveSandbox]:
        """Those that are up."""
        found = (one.made.result() for one in self._waiting.values() if one.made.done())
        return [box for box in found if box is not None]

    def want(self, box: LiveSandbox) -> None:
        """Have one ready soon for a sandbox that is suspended, or may be put back; returns at once."""
        suspended = box.info.state is State.SUSPENDED
        snapshot = box.info.snapshot if suspended else None
        if self._closed or self._most == 0 or (suspended and snapshot is None):
            return
        if box.spec.gpu is not None:  # Which one it will have is not known before.
            return
        one = self._waiting.pop(box.info.id, None)
        if one is None:
            one = _Waiting(box.spec, snapshot)
            one.task = self._spawn(self._wait(box, one))
        elif one.patience is not None:
            one.patience.reschedule(asyncio.get_running_loop().time() + self._kept_s)
        self._waiting[box.info.id] = one
        while len(self._waiting) > self._most:
            self._end(next(iter(self._waiting)))

    async def take(self, box: LiveSandbox, snapshot: SnapshotId) -> LiveSandbox | None:
        """The one that waits for it, which is the caller's from now on; None where there is none that fits still."""
        one = self._waiting.get(box.info.id)
        if one is None or not one.begun:
            self._end(box.info.id)
            return None
        made = await asyncio.shield(one.made)
        now = await self._places(box.spec, one.snapshot)
        if made is None or self._waiting.get(box.info.id) is not one:
            return None
        if one.snapshot not in (None, snapshot) or (one.spec, one.places) != (box.spec, now):
            log.info("what waits for sandbox %s goes: something of it has changed", box.info.id)
            self._end(box.info.id)
            return None
        one.taken = True
        self._end(box.info.id)
        return made

    async def drop(self, sandbox_id: SandboxId) -> None:
        """Remove the one that waits for this sandbox, if there is one."""
        task = self._end(sandbox_id)
        if task is not None:
            await asyncio.wait({task})

    async def shrink(self) -> bool:
        """Remove all, as the machine lacks memory; whether there was any."""
        found = bool(self._waiting)
        await asyncio.gather(*(self.drop(one) for one in list(self._waiting)))
        return found

    async def close(self) -> None:
        """Remove all, and make no more. Idempotent."""
        self._closed = True
        await self.shrink()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait(self, box: LiveSandbox, one: _Waiting) -> None:
        """The life of one: from its making until its time is over, it ends by itself, or is taken."""
        try:
            if not await self.may():
                return
            async with self._one_at_a_time:
                one.begun = True
                one.places = await self._places(one.spec, one.snapshot)
                made = await self._make(box, one.snapshot)
                if made.instance.stands_by and one.snapshot is not None:
                    one.snapshot, one.places = None, one.places[1:]
                one.made.set_result(made)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._kept_s) as one.patience:
                    await made.instance.wait()
        except WarmcellError as error:  # Who has it resumed will be told.
            log.debug("nothing waits for sandbox %s: %s", box.info.id, error)
        finally:
            if self._waiting.get(box.info.id) is one:
                del self._waiting[box.info.id]
            if not one.made.done():
                one.made.set_result(None)
            elif (left := one.made.result()) is not None and not one.taken:
                await left.discard()

    async def _places(self, spec: SandboxSpec, snapshot: SnapshotId | None) -> tuple[object, ...]:
        return await asyncio.to_thread(_places, spec, None if snapshot is None else self._layer_of(snapshot))

    def _end(self, sandbox_id: SandboxId) -> "asyncio.Task[None] | None":
        """Have it go; the task that sees to that."""
        one = self._waiting.pop(sandbox_id, None)
        if one is None or one.task is None:
            return None
        one.task.cancel()
        return one.task

    def _spawn(self, what: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a sandbox that was to wait for a resume", exc_info=task.exception())


async def _always() -> bool:
    return True


def _places(spec: SandboxSpec, layer: Path | None) -> tuple[object, ...]:
    """Which files of the machine a sandbox of this spec would have now: a folder that was replaced is another one."""
    workspace = [spec.workspace.path] if spec.workspace is not None and spec.workspace.mode != "none" else []
    files = [] if layer is None else [str(layer)]
    paths = [*files, str(Path(spec.python).parent.parent), *workspace, *(mount.source for mount in spec.mounts)]
    return tuple(map(_identity, paths))


def _identity(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
