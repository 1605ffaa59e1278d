"""`python -m warmcell.extension.keeper`: run the keeper in the foreground."""

import argparse
import asyncio
import sys

from warmcell.extension.keeper.process import run


def main() -> int:
    """Run until idle or told to end; 0 for a normal end."""
    parser = argparse.ArgumentParser(prog="warmcell-keeper", description="Own the sandboxes of one user.")
    parser.add_argument("--ready-fd", type=int, help="descriptor that is told, in JSON, whether it came up")
    return asyncio.run(run(ready_fd=parser.parse_args().ready_fd))


if __name__ == "__main__":
    sys.exit(main())
