"""What remote cells show: one rank's as it comes, that of several in a group for each."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .board import DISPLAYS, Board
from .groups import UPDATE_S, Groups
from .widgets import COMMS, VIEW, Models

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

PAUSE_S = 5.0
"""Whoever has heard of no progress for that long takes the next for another beginning."""

SHOWN_AFTER_S = 1.0
"""What is sent, or comes back, in less has no bar."""

SUMMARY_S = 2.0
"""What one rank without a GPU has done sooner needs no sum."""

TEXT_MAX_BYTES = 16 * 2**20
"""Text of one rank that is shown as it comes; what is beyond is left out, and counted."""


class Stream:
    """One rank: text, pictures and updates as if the cell ran here."""

    def __init__(self, shell: InteractiveShell, board: Board | None = None) -> None:
        """Show it in `shell`; `board`, if there is one, has what was done."""
        self._shell = shell
        self._board = board
        self._left = TEXT_MAX_BYTES
        self._dropped = 0
        self._models = Models()
        self._widgets: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
        """What is displayed of them: under which id, what came, and what was shown of it last."""
        self._changed = False
        self._at = 0.0

    def begin(self, rank: int, label: str) -> None:
        """Nothing to be said."""

    def message(self, rank: int, message: Mapping[str, Any]) -> None:
        """Show it."""
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            stream = sys.stderr if content.get("name") == "stderr" else sys.stdout
            stream.write(self._bounded(str(content.get("text", ""))))
        elif kind in COMMS:
            self._changed = self._models.hear(message) or self._changed
            self.tick()
        elif kind == "clear_output":
            self._widgets = {}
            self._shell.display_pub.clear_output(wait=bool(content.get("wait")))  # type: ignore[no-untyped-call]
        elif kind in DISPLAYS:
            self._display(content, update=kind == "update_display_data")

    def end(self, rank: int, failed: str) -> None:
        """Say what was left out."""
        self._show_widgets()
        if self._dropped:
            sys.stdout.write(f"\n[{self._dropped} more characters of output are not shown]\n")
            self._dropped = 0

    def tick(self) -> None:
        """Show what was printed, and how widgets have changed, not too often."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._changed and time.monotonic() - self._at >= UPDATE_S:
            self._show_widgets()

    def close(self, summary: str) -> None:
        """The sum of it, where it took long or held a GPU."""
        if self._board is not None and (self._board.gpus_each or self._board.seconds >= SUMMARY_S):
            self._shell.display_pub.publish({"text/plain": f"Remote: {summary}"})

    def _display(self, content: Mapping[str, Any], *, update: bool) -> None:
        came = content.get("data", {})
        shown, transient = self._models.bundle(came), dict(content.get("transient", {}))
        if VIEW in came and not update:
            transient.setdefault("display_id", f"warmcell-{id(self):x}-{time.monotonic_ns():x}")
            self._widgets[transient["display_id"]] = (came, shown)
        self._shell.display_pub.publish(shown, content.get("metadata", {}), transient=transient, update=update)

    def _show_widgets(self) -> None:
        self._changed, self._at = False, time.monotonic()
        for display_id, (came, before) in self._widgets.items():
            shown = self._models.bundle(came)
            if shown != before:
                self._widgets[display_id] = (came, shown)
                self._shell.display_pub.publish(shown, transient={"display_id": display_id}, update=True)

    def _bounded(self, text: str) -> str:
        kept = text[: max(0, self._left)]
        self._left -= len(text)
        self._dropped += len(text) - len(kept)
        return kept


class Lines:
    """Several ranks in a terminal, which cannot change what it has shown: each line with its rank in front."""

    def __init__(self, ranks: int) -> None:
        self._begun = [""] * ranks

    def begin(self, rank: int, label: str) -> None:
        """Nothing to be said."""

    def message(self, rank: int, message: Mapping[str, Any]) -> None:
        """Show its lines as they are whole."""
        content = message["content"]
        text = content.get("text") if message["msg_type"] == "stream" else None
        if text is None and message["msg_type"] in DISPLAYS:
            text = str(content.get("data", {}).get("text/plain", "")) + "\n"
        *lines, self._begun[rank] = (self._begun[rank] + (text or "")).split("\n")
        sys.stdout.write("".join(f"[{rank}] {line}\n" for line in lines))

    def end(self, rank: int, failed: str) -> None:
        """Show a line that was not ended."""
        if self._begun[rank]:
            sys.stdout.write(f"[{rank}] {self._begun[rank]}\n")
            self._begun[rank] = ""
        sys.stdout.flush()

    def tick(self) -> None:
        """Nothing waits."""

    def close(self, summary: str) -> None:
        """The last word."""
        sys.stdout.write(f"{summary}\n")


