"""The tables of docs/reference/e2b.md: what passed with which version, made of a run, and what shows each promise."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.jupyter.e2b.packages import BETWEEN, NEWEST, OLDEST

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "e2b.md"
SHOWN = "## What shows it"
HEAD = "| `e2b` | `e2b-code-interpreter` | how it finds the server | scenarios passed | not in that version |"
LINE = "|---|---|---|---|---|"
VERSIONS = (OLDEST, *BETWEEN, NEWEST)


def table(results: Iterable[str], names: Sequence[str]) -> str:
    """The table of versions, of lines of JSON with version, name and status.

    Raises:
        ValueError: Some scenario has not run with some version.
    """
    found = {}
    for line in results:
        said = json.loads(line)
        found[tuple(said["version"]), said["name"]] = said["status"]
    rows = [HEAD, LINE]
    for versions in VERSIONS:
        missing = [name for name in names if (versions, name) not in found]
        if missing:
            raise ValueError(f"{versions[0]} has not run {', '.join(missing)}")
        told = {name: found[versions, name] for name in names}
        absent = [name for name in names if told[name] == "absent"]
        passed = sum(status == "passed" for status in told.values())
        way = "wildcard domain, TLS" if versions == OLDEST else "one URL, headers"
        rows.append(row(versions, way, f"{passed} of {len(names) - len(absent)}", absent))
    return "\n".join(rows)


def row(versions: tuple[str, str], way: str, passed: str, absent: Sequence[str]) -> str:
    """One line of the table."""
    return f"| {versions[0]} | {versions[1]} | {way} | {passed} | {', '.join(f'`{one}`' for one in absent) or '–'} |"


def counted(page: str) -> dict[str, tuple[int, int, list[str]]]:
    """What the page says of each version: how many passed, of how many, and which ones it does not have."""
    found = {}
    for line in page.partition(LINE)[2].strip().splitlines():
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        passed, _, of = cells[3].partition(" of ")
        found[cells[0]] = (int(passed), int(of), re.findall(r"`(\w+)`", cells[4]))
    return found


def rows(page: str) -> list[tuple[str, tuple[str, ...]]]:
    """What the wire has, row by row as the page says it, and the tests that it names for it."""
    section = page.partition(SHOWN)[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [(cells[0], tuple(re.findall(r"`(\w+)`", cells[-1]))) for cells in lines if cells[-1] != "tests"]


def replaced(page: str, made: str) -> str:
    """The page with that table in the place of the one that it has."""
    before, _, rest = page.partition(HEAD)
    return before + made + "\n\n" + rest.partition("\n\n")[2]
