"""`warmcell mcp`: sandboxes as tools of a model."""

import argparse
import asyncio
from typing import Final

from warmcell.extension.cli.output import add_json
from warmcell.sandbox.errors import BackendUnavailableError

PORT: Final = 8891
WAIT_S: Final = 30.0


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = commands.add_parser(
        "mcp",
        help="serve sandboxes to a model over MCP",
        description="Serve tools for sandboxes over the Model Context Protocol, on stdin and stdout, for a client "
        "that starts this command; with --http over streamable HTTP, for clients that show a token of `warmcell token "
        "create`. The sandboxes are this user's, or with WARMCELL_URL and WARMCELL_TOKEN those of a server.",
    )
    parser.add_argument("--http", action="store_true", help="serve over HTTP instead, at /mcp")
    parser.add_argument("--ip", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port (default: {PORT}; 0: one that is free)")
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT_S,
        metavar="SECONDS",
        help="how long a tool waits for code to end before it answers with a handle; less than your client waits for "
        f"an answer (default: {WAIT_S:g})",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve. With `--http --json` the first line on stdout has `url`."""
    try:
        import mcp  # noqa: F401
    except ImportError as error:
        raise BackendUnavailableError(
            "The MCP server needs the package mcp", hint="Install it with `pip install 'warmcell[mcp]'`."
        ) from error
    asyncio.run(_serve(arguments))
    return 0


async def _serve(arguments: argparse.Namespace) -> None:
    from warmcell.extension.mcp.callers import Callers
    from warmcell.extension.mcp.server import build
    from warmcell.sandbox.client.transport import Where

    callers = Callers(Where.find(None, None), each=arguments.http)
    server = build(callers, wait_s=arguments.wait)
    try:
        if arguments.http:
            from warmcell.extension.mcp.http import serve

            await serve(server, callers, host=arguments.ip, port=arguments.port, announce=arguments.json)
        else:
            await server.run_stdio_async()
    finally:
        await callers.close()
