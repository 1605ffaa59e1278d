"""A build's output on its way to one who reads it."""

import asyncio

from warmcell.extension.keeper.images_api import LINES_MAX, Lines


async def test_lines_come_in_their_order_and_end() -> None:
    """Also for one who waits already."""
    lines = Lines()
    first = asyncio.create_task(lines.get())
    await asyncio.sleep(0)
    lines.put("a")
    lines.put("b")
    assert (await first, await lines.get()) == ("a", "b")
    last = asyncio.create_task(lines.get())
    await asyncio.sleep(0)
    lines.end()
    assert (await last, await lines.get()) == (None, None)


async def test_who_reads_slowly_does_not_have_them_pile_up() -> None:
    """The latest are kept, and it is said how many are not."""
    lines = Lines()
    for number in range(LINES_MAX + 5):
        lines.put(str(number))
    lines.end()
    assert "[5 lines" in str(await lines.get())
    rest = []
    while (line := await lines.get()) is not None:
        rest.append(line)
    assert (len(rest), rest[0], rest[-1]) == (LINES_MAX, "5", str(LINES_MAX + 4))
