"""What the ranks of a fan-out have shown and done: kept whether or not anybody looks, bounded whatever they print."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .widgets import COMMS, VIEW, Models

TEXT_MAX = 64 * 1024
"""Characters of text of one rank that are kept: its last ones."""

DATA_MAX = 2 * 2**20
"""Characters of pictures and the like of one rank that are kept: its last ones."""

PARTS_MAX = 200
SPANS_MAX = 200
"""Tasks of one rank that have a bar of their own; beyond that neighbours share one."""

DISPLAYS = ("display_data", "update_display_data", "execute_result")
STOPPED = "stopped"
"""How a task has ended that was told to."""


class Text(NamedTuple):
    """What was printed, `name` says where."""

    name: str
    text: str


class Shown(NamedTuple):
    """Something displayed."""

    data: Mapping[str, Any]
    metadata: Mapping[str, Any]
    display_id: str


class Group:
    """What one rank has shown, as its reader sees it: lines that were written over are."""

    def __init__(self, device: str = "CPU") -> None:
        self.device = device
        self.state = "waits"
        """`waits`, `runs`, `done`, `failed` or `stopped`."""
        self.label = ""
        """What it works on."""
        self.error = ""
        """How its last task failed."""
        self.memory_bytes = 0
        """What it takes now, or took when that was last looked at."""
        self.vram_bytes = 0
        """The same of its GPUs' memory."""
        self.tasks = 0
        self.spans: list[tuple[float, float, str]] = []
        """When it worked: from and to, in seconds of the clock, and how that ended."""
        self.parts: list[Text | Shown] = []
        self.cut = False
        """Some of its output is no longer kept."""
        self.version = 0
        """Grows with each change of its output."""
        self._began = 0.0
        self._worked_s = 0.0
        self.models = Models()
        """Widgets of its kernel that this cell has made."""

    def seconds(self, now: float) -> float:
        """How long it has worked."""
        return self._worked_s + (now - self._began if self.state == "runs" else 0.0)

    def bars(self, now: float) -> list[tuple[float, float, str]]:
        """When it worked, what it works on now included."""
        return [*self.spans, (self._began, now, "runs")] if self.state == "runs" else list(self.spans)

    def begin(self, label: str, now: float) -> None:
        """It works."""
        self.state, self.label, self._began, self.error = "runs", label, now, ""

    def end(self, failed: str, now: float) -> None:
        """It rests."""
        begin = self._began if self.state == "runs" else now
        self.state = "done" if not failed else STOPPED if failed == STOPPED else "failed"
        self.error = failed if self.state == "failed" else ""
        self.tasks += 1
        self._worked_s += now - begin
        last = self.spans[-1] if self.spans else None
        if len(self.spans) >= SPANS_MAX and last is not None and last[2] == self.state:
            self.spans[-1] = (last[0], now, self.state)
        else:
            self.spans.append((begin, now, self.state))
            del self.spans[: -2 * SPANS_MAX]

    def add(self, message: Mapping[str, Any]) -> None:
        """One more message."""
        kind, content = message["msg_type"], message["content"]
        if kind == "usage":
            self.memory_bytes = int(content.get("memory_bytes") or 0)
            self.vram_bytes = int(content.get("vram_bytes") or 0)
            return
        if kind in COMMS:
            if self.models.hear(message):
                self.version += 1
            return
        if kind == "stream":
            self._write(str(content.get("name") or "stdout"), str(content.get("text", "")))
        elif kind == "clear_output":
            self.parts = []
        elif kind in DISPLAYS:
            self._show(content, update=kind == "update_display_data")
        self._bound()
        self.version += 1

    def data(self, part: Shown) -> Mapping[str, Any]:
        """What is displayed, widgets as they are now."""
        return self.models.bundle(part.data) if VIEW in part.data else part.data

    def _show(self, content: Mapping[str, Any], *, update: bool) -> None:
        wanted = str(content.get("transient", {}).get("display_id") or "")
        new = Shown(content.get("data", {}), content.get("metadata", {}), wanted)
        if not update:
            self.parts.append(new)
            return
        for number, part in enumerate(self.parts):
            if wanted and isinstance(part, Shown) and part.display_id == wanted:
                self.parts[number] = new

    def _write(self, name: str, text: str) -> None:
        before = ""
        last = self.parts[-1] if self.parts else None
        if isinstance(last, Text) and last.name == name:
            before = last.text
            self.parts.pop()
        kept, newline, line = before.rpartition("\n")
        whole = kept + newline + written_over(line + text)
        self.cut = self.cut or len(whole) > TEXT_MAX
        self.parts.append(Text(name, whole[-TEXT_MAX:]))

    def _bound(self) -> None:
        """Forget the oldest of what is too much."""
        left = {Text: TEXT_MAX, Shown: DATA_MAX}
        for number in range(len(self.parts) - 1, -1, -1):
            part = self.parts[number]
            left[type(part)] -= len(part.text) if isinstance(part, Text) else _size(part.data)
            last = number == len(self.parts) - 1
            if not last and (min(left.values()) < 0 or len(self.parts) - number > PARTS_MAX):
                del self.parts[: number + 1]
                self.cut = True
                return


