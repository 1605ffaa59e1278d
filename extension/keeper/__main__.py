"""`python -m warmcell.extension.keeper`: run the keeper, in the foreground unless told to detach."""

import argparse
import os
import sys


def main() -> int:
    """Run until idle or told to end; 0 for a normal end."""
    parser = argparse.ArgumentParser(prog="warmcell-keeper", description="Own the sandboxes of one user.")
    parser.add_argument("--detach", action="store_true", help="go on in the background, as nobody's child")
    parser.add_argument("--ready-fd", type=int, help="descriptor that is told, in JSON, whether it came up")
    arguments = parser.parse_args()
    if arguments.detach:
        if os.fork():
            os._exit(0)
        os.setsid()
    import asyncio  # after the fork, with all that hangs on it

    from warmcell.extension.keeper.process import run

    return asyncio.run(run(ready_fd=arguments.ready_fd))


if __name__ == "__main__":
    sys.exit(main())
