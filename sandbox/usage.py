"""What sandboxes have used: GPUs, processors and memory over time, while they worked and while they were idle.

`Account` is pure: it is told what a sandbox has and does, and when. `UsageStore` keeps the sums, a row for each sandbox
and day.
"""

import dataclasses
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.models import GIB
from warmcell.sandbox.wire import Wire

log = logging.getLogger(__name__)

DAY_S = 86400.0
KEPT_DAYS = 400
FORMAT = 1
BUSY_S = 5.0
"""So long another process may write before it is given up."""

By = Literal["sandbox", "notebook", "owner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage(Wire):
    """What was used. A GPU that is shared counts by its share; idle is while nothing ran and nobody waited."""

    gpu_active_s: float = 0.0
    gpu_idle_s: float = 0.0
    gpu_given_back_s: float = 0.0
    """GPU-seconds that a suspended or parked kernel would have held idle, and others could have."""
    cpu_active_s: float = 0.0
    cpu_idle_s: float = 0.0
    memory_active_gib_s: float = 0.0
    memory_idle_gib_s: float = 0.0
    wall_active_s: float = 0.0
    wall_idle_s: float = 0.0
    suspended_s: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(**{name: round(getattr(self, name) + getattr(other, name), 6) for name in FIELDS})


_KEYS: Mapping[str, tuple[str, ...]] = {
    "sandbox": ("owner", "notebook", "sandbox_id"),
    "notebook": ("owner", "notebook"),
    "owner": ("owner",),
}

FIELDS = tuple(field.name for field in dataclasses.fields(Usage))


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow(Wire):
    """A line of `GET /usage`; what lines are put together over is None."""

    owner: str | None = None
    notebook: str | None = None
    sandbox_id: str | None = None
    usage: Usage = Usage()


class Account:
    """What one sandbox uses from now on."""

    def __init__(self, *, at: float, asked_gpus: float = 0.0) -> None:
        """Nothing was used before.

        Args:
            at: Seconds, of a clock that only grows.
            asked_gpus: How many GPUs it asks for.
        """
        self._at = at
        self._gpus = 0.0
        self._asked_gpus = asked_gpus
        self._suspended = False
        self._parked = False
        self._up = False
        self._cpu_s = 0.0
        self._memory_bytes = 0

    def advance(
        self,
        at: float,
        *,
        idle_s: float,
        gpus: float,
        suspended: bool,
        up: bool,
        parked: bool = False,
        cpu_s: float | None = None,
        memory_bytes: int | None = None,
    ) -> Usage:
        """What was used since the last time, by what was known then.

        Args:
            at: Now.
            idle_s: For how long it has not worked; 0: it works.
            gpus: How many GPUs it has from now on.
            suspended: Whether it is suspended from now on.
            up: Whether it is there from now on.
            parked: Whether its GPUs are given back from now on though it is there.
            cpu_s: Processor seconds of all its processes that live. None: nobody looked.
            memory_bytes: What it takes. None: nobody looked.
        """
        passed, self._at = max(0.0, at - self._at), at
        idle = min(passed, idle_s)
        active = passed - idle
        used = Usage()
        if self._suspended:
            used = Usage(suspended_s=passed, gpu_given_back_s=passed * self._asked_gpus)
        elif self._up:
            cpu = 0.0
            if cpu_s is not None:
                # Processes that have ended since take their seconds with them.
                cpu, self._cpu_s = max(0.0, cpu_s - self._cpu_s), cpu_s
            worked = idle_s < passed
            memory = self._memory_bytes / GIB
            used = Usage(
                gpu_active_s=active * self._gpus,
                gpu_idle_s=idle * self._gpus,
                gpu_given_back_s=idle * self._asked_gpus if self._parked else 0.0,
                cpu_active_s=cpu if worked else 0.0,
                cpu_idle_s=0.0 if worked else cpu,
                memory_active_gib_s=active * memory,
                memory_idle_gib_s=idle * memory,
                wall_active_s=active,
                wall_idle_s=idle,
            )
        if not up:
            self._cpu_s, self._memory_bytes = 0.0, 0
        elif memory_bytes is not None:
            self._memory_bytes = memory_bytes
        self._asked_gpus = gpus or self._asked_gpus
        self._gpus, self._suspended, self._up, self._parked = gpus, suspended, up, parked
        return used


class UsageStore:
    """Sums on disk. All calls block for a moment, so they belong in a thread."""

    def __init__(self, path: Path) -> None:
        """Nothing is made before the first row."""
        self._path = path

    def add(self, rows: Sequence[UsageRow], *, at: float) -> None:
        """Add to the sums of the day of `at`, in Unix seconds; each row names its sandbox.

        Raises:
            BackendUnavailableError: The file cannot be written, or is of a version that this one does not know.
        """
        if not rows:
            return
        names = ("day", "sandbox_id", "owner", "notebook", *FIELDS)
        changes = ", ".join(
            ["owner = excluded.owner", "notebook = excluded.notebook"]
            + [f"{name} = {name} + excluded.{name}" for name in FIELDS]
        )
        sql = (
            f"INSERT INTO usage ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) "  # noqa: S608 - our own names
            f"ON CONFLICT (day, sandbox_id) DO UPDATE SET {changes}"
        )
        day = int(at // DAY_S)
        values = [
            (day, row.sandbox_id, row.owner or "", row.notebook or "", *(getattr(row.usage, name) for name in FIELDS))
            for row in rows
        ]
        with self._opened() as base, base:
            base.executemany(sql, values)
            base.execute("DELETE FROM usage WHERE day < ?", (day - KEPT_DAYS,))

    def rows(self, *, by: By, days: int | None = None) -> list[UsageRow]:
        """Sums, those that used GPUs most first.

        Args:
            by: What is not put together.
            days: Of so many days, today included; None: of all.

        Raises:
            BackendUnavailableError: As `add`.
        """
        if not self._path.exists():
            return []
        named = _KEYS[by]
        keys = ", ".join(named)
        sql = (
            f"SELECT {keys}, {', '.join(f'SUM({name})' for name in FIELDS)} "  # noqa: S608 - our own names
            f"FROM usage WHERE day >= ? GROUP BY {keys} ORDER BY "
            "SUM(gpu_active_s + gpu_idle_s + gpu_given_back_s) DESC, SUM(wall_active_s + wall_idle_s) DESC"
        )
        first = 0 if days is None else int(time.time() // DAY_S) - days + 1
        with self._opened() as base:
            return [_row(named, row) for row in base.execute(sql, (first,))]

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            made = not self._path.exists()
            with closing(sqlite3.connect(self._path, timeout=BUSY_S)) as base:
                if made:
                    os.chmod(self._path, 0o600)
                self._check_format(base)
                yield base
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(str(error)) from error

    def _check_format(self, base: sqlite3.Connection) -> None:
        version = base.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            columns = ", ".join(f"{name} REAL NOT NULL DEFAULT 0" for name in FIELDS)
            with base:
                base.execute(
                    "CREATE TABLE IF NOT EXISTS usage (day INTEGER, sandbox_id TEXT, owner TEXT, notebook TEXT, "
                    f"{columns}, PRIMARY KEY (day, sandbox_id))"
                )
                base.execute(f"PRAGMA user_version = {FORMAT}")
        elif version != FORMAT:
            raise self._unusable(f"it is of format {version}, and this Warmcell knows format {FORMAT}")

    def _unusable(self, why: str) -> BackendUnavailableError:
        return BackendUnavailableError(
            f"What was used cannot be kept in {self._path}: {why}",
            hint="Move that file away, or make room on its disk; a new one is made, which begins at nothing.",
        )


def total(rows: Sequence[UsageRow]) -> Usage:
    """All of them together."""
    return sum((row.usage for row in rows), Usage())


def _row(named: Sequence[str], row: Sequence[Any]) -> UsageRow:
    sums = dict(zip(FIELDS, row[len(named) :], strict=True))
    return UsageRow(**dict(zip(named, row, strict=False)), usage=Usage(**sums))


def from_answer(answer: Mapping[str, object]) -> tuple[list[UsageRow], Usage]:
    """Rows and total of `GET /usage`."""
    rows, whole = answer["rows"], answer["total"]
    assert isinstance(rows, list)
    assert isinstance(whole, Mapping)
    return [UsageRow.from_json(row) for row in rows], Usage.from_json(whole)
