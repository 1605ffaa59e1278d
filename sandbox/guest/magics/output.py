"""What remote cells show: one rank's as it comes, that of several in a group for each."""

from __future__ import annotations

import html
import re
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

TEXT_MAX_BYTES = 16 * 2**20
"""Text of one rank that is shown as it comes; what is beyond is left out, and counted."""

GROUP_MAX = 64 * 1024
"""Characters of a group that are kept: its last ones."""

UPDATE_S = 0.1
PARTS_MAX = 200
WIDGET = "application/vnd.jupyter.widget-view+json"
"""A view of a model that is with the remote kernel: here nobody would find it."""

DISPLAYS = ("display_data", "update_display_data", "execute_result")

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Stream:
    """One rank: text, pictures and updates as if the cell ran here."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        self._left = TEXT_MAX_BYTES
        self._dropped = 0

    def begin(self, rank: int, label: str) -> None:
        """Nothing to be said."""

    def message(self, rank: int, message: Mapping[str, Any]) -> None:
        """Show it."""
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            stream = sys.stderr if content.get("name") == "stderr" else sys.stdout
            stream.write(self._bounded(str(content.get("text", ""))))
        elif kind == "clear_output":
            self._shell.display_pub.clear_output(wait=bool(content.get("wait")))  # type: ignore[no-untyped-call]
        elif kind in DISPLAYS:
            self._shell.display_pub.publish(
                {name: value for name, value in content.get("data", {}).items() if name != WIDGET},
                content.get("metadata", {}),
                transient=content.get("transient", {}),
                update=kind == "update_display_data",
            )

    def end(self, rank: int, failed: str) -> None:
        """Say what was left out."""
        if self._dropped:
            sys.stdout.write(f"\n[{self._dropped} more characters of output are not shown]\n")
            self._dropped = 0
        sys.stdout.flush()
        sys.stderr.flush()

    def tick(self) -> None:
        """Nothing waits."""

    def close(self, summary: str) -> None:
        """Nothing is left to be said."""

    def _bounded(self, text: str) -> str:
        kept = text[: max(0, self._left)]
        self._left -= len(text)
        self._dropped += len(text) - len(kept)
        return kept


class Group:
    """What one rank has shown, as its reader sees it: lines that were written over are."""

    def __init__(self) -> None:
        self.text = ""
        self.state = "waits"
        self.label = ""
        self.began = 0.0
        self.seconds = 0.0
        self.tasks = 0
        self._parts: list[tuple[str, Any]] = []

    @property
    def elapsed(self) -> float:
        """Seconds in which it has worked."""
        return self.seconds + (time.monotonic() - self.began if self.state == "runs" else 0.0)

    def add(self, message: Mapping[str, Any]) -> None:
        """One more message."""
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            self._write(str(content.get("text", "")))
        elif kind == "clear_output":
            self._parts = []
        elif kind == "update_display_data":
            wanted = content.get("transient", {}).get("display_id")
            for number, (name, part) in enumerate(self._parts):
                if name == "data" and part.get("transient", {}).get("display_id") == wanted:
                    self._parts[number] = ("data", content)
        elif kind in DISPLAYS:
            self._parts.append(("data", content))
        del self._parts[:-PARTS_MAX]

    def plain(self) -> str:
        """All of it as text."""
        return "\n".join(
            part.rstrip("\n") if name == "text" else str(part["data"].get("text/plain", ""))
            for name, part in self._parts
        )

    def rich(self) -> str:
        """All of it as HTML."""
        return "".join(
            f"<pre style='margin:0'>{html.escape(_ANSI.sub('', part))}</pre>" if name == "text" else _html(part["data"])
            for name, part in self._parts
        )

    def _write(self, text: str) -> None:
        before = ""
        if self._parts and self._parts[-1][0] == "text":
            before = self._parts.pop()[1]
        self._parts.append(("text", _written_over(before + text)[-GROUP_MAX:]))


class Groups:
    """Several ranks: one display, updated as they go on, with a group for each that can be folded."""

    def __init__(self, shell: InteractiveShell, ranks: int) -> None:
        self._shell = shell
        self._groups = [Group() for _ in range(ranks)]
        self._id = f"warmcell-{id(self):x}-{time.monotonic_ns():x}"
        self._shown = False
        self._changed = True
        self._at = 0.0
        self._summary = ""

    def begin(self, rank: int, label: str) -> None:
        """It works."""
        group = self._groups[rank]
        group.state, group.label, group.began = "runs", label, time.monotonic()
        self._changed = True
        self.tick()

    def message(self, rank: int, message: Mapping[str, Any]) -> None:
        """Put it into the rank's group."""
        self._groups[rank].add(message)
        self._changed = True
        self.tick()

    def end(self, rank: int, failed: str) -> None:
        """It rests, or has failed."""
        group = self._groups[rank]
        group.seconds = group.elapsed
        group.state = "failed" if failed else "done"
        group.tasks += 1
        self._changed = True
        self.tick()

    def tick(self) -> None:
        """Show what has changed, not too often."""
        now = time.monotonic()
        if self._changed and now - self._at >= UPDATE_S:
            self._publish()
            self._at = now

    def close(self, summary: str) -> None:
        """The last word."""
        self._summary = summary
        self._publish()

    def _publish(self) -> None:
        longest = max((group.elapsed for group in self._groups), default=0.0) or 1.0
        rich, plain = [], []
        for number, group in enumerate(self._groups):
            head = f"Rank {number} · {group.state}" + (f" · {group.label}" if group.label else "")
            head += f" · {group.elapsed:.1f} s"
            bar = f"<span style='display:inline-block;height:.6em;width:{100 * group.elapsed / longest / 4:.1f}%;"
            bar += f"background:{_COLOURS[group.state]};margin-left:1em'></span>"
            rich.append(f"<details open><summary>{html.escape(head)}{bar}</summary>{group.rich()}</details>")
            plain.append(f"── {head}\n{group.plain()}".rstrip())
        if self._summary:
            rich.append(f"<small>{html.escape(self._summary)}</small>")
            plain.append(self._summary)
        data = {"text/html": "".join(rich), "text/plain": "\n".join(plain)}
        self._shell.display_pub.publish(data, transient={"display_id": self._id}, update=self._shown)
        self._shown, self._changed = True, False


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


