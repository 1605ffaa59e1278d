"""`warmcell criu`: have the program that saves memory on a machine whose own is too old."""

import argparse
from pathlib import Path

from warmcell.extension.cli.output import add_json, print_json
from warmcell.sandbox.helper.program import PREFIXES


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser(
        "criu",
        help="install CRIU, which saves kernels' memory (root)",
        description="Install CRIU 4.2 or newer with its libraries into a directory of its own, where Warmcell finds "
        "it; nothing else of the system is touched. It comes from Debian's packages, checked against its keys: from "
        "the mirror of this machine, or from WARMCELL_CRIU_MIRROR. Where one can be used already nothing is done.",
    )
    parser.add_argument(
        "prefix", nargs="?", type=Path, default=Path(PREFIXES[0]), help=f"the directory (default: {PREFIXES[0]})"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Install it, and say which there is."""
    from warmcell.extension.helper_setup import install_criu

    found = install_criu(arguments.prefix)
    if arguments.json:
        print_json({"path": found.path, "version": found.version})
    else:
        print(f"CRIU {found.version} is {found.path}")
    return 0
