"""What of a plan depends on what could be made."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def choose(part: Any, report: Mapping[str, Any]) -> list[str]:
    """Words of the command line: as given, or those that hold if a tree could be made as asked, else the others."""
    if isinstance(part, str):
        return [part]
    words: list[str] = part["else"] if report[part["tree"]] else part["ok"]
    return words
