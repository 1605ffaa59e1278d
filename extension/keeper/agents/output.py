"""What a command or a run says, kept in numbered entries: for those who follow it, and those who come back later."""

import asyncio
import contextlib
import itertools
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from warmcell.extension.keeper.agents.shown import believed, note

KEPT_BYTES = 8 * 2**20
"""Of entries as they go over the wire. Older ones are dropped, once those who follow have them."""

ENTRY_MAX_BYTES = 16 * 2**20
"""Of one entry, which is in memory as a whole. A larger one is told and left out."""

PIECE_BYTES = 256 * 1024
"""Some so much goes to a follower at a time."""

STALLED_S = 60.0
"""Whoever reads nothing for so long is waited for no longer, and learns how much was missed."""

ENDED_KEPT = 64
ENDED_KEPT_BYTES = 32 * 2**20
"""Of what has ended in one sandbox. What ended first loses its output first; what ended last never does."""

ENDED_REMEMBERED = 1000
"""How many of those are known further by their id, so that a request that is repeated does not begin them again."""

KEEPALIVE_S = 10.0
"""An empty line this often shows both sides that the other is there."""


@dataclass(eq=False)
class _Follower:
    at: int
    moved: float


class Output:
    """Entries from number `first` on. Its writer waits for followers, as a pipe's does; without any it never waits."""

    def __init__(self, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._followers: set[_Follower] = set()
        self._expected = 0
        self._changed = asyncio.Event()
        self.first = 0
        self.deserted_since: float | None = time.monotonic()
        """Monotonic time since when nobody follows; None while somebody does."""
        self.ended = False
        self.forgotten = False
        """Whether nothing of it is kept but how much there was."""

    @classmethod
    def left_of(cls, output: "Output") -> "Output":
        """What is remembered of one that has ended; who follows that goes on to its end."""
        left = cls()
        left.first, left.ended, left.forgotten = output.next, True, True
        return left

    @property
    def size_bytes(self) -> int:
        """What is kept of it."""
        return self._size

    @property
    def next(self) -> int:
        """The number that the next entry gets; how many there have been so far."""
        return self.first + len(self._lines)

    async def put(self, entry: Mapping[str, Any]) -> None:
        """Add an entry, a kernel's message or our own, when those who follow have read enough of what is there."""
        try:
            line = self._line(believed(entry) if "msg_type" in entry else entry)
        except (ValueError, RecursionError):  # What is no number is no JSON either.
            line = self._line(note(f"[a {entry.get('msg_type')} that is no JSON is left out]\n"))
        if len(line) > ENTRY_MAX_BYTES:
            line = self._line(_left_out(entry, len(line)))
        while self._size and self._size + len(line) > self._kept_bytes:
            if not self._awaited():
                self._size -= len(self._lines.popleft())
                self.first += 1
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STALLED_S):
                    await self._changed.wait()
        self._lines.append(line)
        self._size += len(line)
        self._tell()

    def end(self) -> None:
        """Nothing comes any more. Idempotent."""
        self.ended = True
        self._tell()

    async def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, at once or within that time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.ended:
                    await self._changed.wait()
        return self.ended

    async def changed(self) -> None:
        """Wait until anything is new: an entry, the end, or who follows."""
        await self._changed.wait()

    async def follow(self, start: int = 0) -> AsyncGenerator[bytes]:
        """Entries from number `start` on as lines of JSON, as they come, several at a time, until the end.

        What is no longer there is told as `{"lost": count}`. An empty object says that nothing is new.
        """
        with self._following(min(max(0, start), self.next)) as follower:
            while True:
                lines, until = self._after(follower.at)
                if lines:
                    yield lines
                    follower.at, follower.moved = until, time.monotonic()  # Who asks for more has these.
                    self._tell()
                elif self.ended:
                    return
                else:
                    try:
                        async with asyncio.timeout(KEEPALIVE_S):
                            await self._changed.wait()
                    except TimeoutError:
                        yield b"{}\n"
                        follower.moved = time.monotonic()

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Within this it is not deserted, though nobody may follow it yet: somebody is about to, on a busy machine."""
        self._expected += 1
        self.deserted_since = None
        try:
            yield
        finally:
            self._expected -= 1
            self._perhaps_deserted()

    def present(self, start: int = 0) -> tuple[bytes, int]:
        """Entries from number `start` on that are there now, some 256 KiB of them at most, and the number after."""
        return self._after(min(max(0, start), self.next))

    def _line(self, entry: Mapping[str, Any]) -> bytes:
        return json.dumps({"n": self.next, **entry}, default=str, allow_nan=False).encode() + b"\n"

    def _after(self, at: int) -> tuple[bytes, int]:
        lines: list[bytes] = []
        if at < self.first:
            lines.append(json.dumps({"lost": self.first - at}).encode() + b"\n")
            at = self.first
        size = 0
        for line in itertools.islice(self._lines, at - self.first, None):
            lines.append(line)
            at += 1
            size += len(line)
            if size >= PIECE_BYTES:
                break
        return b"".join(lines), at

    @contextlib.contextmanager
    def _following(self, start: int) -> Iterator[_Follower]:
        follower = _Follower(start, time.monotonic())
        self._followers.add(follower)
        self.deserted_since = None
        self._tell()
        try:
            yield follower
        finally:
            self._followers.discard(follower)
            self._perhaps_deserted()

    def _perhaps_deserted(self) -> None:
        if not self._followers and not self._expected:
            self.deserted_since = time.monotonic()
        self._tell()

    def _awaited(self) -> bool:
        """Whether somebody who still reads has not read the oldest entry."""
        now = time.monotonic()
        return any(one.at <= self.first and now - one.moved < STALLED_S for one in self._followers)

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Said(Protocol):
    """A command or a run."""

    id: str
    output: Output
    ended_at: float | None


Item = TypeVar("Item", bound=Said)


def forget_oldest(known: dict[str, Item]) -> None:
    """Let go of the output of what ended first, where those that ended are too many or have said too much."""
    ended = sorted((one for one in known.values() if one.output.ended), key=lambda one: one.ended_at or 0.0)
    kept = [one for one in ended if not one.output.forgotten]
    size = sum(one.output.size_bytes for one in kept)
    while len(kept) > 1 and (len(kept) > ENDED_KEPT or size > ENDED_KEPT_BYTES):
        first = kept.pop(0)
        size -= first.output.size_bytes
        first.output = Output.left_of(first.output)
    for one in ended[:-ENDED_REMEMBERED]:
        del known[one.id]


def _left_out(entry: Mapping[str, Any], size_bytes: int) -> dict[str, Any]:
    kind, mib = entry.get("msg_type", "piece of output"), 2**20
    return note(
        f"[a {kind} of {size_bytes / mib:.0f} MiB is left out: at most {ENTRY_MAX_BYTES // mib} MiB are kept of one. "
        "Write it to a file.]\n"
    )
