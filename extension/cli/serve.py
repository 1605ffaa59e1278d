"""`warmcell serve`: Warmcell's REST for agents and programs elsewhere, without the rest of Jupyter."""

import argparse
import os
from collections.abc import Callable
from typing import Final

from warmcell.extension.cli.output import add_json

PORT: Final = 8890
IDLE_S: Final = 60.0


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser(
        "serve",
        help="serve sandboxes to agents and programs over HTTP",
        description="Serve Warmcell's REST over HTTP until it is interrupted, or until no client is connected and no "
        "sandbox of an agent runs. It has no notebooks, files or terminals of this machine. Clients show a token: "
        "one of `warmcell token create`, or the server's own, which may do all that you may. The server's own is in "
        "JUPYTER_TOKEN, or made anew and printed.",
    )
    parser.add_argument("--ip", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port (default: {PORT}; 0: one that is free)")
    parser.add_argument(
        "--idle",
        type=float,
        default=IDLE_S,
        metavar="SECONDS",
        help=f"how long nobody has to need it before it ends; 0: it does not (default: {IDLE_S:g})",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve. With `--json` the first line on stdout has `url` and `token`."""
    from warmcell.extension.server.headless import WarmcellServe

    argv = [
        f"--ServerApp.ip={arguments.ip}",
        f"--ServerApp.port={arguments.port}",
        f"--WarmcellServe.idle_s={arguments.idle}",
        f"--WarmcellServe.announce={bool(arguments.json)}",
    ]
    if os.geteuid() == 0:
        argv.append("--ServerApp.allow_root=True")
    launch: Callable[[list[str]], None] = WarmcellServe.launch_instance
    launch(argv)
    return 0
