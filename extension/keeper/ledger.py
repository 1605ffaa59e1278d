"""Which kernels Jupyter servers have, on disk: for the keeper that comes after this one.

It says what a server must know to make its sessions again, and which kernels no keeper has any more. A kernel is
lost if a keeper was killed while it ran, or could not save it when it was stopped. That is told to whoever starts the
next kernel of the same notebook, so that nobody takes a fresh kernel for the old one.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from warmcell.sandbox.errors import InvalidRequestError, SandboxDiedError
from warmcell.sandbox.models import ErrorInfo
from warmcell.sandbox.wire import Wire

log = logging.getLogger(__name__)

LOST_KEPT_S = 30 * 86400.0
"""For how long a lost kernel is remembered if its notebook is not opened."""

KILLED = "The kernel of this notebook is lost: the keeper that had it was killed, or the machine went down"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionNote(Wire):
    """A session of a Jupyter server as its page knows it. `path` is relative to the server's root."""

    id: str
    path: str
    name: str = ""
    type: str = "notebook"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelNote(Wire):
    """A kernel that a Jupyter server has, or had."""

    kernel_id: str
    server: str | None = None
    notebook: str | None = None
    session_name: str | None = None
    """What its code sees as JPY_SESSION_NAME."""
    kernel_name: str = ""
    sessions: tuple[SessionNote, ...] = ()
    owner: str = ""
    """The process that has it, as `owners.process_name` calls it. It may have ended since."""
    why: str = ""
    """Why it is lost; empty while it is not."""
    lost_at: float = 0.0
    kept: str = ""
    """A snapshot of what it was some time before it was lost."""
    kept_at: float = 0.0
    """When it was that, in Unix time."""


class Ledger:
    """Written at each change. Nothing breaks where it cannot be: then only less can be said after a crash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._present: dict[str, KernelNote] = {}
        self._before: dict[str, KernelNote] = {}
        """What the keeper before had, as far as it is neither taken up nor lost."""
        self._lost: dict[str, KernelNote] = {}
        self._is_written = False
        """The file says what is known here."""

    def open(self) -> None:
        """Read what the keeper before has left."""
        try:
            said = json.loads(self._path.read_text())
            notes = [KernelNote.from_json(note) for note in said["kernels"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, InvalidRequestError) as error:
            log.error("%s cannot be read, so what it tells of earlier kernels is not known: %s", self._path, error)
            return
        oldest = time.time() - LOST_KEPT_S
        self._before = {note.kernel_id: note for note in notes if not note.lost_at}
        self._lost = {note.kernel_id: note for note in notes if note.lost_at > oldest}

    def take_up(self, kernel_id: str) -> KernelNote | None:
        """This keeper has the kernel now; what was noted of it."""
        note = self._before.pop(kernel_id, None) or self._lost.pop(kernel_id, None)
        if note is not None:
            self._present[kernel_id] = replace(note, why="", lost_at=0.0, kept="", kept_at=0.0)
            self._is_written = False
        return note

    def misses(self, kernel_id: str) -> bool:
        """Whether the keeper before had this kernel, or an earlier one lost it, and this one has not taken it up."""
        return kernel_id in self._before or kernel_id in self._lost

    def keep(self, kernel_id: str, snapshot: str, at: float) -> None:
        """Whoever is told of its loss is told as well that this snapshot is left, of what it was then (Unix time)."""
        for notes in (self._present, self._before, self._lost):
            if kernel_id in notes:
                notes[kernel_id] = replace(notes[kernel_id], kept=snapshot, kept_at=at)
        self._write()

    def lose_rest(self) -> None:
        """All kernels of before that can be taken up are: the others are lost."""
        now = time.time()
        for note in self._before.values():
            log.warning(
                "kernel %s (%s) is lost: %s", note.kernel_id, note.notebook or "no notebook", note.why or KILLED
            )
            self._lost[note.kernel_id] = replace(note, why=note.why or KILLED, lost_at=now)
        self._before = {}
        self._write()

    def put(self, note: KernelNote) -> None:
        """The kernel is there, in this form; earlier ones of its notebook that were lost are told by now."""
        told = self._losses(note.kernel_id, note.server, note.notebook)
        if self._is_written and not told and self._present.get(note.kernel_id) == note:
            return
        self._present[note.kernel_id] = note
        for lost in told:
            del self._lost[lost.kernel_id]
        self._write()

    def lose(self, kernel_id: str, why: str) -> None:
        """Say in advance why it will be lost when this keeper ends, or why it cannot be taken up."""
        for notes in (self._present, self._before):
            if kernel_id in notes:
                notes[kernel_id] = replace(notes[kernel_id], why=f"The kernel of this notebook is lost: {why}")
        self._write()

    def drop(self, kernel_id: str) -> None:
        """It was ended, or its loss was told. Idempotent."""
        if self._present.pop(kernel_id, None) or self._lost.pop(kernel_id, None):
            self._write()

    def sessions(self, kernel_id: str) -> tuple[SessionNote, ...]:
        """The sessions that were noted of a kernel, also of one that is lost."""
        note = self._present.get(kernel_id) or self._lost.get(kernel_id)
        return () if note is None else note.sessions

    def lost(self) -> Sequence[KernelNote]:
        """Kernels that are no more although nobody ended them, as long as nobody was told."""
        return list(self._lost.values())

    def loss(self, kernel_id: str, server: str | None, notebook: str | None) -> ErrorInfo | None:
        """What whoever starts this kernel has to be told about the one before."""
        for lost in self._losses(kernel_id, server, notebook):
            hint, details = "Run its cells again.", {"kernel_id": lost.kernel_id}
            if lost.kept:
                then = time.strftime("%Y-%m-%d %H:%M", time.localtime(lost.kept_at))
                hint = f"Run its cells again, or go back to what it was at {then}: %restore {lost.kept}"
                details["snapshot"] = lost.kept
            error = SandboxDiedError(lost.why, hint=hint, details=details)
            return ErrorInfo.from_json(error.to_json())
        return None

    def _losses(self, kernel_id: str, server: str | None, notebook: str | None) -> list[KernelNote]:
        return [
            lost
            for lost in self._lost.values()
            if lost.kernel_id == kernel_id
            or (notebook is not None and (lost.server, lost.notebook) == (server, notebook))
        ]

    def _write(self) -> None:
        notes = [*self._present.values(), *self._before.values(), *self._lost.values()]
        draft = self._path.with_name(f"{self._path.name}.new")
        try:
            self._is_written = False
            if not notes:
                self._path.unlink(missing_ok=True)
                return
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump({"kernels": [note.to_json() for note in notes]}, file)
            draft.replace(self._path)
            self._is_written = True
        except OSError as error:
            log.error("%s cannot be written: %s", self._path, error)
