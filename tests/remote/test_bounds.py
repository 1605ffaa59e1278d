"""What is large on its way: sent again and again, brought back by several at once, or printed."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.integration.process.guest import Kernel
from tests.remote.test_ranks import shown
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.bubblewrap]

MIB = 2**20
VALUES_MIB = 40
PRINTED_GROWTH = 400 * MIB
"""More than what is kept of output may make a process larger, and less than all of it would."""


@pytest.fixture(scope="module")
def settings() -> Mapping[str, object]:
    """Little room, so that little is much."""
    return {"backend": "bubblewrap", "remote_values": VALUES_MIB / 1024}


async def test_a_large_array_is_sent_again_and_again(kernel: Kernel) -> None:
    """As often as it changes, to ranks that keep their variables; what is as it was is not sent again."""
    await kernel.run(f"import numpy as np\nx = np.zeros({VALUES_MIB - 10} * 2**20, 'u1')")
    for number in (1, 2, 3, 3):
        await kernel.run(f"x[-1] = {number}")
        output = await kernel.run("%%remote n=2 get=seen\nkept = 1\nseen = int(x[-1]), len(x)")
        assert output.error == ""
        assert await kernel.value("seen") == [[number, (VALUES_MIB - 10) * MIB]] * 2
        assert ("warm" in output.text) is (number > 1)
    assert "· 0.0 MiB sent" in str(output.data[-1]["text/plain"])


async def test_what_comes_back_waits_for_room(kernel: Kernel) -> None:
    """Where not all of it fits at a time; what never fits says so, and leaves nothing behind."""
    fill = (
        "import os\nfree = os.statvfs('/run/warmcell'); free = free.f_bavail * free.f_frsize\n"
        "if os.environ['RANK'] == '0':\n    junk = open('/run/warmcell/junk', 'wb')\n"
        "    os.posix_fallocate(junk.fileno(), 0, free - {left} * 2**20)\n"
    )
    back = "import numpy as np\nback = np.full({size} * 2**20, int(os.environ['RANK']), 'u1')"
    assert (await kernel.run("%%remote n=2 session=room\n" + fill.format(left=50))).error == ""
    output = await kernel.run("%%remote n=2 session=room get=back\n" + back.format(size=30))
    assert output.error == ""
    assert await kernel.value("[[len(one), int(one.max())] for one in back]") == [[30 * MIB, 0], [30 * MIB, 1]]
    last = back.format(size=30).replace("back = ", "") + ";"
    output = await kernel.run("%%remote n=2 session=room as=back\n" + last)
    assert output.error == ""
    assert await kernel.value("[[len(one), int(one.max())] for one in back]") == [[30 * MIB, 0], [30 * MIB, 1]]
    await kernel.run("%%remote n=2 session=room\nif junk := globals().get('junk'): os.unlink(junk.name); junk.close()")
    assert (await kernel.run("%%remote n=2 session=room\n" + fill.format(left=20))).error == ""
    output = await kernel.run("%%remote n=2 session=room get=back\n" + back.format(size=30))
    assert "no room in the sandbox for the 30.0 MiB that are to come back" in output.error
    output = await kernel.run("%%remote n=2 session=room get=back\n" + back.format(size=VALUES_MIB + 10))
    assert f"more than the {VALUES_MIB}.0 MiB that may: back {VALUES_MIB + 10}.0 MiB" in output.error
    await kernel.run("%%remote n=2 session=room\nleft = sorted(os.listdir('/run/warmcell'))")
    output = await kernel.run("%%remote n=2 session=room get=left\npass")
    assert not [name for one in await kernel.value("left") for name in one if name.startswith("get-")], output
    await kernel.run("%remote close room")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("size", "prints"),
    [
        pytest.param(100 * MIB, "print('x' * size)", id="at-once"),
        pytest.param(100 * MIB, "for _ in range(100): print('x' * (size // 100), flush=True)", id="in-many"),
        pytest.param(10**9, "print('x' * size)", id="long-at-once", marks=pytest.mark.long),
        pytest.param(
            10**9,
            "for _ in range(100): print('x' * (size // 100), flush=True)",
            id="long-in-many",
            marks=pytest.mark.long,
        ),
    ],
)
async def test_who_prints_much_fills_nobody(
    keeper: KeeperClient, kernel: Kernel, ranks: int, size: int, prints: str
) -> None:
    """Neither the keeper nor the notebook's kernel grows by what ranks print; that it was too much is said."""
    pid = int((await keeper.get("/status"))["pid"])
    peak = "int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) * 1024"
    await kernel.run(f"size = {size}")
    before = _peak(pid), int(await kernel.value(peak))
    cell = f"%%remote n={ranks}\n{prints}\n'still here'"
    if ranks == 1:
        output = await kernel.run(cell)
        text, error = output.text + str(output.data), output.error
    else:
        text, _, error = await shown(kernel, cell)
    assert error == ""
    assert re.search("more (of output are left out|characters of output are not shown)", text)
    assert "still here" in text
    assert _peak(pid) - before[0] < PRINTED_GROWTH
    assert int(await kernel.value(peak)) - before[1] < PRINTED_GROWTH


def _peak(pid: int) -> int:
    """The most memory that a process has had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
