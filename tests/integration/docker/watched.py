"""A keeper that tells how late its event loop was: `python -m … FILE` writes what it has seen to FILE as it ends."""

import asyncio
import json
import sys
import time
from pathlib import Path

from warmcell.extension.keeper.process import run

PERIOD_S = 0.005


async def main() -> int:
    """Be the keeper, and have a timer in its loop."""
    seen: list[tuple[float, float]] = []
    watch = asyncio.create_task(_watch(seen))
    try:
        return await run()
    finally:
        watch.cancel()
        Path(sys.argv[1]).write_text(json.dumps(seen))


async def _watch(seen: list[tuple[float, float]]) -> None:
    """When it was to be woken, and by how much later it was."""
    while True:
        due = time.monotonic() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        seen.append((due, time.monotonic() - due))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
