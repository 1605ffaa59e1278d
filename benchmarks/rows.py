"""What is measured: samples beside their baseline, and what is promised of their ratio."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Repeated measurements of one thing."""

    what: str
    samples_s: Sequence[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def p95_s(self) -> float:
        """The smallest sample that 95 % of them do not exceed."""
        return sorted(self.samples_s)[math.ceil(0.95 * len(self.samples_s)) - 1]

    def to_json(self) -> dict[str, Any]:
        """With the samples themselves, so that others can compute what they like."""
        return {
            "what": self.what,
            "n": len(self.samples_s),
            "median_s": round(self.median_s, 6),
            "p95_s": round(self.p95_s, 6),
            "samples_s": [round(sample, 6) for sample in self.samples_s],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(what=data["what"], samples_s=tuple(data["samples_s"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One promise, measured in one run as one kind of user."""

    promise: str
    """P1, P2, P9."""
    what: str
    baseline: Series
    ours: Series
    limit: float | None = None
    """The ratio that has to be reached; None where nothing is promised."""
    goal: float | None = None
    """The ratio that the mechanism allows."""
    parts_s: Mapping[str, float] = field(default_factory=dict)
    """Median seconds of what ours consists of."""

    @property
    def ratio(self) -> float:
        """Ratio of the medians: what is promised."""
        return self.ours.median_s / self.baseline.median_s

    @property
    def kept(self) -> bool:
        """Whether the limit holds."""
        return self.limit is None or self.ratio <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {
            "promise": self.promise,
            "what": self.what,
            "ratio": round(self.ratio, 4),
            "limit": self.limit,
            "goal": self.goal,
            "baseline": self.baseline.to_json(),
            "ours": self.ours.to_json(),
            "parts_s": {name: round(seconds, 6) for name, seconds in self.parts_s.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            promise=data["promise"],
            what=data["what"],
            baseline=Series.from_json(data["baseline"]),
            ours=Series.from_json(data["ours"]),
            limit=data["limit"],
            goal=data["goal"],
            parts_s=data["parts_s"],
        )


def medians(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Name by name the median of several measurements of the same parts."""
    return {name: statistics.median(one[name] for one in parts) for name in parts[0]}
