"""Several ranks in a notebook: one display that changes, which the page draws, and which reads well without it."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .board import Board, Group, Text
from .widgets import VIEW

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

RANKS = "application/vnd.warmcell.ranks.v1+json"
"""What our extension of JupyterLab draws."""

UPDATE_S = 0.1
RATE_BYTES = 2 * 2**20
"""Of what is published in a second: much output is shown less often."""

REMIND = 60
"""What runs for a minute is shown anew each second also if it says nothing; for an hour, each minute."""

OPEN_MAX = 8
"""Of more ranks, without our extension, only those that have failed are unfolded."""

CUT = "Earlier output is no longer kept."

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COLOURS = {"runs": "#1e88e5", "done": "#43a047", "failed": "#e53935", "stopped": "#9e9e9e"}


class Groups:
    """Shows a board, as it changes."""

    def __init__(self, shell: InteractiveShell, board: Board) -> None:
        self._shell = shell
        self._board = board
        self._id = f"warmcell-{id(self):x}-{time.monotonic_ns():x}"
        self._published = -1
        self._at = time.monotonic()  # What is over sooner is shown once.
        self._pause_s = UPDATE_S
        self._written: dict[int, tuple[int, dict[str, Any], str, str]] = {}

    def begin(self, rank: int, label: str) -> None:
        """The board knows."""
        self.tick()

    def message(self, rank: int, message: Mapping[str, Any]) -> None:
        """The board knows."""
        self.tick()

    def end(self, rank: int, failed: str) -> None:
        """The board knows."""
        self.tick()

    def tick(self) -> None:
        """Show what has changed, not too often."""
        since = time.monotonic() - self._at
        changed = self._published != self._board.changed
        if since >= self._pause_s and (changed or since >= max(1.0, self._board.seconds / REMIND)):
            self._publish()

    def close(self, summary: str) -> None:
        """Show how it has ended; where it has not, as it is now."""
        self._publish()

    def _publish(self) -> None:
        first, self._published = self._published < 0, self._board.changed
        data = self._bundle()
        size = len(data["text/html"]) + 2 * len(data["text/plain"])
        self._pause_s = max(UPDATE_S, size / RATE_BYTES)
        self._shell.display_pub.publish(data, transient={"display_id": self._id}, update=not first)
        self._at = time.monotonic()

    def _bundle(self) -> dict[str, Any]:
        board = self._board
        now = board.now()
        whole = max(board.seconds, 1e-6)
        ranks, rich, plain = [], [], []
        several = len(board.groups) <= OPEN_MAX
        for number, group in enumerate(board.groups):
            parts, group_html, group_text = self._group(number, group)
            facts = _facts(group, now)
            bars = [
                [round(begin - board.began, 3), round(end - board.began, 3), state]
                for begin, end, state in group.bars(now)
            ]
            ranks.append({"rank": number, **facts, "spans": bars, **parts})
            open_ = " open" if several or group.state == "failed" else ""
            head = _head(number, facts)
            rich.append(
                f"<details{open_} style='margin:.15em 0'><summary style='cursor:pointer'>"
                f"{_track(bars, whole)} {html.escape(head)}</summary>"
                f"<div style='margin:.1em 0 .4em 1.1em'>{group_html}</div></details>"
            )
            plain.append(f"── {head}\n{group_text}".rstrip())
        summary = board.summary()
        told = {
            "state": board.state,
            "seconds": round(board.seconds, 3),
            "worked_s": round(board.worked_s, 3),
            "gpus_each": board.gpus_each,
            "sent_bytes": board.sent_bytes,
            "ranks": ranks,
        }
        return {
            RANKS: told,
            "text/html": f"<div><div><small>{html.escape(summary)}</small></div>{''.join(rich)}</div>",
            "text/plain": "\n".join([*plain, summary]),
        }

    def _group(self, number: int, group: Group) -> tuple[dict[str, Any], str, str]:
        """One rank's output in the three forms, made anew only where it has changed."""
        found = self._written.get(number)
        if found is None or found[0] != group.version:
            parts: list[dict[str, Any]] = []
            rich, plain = [], []
            for part in group.parts:
                if isinstance(part, Text):
                    parts.append({"name": part.name, "text": part.text})
                    rich.append(_pre(part.text))
                    plain.append(part.text.rstrip("\n"))
                else:
                    data = {kind: value for kind, value in group.data(part).items() if kind != VIEW}
                    parts.append({"data": data, "metadata": dict(part.metadata)})
                    rich.append(_html(data))
                    plain.append(str(data.get("text/plain", "")))
            found = self._written[number] = (
                group.version,
                {"parts": parts, "cut": group.cut},
                (f"<small>{CUT}</small>" if group.cut else "") + "".join(rich),
                "\n".join([f"[{CUT}]", *plain] if group.cut else plain),
            )
        error = f"<div style='color:#e53935'>{html.escape(group.error)}</div>" if group.error else ""
        return found[1], found[2] + error, "\n".join(filter(None, (found[3], group.error)))


def _facts(group: Group, now: float) -> dict[str, Any]:
    return {
        "state": group.state,
        "device": group.device,
        "label": group.label if group.state == "runs" else "",
        "seconds": round(group.seconds(now), 3),
        "tasks": group.tasks,
        "memory_bytes": group.memory_bytes,
        "vram_bytes": group.vram_bytes,
        "error": group.error,
    }


def _head(number: int, facts: Mapping[str, Any]) -> str:
    """One rank in a line."""
    parts = [f"Rank {number}", facts["state"], facts["device"]]
    if facts["label"]:
        parts.append(facts["label"])
    if facts["tasks"] > 1:
        parts.append(f"{facts['tasks']} tasks")
    parts.append(f"{facts['seconds']:.1f} s")
    if facts["memory_bytes"]:
        parts.append(f"{facts['memory_bytes'] / 2**20:,.0f} MiB")
    if facts["vram_bytes"]:
        parts.append(f"{facts['vram_bytes'] / 2**20:,.0f} MiB of GPU memory")
    return " · ".join(parts)


def _track(bars: list[list[Any]], whole: float) -> str:
    """When a rank worked, as bars in a line."""
    at, pieces = 0.0, []
    for begin, end, state in bars:
        gap, width = max(0.0, 100 * (begin - at) / whole), max(0.5, 100 * (end - begin) / whole)
        style = f"display:inline-block;height:.6em;margin-left:{gap:.1f}%;width:{width:.1f}%"
        pieces.append(f"<span style='{style};background:{_COLOURS.get(state, '#9e9e9e')}'></span>")
        at = end
    style = "display:inline-block;width:12em;height:.6em;line-height:0;overflow:hidden;white-space:nowrap"
    return f"<span style='{style};background:rgba(128,128,128,.25)'>{''.join(pieces)}</span>"


def _pre(text: str) -> str:
    return f"<pre style='margin:0;white-space:pre-wrap'>{html.escape(_ANSI.sub('', text))}</pre>"


def _html(data: Mapping[str, Any]) -> str:
    if "text/html" in data:
        return str(data["text/html"])
    if "image/svg+xml" in data:
        return str(data["image/svg+xml"])
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            return f"<img src='data:{kind};base64,{html.escape(str(data[kind]).strip())}'>"
    return _pre(str(data.get("text/plain", "")))