def of(shell: InteractiveShell, board: Board) -> Any:
    """Where a cell is shown whose ranks have this board."""
    ranks = len(board.groups)
    if ranks == 1:
        return Stream(shell, board)
    return Groups(shell, board) if getattr(shell, "kernel", None) is not None else Lines(ranks)


class Display:
    """A display that changes, of one cell; where there is no notebook there is none."""

    def __init__(self, shell: InteractiveShell | None, cell: Mapping[str, Any] | None = None) -> None:
        """`cell` is the request of the cell that has it, also when that has ended; None: the one that runs."""
        self._publisher: Any = None if shell is None or getattr(shell, "kernel", None) is None else shell.display_pub
        self._cell = cell
        self._id = f"warmcell-{id(self):x}-{time.monotonic_ns():x}"
        self._shown = False

    def __bool__(self) -> bool:
        """Whether there is one."""
        return self._publisher is not None

    def show(self, data: Mapping[str, Any]) -> None:
        """Show this in the place of what it has shown."""
        update, self._shown = self._shown, True
        transient = {"display_id": self._id}
        if not self._cell:
            self._publisher.publish(dict(data), transient=transient, update=update)
            return
        kind = "update_display_data" if update else "display_data"
        content = {"data": dict(data), "metadata": {}, "transient": transient}
        ours = self._publisher
        ours.session.send(ours.pub_socket, kind, content, parent=self._cell, ident=ours.topic)


class Waiting:
    """Where a cell stands in the queue for its GPUs, while it does."""

    def __init__(self, shell: InteractiveShell | None, cell: Mapping[str, Any] | None = None) -> None:
        """Shown as `Display` is; elsewhere a line on stderr."""
        self._display = Display(shell, cell)
        self._began = time.monotonic()
        self._said = ""

    def __call__(self, place: Mapping[str, Any]) -> None:
        """It is there now, as a QueuePlace; nothing in it: in none."""
        if place:
            minutes = place.get("estimate_s")
            about = "" if minutes is None else f", about {max(1, round(minutes / 60))} min"
            why = f" ({place['why']})" if place.get("why") else ""
            self._say(f"Waiting for {place['request']}: place {place['place']} of {place['length']}{about}{why}")

    def close(self) -> None:
        """It waits no longer."""
        if self._said:
            self._say(f"Waited {time.monotonic() - self._began:.0f} s for GPUs")

    def _say(self, words: str) -> None:
        if words == self._said:
            return
        self._said = words
        if self._display:
            self._display.show({"text/plain": words})
        else:
            sys.stderr.write(f"{words}\n")


class Progress:
    """How much of what is sent has gone, or of what comes back has come: shown once that takes more than a second.

    In a notebook it is a display; elsewhere a line of a terminal, and in a file nothing.
    """

    def __init__(
        self, shell: InteractiveShell | None, doing: str = "Sending", cell: Mapping[str, Any] | None = None
    ) -> None:
        """Shown as `Display` is."""
        self._display = Display(shell, cell)
        self._doing = doing
        self._began = self._told = -PAUSE_S
        self._at = 0.0

    def __call__(self, sent: int, total: int) -> None:
        """So many bytes of so many."""
        now = time.monotonic()
        if now - self._told >= PAUSE_S:
            self._began = now
        self._told = now
        if now - self._began < SHOWN_AFTER_S or (now - self._at < UPDATE_S and sent < total):
            return
        self._at = now
        part = sent / total if total else 1.0
        words = f"{self._doing}: {sent / 2**20:,.0f} of {total / 2**20:,.0f} MiB"
        if self._display:
            self._display.show({"text/plain": words, "text/html": f"<progress value='{part:.3f}'></progress> {words}"})
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r{words}" + ("\n" if sent >= total else ""))
            sys.stderr.flush()
