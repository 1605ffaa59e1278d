"""What is measured: samples beside their baseline, and what is promised of their ratio."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Unit = Literal["s", "bytes"]
Engine = Literal["criu", "template", "any"]
"""What new kernels come from. any: it makes no difference."""

ENGINES: tuple[Engine, ...] = ("criu", "template")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Repeated measurements of one thing."""

    what: str
    samples: Sequence[float]
    unit: Unit = "s"

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        """The smallest sample that 95 % of them do not exceed."""
        return sorted(self.samples)[math.ceil(0.95 * len(self.samples)) - 1]

    @classmethod
    def of(cls, what: str, samples: Sequence[float], *, unit: Unit = "s") -> Self | None:
        """What was measured; None where nothing was."""
        return cls(what=what, samples=samples, unit=unit) if samples else None

    def to_json(self) -> dict[str, Any]:
        """With the samples themselves, so that others can compute what they like."""
        return {
            "what": self.what,
            "unit": self.unit,
            "n": len(self.samples),
            "median": round(self.median, 6),
            "p95": round(self.p95, 6),
            "samples": [round(sample, 6) for sample in self.samples],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(what=data["what"], samples=tuple(data["samples"]), unit=data["unit"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One promise, measured in one run as one kind of user, with one engine."""

    promise: str
    """P1, P2, …"""
    what: str
    baseline: Series
    ours: Series
    engine: Engine = "any"
    goal: float | None = None
    """The ratio that is promised; None where nothing is."""
    cold: Series | None = None
    """Ours where nothing of the snapshot is in the page cache, its `what` says how that was had."""
    parts_s: Mapping[str, float] = field(default_factory=dict)
    """Median seconds of what ours consists of, as the client sees it."""
    phases_s: Mapping[str, float] = field(default_factory=dict)
    """Median seconds of what the keeper was busy with meanwhile."""
    sizes_bytes: Mapping[str, float] = field(default_factory=dict)
    """Medians of what it takes on disk or in memory."""

    @property
    def ratio(self) -> float:
        """Ratio of the medians: what is promised."""
        return self.ours.median / self.baseline.median

    @property
    def kept(self) -> bool:
        """Whether the promise holds."""
        return self.goal is None or self.ratio <= self.goal

    def to_json(self) -> dict[str, Any]:
        return {
            "promise": self.promise,
            "what": self.what,
            "engine": self.engine,
            "ratio": round(self.ratio, 4),
            "goal": self.goal,
            "baseline": self.baseline.to_json(),
            "ours": self.ours.to_json(),
            "cold": None if self.cold is None else self.cold.to_json(),
            "parts_s": _rounded(self.parts_s),
            "phases_s": _rounded(self.phases_s),
            "sizes_bytes": {name: round(size) for name, size in self.sizes_bytes.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            promise=data["promise"],
            what=data["what"],
            engine=data["engine"],
            goal=data["goal"],
            baseline=Series.from_json(data["baseline"]),
            ours=Series.from_json(data["ours"]),
            cold=None if data["cold"] is None else Series.from_json(data["cold"]),
            parts_s=data["parts_s"],
            phases_s=data["phases_s"],
            sizes_bytes=data["sizes_bytes"],
        )


def medians(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Name by name the median of several measurements of the same parts; a name that some lack is of the others."""
    names = dict.fromkeys(name for one in parts for name in one)
    return {name: statistics.median(one[name] for one in parts if name in one) for name in names}


def phases(told: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median seconds of each phase that the keeper tells of these sandboxes."""
    return {name: took / 1000 for name, took in medians([one["phases_ms"] for one in told]).items()}


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(took, 6) for name, took in seconds.items()}
