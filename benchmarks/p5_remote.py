"""P5: a cell that does nothing, run on one rank that is warm, beside the same on an engine of ipyparallel."""

from benchmarks.ranks import pair
from benchmarks.rows import Row, Series

ROUNDS = 3
PER_ROUND = 10
"""Cells per round and way: one takes some milliseconds, and single ones differ by half of that."""

GOAL = 1.0


async def measure(*, rounds: int = ROUNDS) -> list[Row]:
    """One row. Cells of two notebooks, alternately, from the request to the reply."""
    async with pair() as both:
        await both.started(1)
        await both.trivial(1)
        samples = [await both.trivial(1) for _ in range(rounds * PER_ROUND)]
    return [
        Row(
            promise="P5",
            what="a warm cell of `pass` on one rank",
            baseline=Series(what="%px", samples=[theirs for _, theirs in samples]),
            ours=Series(what="%%remote", samples=[ours for ours, _ in samples]),
            goal=GOAL,
        )
    ]
