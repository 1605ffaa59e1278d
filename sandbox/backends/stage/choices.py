"""What of a plan depends on what could be made."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def choose(part: Mapping[str, Any], report: Mapping[str, str]) -> Any:
    """What holds if a tree could be made as asked, or what holds if not."""
    return part["else"] if report[part["tree"]] else part["ok"]
