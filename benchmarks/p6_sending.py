"""P6: an array of 100 MB to one rank and to eight, beside ipyparallel's push to one engine."""

from benchmarks.ranks import pair
from benchmarks.rows import Row, Series

ROUNDS = 7
SIZE_BYTES = 100 * 10**6
GOALS = {1: 0.40, 8: 0.50}


async def measure(*, rounds: int = ROUNDS, size: int = SIZE_BYTES) -> list[Row]:
    """Two rows. The array changes before each time, so that it is sent each time; the first is not counted."""
    ours: dict[int, list[float]] = {ranks: [] for ranks in GOALS}
    theirs: list[float] = []
    async with pair() as both:
        await both.filled(size)
        for ranks in GOALS:
            await both.started(ranks)
        for number in range(rounds + 1):
            theirs.append(await both.pushed(1, number, size))
            for ranks in GOALS if number % 2 else reversed(GOALS):
                ours[ranks].append(await both.sent(ranks, number, size))
    baseline = Series(what="push to one engine", samples=theirs[1:])
    return [
        Row(
            promise="P6",
            what=f"an array of 100 MB to {ranks} rank{'s' if ranks > 1 else ''}",
            baseline=baseline,
            ours=Series(what="%%remote send=", samples=ours[ranks][1:]),
            goal=goal,
        )
        for ranks, goal in GOALS.items()
    ]
