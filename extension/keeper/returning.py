"""Room for what the ranks of one sandbox bring back, where not all of it fits at a time."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from warmcell.extension.keeper.rank_steps import Step
from warmcell.sandbox.models import SandboxId

Execute = Callable[[Step], AsyncGenerator[dict[str, Any]]]
"""Messages of one request, last its reply."""


class Returning:
    """Files of one sandbox with what its cells bring back, on their way to whoever wants it."""

    def __init__(self) -> None:
        self.files: set[Path] = set()
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        """For the one who has all the room for itself."""
        self._under_way = 0
        """Cells that bring something back and have not ended: a part of it may take room already."""

    async def run(self, execute: Execute, step: Step, values: Path) -> AsyncGenerator[dict[str, Any]]:
        """A step that brings something back into that file; where it does not fit, once what is in the way has gone."""
        said: list[dict[str, Any]] = []
        """The end of it."""
        with self._writing():
            async with contextlib.aclosing(execute(step)) as messages:
                async for message in messages:
                    if said or message["msg_type"] == "reply" or _is_no_room(message):
                        said.append(message)
                    else:
                        yield message
        if _no_room(said):
            async with self._turn:
                while _no_room(said):
                    await self._emptied()
                    alone = not self._under_way
                    said = [message async for message in execute(step.again)]
                    if alone and not self.files:  # Nobody was in the way.
                        break
                    if _no_room(said):
                        await self._quiet()
        if said[-1]["content"]["status"] == "ok":
            self.files.add(values)
        for message in said:
            yield message

    def gone(self, values: Path) -> None:
        """That file is no more. Idempotent."""
        if values in self.files:
            self.files.remove(values)
            self._changed.set()

    async def _emptied(self) -> None:
        """Wait until there are none."""
        while self.files:
            self._changed.clear()
            await self._changed.wait()

    async def _quiet(self) -> None:
        """Wait until no cell is under way."""
        while self._under_way:
            self._changed.clear()
            await self._changed.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One is under way."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._changed.set()


class Room:
    """That of all sandboxes."""

    def __init__(self) -> None:
        self._returning: dict[SandboxId, Returning] = {}

    def of(self, sandbox_id: SandboxId) -> Returning:
        """That of one."""
        return self._returning.setdefault(sandbox_id, Returning())

    def returned(self, sandbox_id: SandboxId, values: Path) -> None:
        """What came back has gone on, or nobody wants it: its file, or what there is of it, is removed."""
        for path in (values, values.with_name(f"{values.name}.part")):
            with contextlib.suppress(OSError):  # Whatever the guest has put there stays in its sandbox.
                path.unlink()
        returning = self._returning.get(sandbox_id)
        if returning is not None:
            returning.gone(values)

    def forget(self, sandbox_id: SandboxId) -> None:
        """That sandbox has ended. Idempotent."""
        self._returning.pop(sandbox_id, None)


def _no_room(said: Sequence[Mapping[str, Any]]) -> bool:
    return any(map(_is_no_room, said))


def _is_no_room(one: Mapping[str, Any]) -> bool:
    return one.get("step") == "dump" and one["content"].get("ename") == "NoRoomError"
