"""`warmcell clean`: end the keeper and remove everything of this user that it made on the machine."""

import argparse
import sys

from warmcell.extension.cleaning import Cleaning
from warmcell.extension.cli.output import add_json, print_json
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.paths import Paths


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser(
        "clean",
        help="end all sandboxes and remove what is left of them",
        description="End your keeper with all its sandboxes and kernels, and remove what it, or one that was killed, "
        "left on this machine: processes, mounts, control groups, run directories, sockets and GPU leases. "
        "Logs, persistent homes, snapshots and images stay.",
    )
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask first")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ask, clean, and say what was removed."""
    cleaning = Cleaning(Paths.default())
    running = cleaning.running()
    if running and not arguments.yes and not _agreed(running):
        print("Nothing was removed.", file=sys.stderr)
        return 1
    report = cleaning.clean()
    if arguments.json:
        print_json(report.to_json())
        return 0
    if report.keeper is not None:
        print(f"Ended the keeper (process {report.keeper}){' by force' if report.killed else ''}.")
    for what in report.removed:
        print(f"Removed {what}")
    if report.keeper is None and not report.removed:
        print("There was nothing to remove.")
    return 0


def _agreed(running: str) -> bool:
    if not sys.stdin.isatty():
        raise InvalidRequestError(f"{running}, and there is nobody to ask", hint="Run `warmcell clean --yes`.")
    # On stderr, so that the output can go elsewhere.
    print(f"{running}. Their variables will be lost. End it all? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
