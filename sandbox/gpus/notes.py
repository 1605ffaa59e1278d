"""What the files of the lease directory say: who holds, and who waits. True only as far as their writers are."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.gpus.allocator import Use
from warmcell.sandbox.gpus.processes import user_name, user_of
from warmcell.sandbox.gpus.queue import Ticket
from warmcell.sandbox.gpus.requests import parse

_LONGEST = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """What a held lease says about its holder. Written by the holder, so true only as far as it is."""

    pid: int
    uid: int
    sandbox_id: str
    since: float
    """Unix time of the grant, in seconds."""
    parts: int = 1
    """What it has is one of so many shares of the device; 1: all of it."""

    def to_json(self, *, mine: bool) -> dict[str, Any]:
        """The wire form; `mine` says whether it is a sandbox of the keeper that is asked."""
        return {
            "sandbox_id": self.sandbox_id,
            "since": self.since,
            "mine": mine,
            "user": user_name(self.uid) if self.pid else "",
            "pid": self.pid,
            "parts": self.parts,
        }

    def __str__(self) -> str:
        if self.pid == os.getpid():
            return f"sandbox {self.sandbox_id}"
        if not self.pid:
            return "somebody unknown"
        return f"sandbox {self.sandbox_id} of user {user_name(self.uid)} (keeper {self.pid})"


NOBODY_KNOWN = Holder(pid=0, uid=0, sandbox_id="", since=0.0)
"""The holder of a locked file that says nothing readable."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What the directory said in one moment."""

    holders: dict[str, tuple[Holder, ...]]
    """UUID of each device of which something is taken, to who has that."""
    tickets: tuple[Ticket, ...] = ()
    """Who waits, in the order in which they came."""
    staying: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """UUID of a device, to processes that are parked, have no lease, and are not off it."""

    @property
    def uses(self) -> dict[str, Use]:
        """What is taken of each device."""
        return {uuid: _use(found) for uuid, found in self.holders.items()}


def read_holder(descriptor: int, *, parts: int = 1) -> Holder:
    """Whoever holds this file; somebody unknown where that cannot be read."""
    try:
        note = json.loads(os.pread(descriptor, _LONGEST, 0))
        return Holder(
            pid=int(note["pid"]),
            uid=int(note["uid"]),
            sandbox_id=str(note["sandbox_id"])[:64],
            since=float(note["since"]),
            parts=parts,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return dataclasses.replace(NOBODY_KNOWN, parts=parts)


def read_staying(descriptor: int) -> frozenset[int]:
    """The processes that this file names, as far as they are of whoever wrote it; none where it cannot be read.

    Anybody may write one, and must not have other users' programs pass for parked by it.
    """
    try:
        writer = os.fstat(descriptor).st_uid
        named = frozenset(int(pid) for pid in json.loads(os.pread(descriptor, _LONGEST, 0))["stay"])
        return named if writer == 0 else frozenset(pid for pid in named if user_of(pid) == writer)
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def read_ticket(descriptor: int, number: int) -> Ticket | None:
    """None where it cannot be read: a place in the queue that says not what for is none."""
    try:
        note = json.loads(os.pread(descriptor, _LONGEST, 0))
        return Ticket(
            number=number,
            request=parse(note["request"]),
            sandbox_id=str(note["sandbox_id"])[:64],
            pid=int(note["pid"]),
            uid=os.fstat(descriptor).st_uid,
            since=float(note["since"]),
        )
    except (OSError, ValueError, KeyError, TypeError, InvalidRequestError):
        return None


def _use(holders: Sequence[Holder]) -> Use:
    return Use(" and ".join(map(str, holders)), holders[0].parts, len(holders))
