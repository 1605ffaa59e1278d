"""How the command line prints: plain tables for people, JSON for programs."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from warmcell.sandbox.errors import WarmcellError

WARNING = 3
"""Exit code where all works, but something should be looked after."""

JSON_HELP = "print JSON for programs instead of a table"


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option that every command has."""
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


class Verbs:
    """The verbs of a command such as `warmcell snapshots`. Each can print JSON."""

    def __init__(
        self,
        commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
        command: str,
        *,
        about: str,
        description: str | None = None,
    ) -> None:
        """Register the command."""
        parser = commands.add_parser(command, help=about, description=description)
        self._parsers = parser.add_subparsers(metavar="VERB", required=True)

    def add(
        self, verb: str, run: Callable[[argparse.Namespace], int], *, about: str, description: str
    ) -> argparse.ArgumentParser:
        """Register a verb; its parser, for more arguments."""
        parser = self._parsers.add_parser(verb, help=about, description=description)
        parser.set_defaults(run=run)
        add_json(parser)
        return parser


def print_cure(hint: str, *, file: TextIO | None = None) -> None:
    """What can be done about what was just told, if that is known."""
    if hint:
        print(f"  cure: {hint}", file=file)


def print_json(what: object) -> None:
    """One JSON document."""
    print(json.dumps(what, indent=2))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be, without lines."""
    widths = [max(len(row[n]) for row in (headings, *rows)) for n in range(len(headings))]
    for row in (headings, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def tell_error(error: WarmcellError, *, as_json: bool) -> None:
    """Message and cure on stderr; for programs the wire form on stdout too."""
    if as_json:
        print_json({"error": error.to_json()})
    print(f"warmcell: {error.message}", file=sys.stderr)
    print_cure(error.hint, file=sys.stderr)


def yes_no(value: object) -> str:
    """A truth value in a table."""
    return "yes" if value else "no"


def duration(seconds: float) -> str:
    """A span of time in its two largest units: "3 h 5 min"."""
    whole = max(0, int(seconds))
    for size, unit, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {small}"
    return f"{whole} s"
