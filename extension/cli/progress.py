"""How far something has come, on stderr, where somebody looks at it."""

import sys
import time
from types import TracebackType
from typing import Self

WIDTH = 30
EVERY_S = 0.1
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Bytes as people read them: "1.5 GiB"."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {UNITS[unit]}"


class Progress:
    """A bar where the total is known, else what is done so far; nothing where stderr is no terminal."""

    def __init__(self, verb: str, *, total: int | None = None) -> None:
        """`verb` begins the line; `total` in bytes."""
        self.done = 0
        self._verb = verb
        self._total = total
        self._shown = sys.stderr.isatty()
        self._last = 0.0

    def add(self, count: int) -> None:
        """`count` bytes more are done."""
        self.done += count
        if self._shown and time.monotonic() - self._last >= EVERY_S:
            self._last = time.monotonic()
            print(f"\r{self.line()}\x1b[K", end="", file=sys.stderr, flush=True)

    def line(self) -> str:
        """What is shown now."""
        if not self._total:
            return f"{self._verb} {size(self.done)}"
        part = min(self.done / self._total, 1.0)
        bar = "#" * round(part * WIDTH)
        return f"{self._verb} [{bar:<{WIDTH}}] {part:4.0%} of {size(self._total)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
