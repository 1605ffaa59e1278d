"""Which of the helper's processes do a piece of work, and which hold a sandbox for as long as it lives."""

from __future__ import annotations

import mmap
import os

SLOTS = 4096


class Busy:
    """Shared by the main loop, which counts, and its workers, which each tell of themselves."""

    def __init__(self) -> None:
        self._long = mmap.mmap(-1, SLOTS)
        self._slots: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._own = -1
        self.alive, self._alive = os.pipe2(os.O_CLOEXEC)
        """A pipe that hangs up when what is held is to end: with the main loop, or when that says so."""

    def forked(self, uid: int = 0) -> int | None:
        """Fork a worker for a user: its process in the main loop, None in the worker."""
        slot = min({*range(len(self._slots) + 1)} - {*self._slots.values()})
        self._long[slot] = 0
        child = os.fork()
        if child:
            self._slots[child] = slot
            self._users[child] = uid
            return child
        self._own = slot
        os.close(self._alive)
        self._slots.clear()
        return None

    def for_long(self) -> None:
        """Told by a worker that will live as long as a sandbox does."""
        if self._own >= 0:
            self._long[self._own] = 1

    def ended(self, pid: int) -> None:
        """A worker is gone."""
        self._slots.pop(pid, None)
        self._users.pop(pid, None)

    def of_user(self, uid: int) -> int:
        """How many do a piece of work for one user."""
        return sum(not self._long[slot] for pid, slot in self._slots.items() if self._users[pid] == uid)

    def count(self) -> int:
        """How many are doing a piece of work."""
        return sum(not self._long[slot] for slot in self._slots.values())

    def is_full(self, most: int) -> bool:
        """Whether no more may be forked, with at most so many that do a piece of work."""
        return self.count() >= most or len(self._slots) >= SLOTS

    def holds(self) -> bool:
        """Whether any worker is left."""
        return bool(self._slots)

    def let_go(self) -> None:
        """What is held is to end."""
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