_COLOURS = {"waits": "#999", "runs": "#2979ff", "done": "#43a047", "failed": "#e53935"}


def of(shell: InteractiveShell, ranks: int) -> Any:
    """Where a cell on so many ranks is shown."""
    if ranks == 1:
        return Stream(shell)
    return Groups(shell, ranks) if getattr(shell, "kernel", None) is not None else Lines(ranks)


class Progress:
    """How much of what is sent has gone, shown once that takes longer than a second."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        self._began = time.monotonic()
        self._at = 0.0
        self._id = f"warmcell-sending-{id(self):x}-{time.monotonic_ns():x}"
        self._shown = False

    def __call__(self, sent: int, total: int) -> None:
        """So many bytes of so many."""
        now = time.monotonic()
        if now - self._began < 1.0 or (now - self._at < UPDATE_S and sent < total):
            return
        self._at = now
        part = sent / total if total else 1.0
        words = f"Sending: {sent / 2**20:,.0f} of {total / 2**20:,.0f} MiB"
        if getattr(self._shell, "kernel", None) is None:
            sys.stdout.write(f"\r{words}" + ("\n" if sent >= total else ""))
            return
        data = {"text/plain": words, "text/html": f"<progress value='{part:.3f}'></progress> {words}"}
        self._shell.display_pub.publish(data, transient={"display_id": self._id}, update=self._shown)
        self._shown = True


def _written_over(text: str) -> str:
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


def _html(data: Mapping[str, Any]) -> str:
    if "text/html" in data:
        return str(data["text/html"])
    if "image/svg+xml" in data:
        return str(data["image/svg+xml"])
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            return f"<img src='data:{kind};base64,{html.escape(str(data[kind]).strip())}'>"
    return f"<pre style='margin:0'>{html.escape(str(data.get('text/plain', '')))}</pre>"