class Board:
    """All ranks of one fan-out."""

    def __init__(self, devices: Sequence[str], *, gpus_each: float = 0) -> None:
        """Nothing has begun.

        Args:
            devices: What each rank computes on, in a few words.
            gpus_each: GPUs that each holds.
        """
        self.groups = [Group(device) for device in devices]
        self.gpus_each = gpus_each
        self.state = "runs"
        self.sent_bytes = 0
        self.began = time.monotonic()
        self.ended = 0.0
        self.changed = 0
        """Grows with whatever happens."""

    def now(self) -> float:
        """The time, which stands still once all is over."""
        return self.ended or time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return self.now() - self.began

    @property
    def worked_s(self) -> float:
        """Of all ranks together."""
        now = self.now()
        return sum(group.seconds(now) for group in self.groups)

    def begin(self, rank: int, label: str) -> None:
        """A task begins."""
        self.groups[rank].begin(label, self.now())
        self.changed += 1

    def message(self, rank: int, message: Mapping[str, Any]) -> None:
        """Output comes."""
        self.groups[rank].add(message)
        self.changed += 1

    def end(self, rank: int, failed: str) -> None:
        """A task has ended."""
        self.groups[rank].end(failed, self.now())
        self.changed += 1

    def finish(self, state: str) -> None:
        """All is over; nothing changes any more."""
        for group in self.groups:
            if group.state == "runs":
                group.end(STOPPED, self.now())
        self.state = state
        self.ended = time.monotonic()
        self.changed += 1

    def summary(self) -> str:
        """All of it in a line."""
        worked = f"{self.worked_s * self.gpus_each:.1f} GPU-seconds" if self.gpus_each else ""
        worked = worked or f"{self.worked_s:.1f} s of ranks"
        sent = f"{self.sent_bytes / 2**20:.1f} MiB sent"
        if len(self.groups) == 1:
            return " · ".join(
                filter(None, (self.state, f"{self.seconds:.1f} s", worked if self.gpus_each else "", sent))
            )
        return f"{len(self.groups)} ranks · {self.state} · {self.seconds:.1f} s, {worked} · {sent}"


def written_over(text: str) -> str:
    """Text as a terminal shows it after carriage returns, as of progress bars."""
    if "\r" not in text:
        return text
    lines = text.replace("\r\n", "\n").split("\n")
    shown = []
    for number, line in enumerate(lines):
        pieces = line.split("\r")
        last = pieces[-1] or (pieces[-2] + "\r" if len(pieces) > 1 and number == len(lines) - 1 else pieces[-1])
        shown.append(last if last else next((piece for piece in reversed(pieces) if piece), ""))
    return "\n".join(shown)


def _size(data: Mapping[str, Any]) -> int:
    return sum(len(value) if isinstance(value, str) else len(repr(value)) for value in data.values())
