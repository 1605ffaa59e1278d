"""`warmcell …`: look at this machine's sandboxes, and set up and clean up, from a terminal.

Exit codes: 0 for all is well, 1 for an error (its message and cure are on stderr), 2 for a command line that cannot
be understood, and 3 where all works but something should be looked after.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from warmcell.extension.cli import (
    clean,
    criu,
    doctor,
    gpus,
    helper,
    images,
    kernelspec,
    mcp,
    ps,
    serve,
    snapshots,
    tokens,
    usage,
)
from warmcell.extension.cli.output import tell_error
from warmcell.sandbox.errors import WarmcellError

INTERRUPTED = 130
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except WarmcellError as error:
        tell_error(error, as_json=arguments.json)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does; the interpreter's own flush at exit must not fail on it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; what docs/reference/cli.md is made from."""
    parser = argparse.ArgumentParser(prog="warmcell", description="Instant sandboxes for Jupyter kernels.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (doctor, ps, gpus, usage, snapshots, images, clean, kernelspec, criu, helper, serve, mcp, tokens):
        command.add(commands)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: object) -> None:
        from warmcell import __version__

        print(f"warmcell {__version__}")
        parser.exit()
