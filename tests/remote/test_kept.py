"""What ranks keep between cells: variables that were sent, their own, and those of which neither side is sure."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.integration.keeper.conftest import until
from tests.integration.process.guest import Kernel
from tests.remote.conftest import body_of, kernel_of
from tests.remote.test_ranks import shown
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_what_a_cell_has_not_come_to_assign_is_sent(kernel: Kernel) -> None:
    """A cell that fails, or takes another way, leaves the notebook's variable readable; what it made itself stays."""
    await kernel.run("x = 1; y = 2; z = 3")
    assert (await kernel.run("%%remote session=kept\ny = 20\n1 / 0\nx = 10")).error.startswith("ZeroDivisionError")
    assert body_of(await kernel.run("%%remote session=kept\nprint(x, y)")) == "1 20\n"
    await kernel.run("%%remote session=kept\nif False:\n    z = 30")
    assert body_of(await kernel.run("%%remote session=kept\nprint(z, y)")) == "3 20\n"
    await kernel.run("z = [z]")
    assert body_of(await kernel.run("%%remote session=kept\nprint(z, y)")) == "[3] 20\n"


async def test_each_rank_keeps_what_it_has_assigned_itself(kernel: Kernel) -> None:
    """Where only one of them has, the other one is sent the notebook's."""
    await kernel.run("w = 'sent'")
    await kernel.run("%%remote n=2\nimport os\nif os.environ['RANK'] == '1':\n    w = 'own'")
    for _ in range(2):
        assert (await kernel.run("%%remote n=2 get=told\ntold = w")).error == ""
        assert await kernel.value("told") == ["sent", "own"]


async def test_a_refused_value_costs_no_variables(kernel: Kernel) -> None:
    """Something among the items that cannot be sent, or back, is an error that names it; the ranks are as before."""
    await kernel.run("%%remote n=2\nwarm = 'still warm'")
    await kernel.run("items = [1, open('/dev/null'), 3]")
    refused = await kernel.run("%%remote n=2 each=items\nprint(item)")
    assert refused.error.startswith("CannotTravelError: item cannot be sent: it is an open file"), refused
    back = await kernel.run(
        "%%remote n=2 get=made\nimport sys, types\n"
        "module = sys.modules['only_there'] = types.ModuleType('only_there')\n"
        "exec('class Made: pass', vars(module))\nmade = module.Made()"
    )
    assert "only_there" in back.error, back
    assert (await kernel.run("%%remote n=2 get=told\ntold = warm")).error == ""
    assert await kernel.value("told") == ["still warm"] * 2


async def test_a_rank_that_has_ended_between_cells_is_said_to_have(
    kernel: Kernel, keeper: KeeperClient, folder: Path
) -> None:
    """The next cell begins with that; variables and modules of the notebook are there again."""
    (folder / "wc_again.py").write_text("def f():\n    return 'own'\n")
    await kernel.run("import sys; sys.path.insert(0, ''); import wc_again; data = [1, 2]")
    first = await kernel.run(
        "%%remote n=2 session=ends get=pid\nimport os, sys\nsys.path[:] = [p for p in sys.path if p]\npid = os.getpid()"
    )
    again = "%%remote n=2 session=ends get=told\ntold = [data, wc_again.f()]"
    assert (await kernel.run(again)).error == ""
    found = re.search(r"sandbox (\w{12})", first.text)
    assert found is not None
    pid = (await kernel.value("pid"))[1]
    os.kill(pid, signal.SIGKILL)

    async def reaped() -> bool:
        return not Path(f"/proc/{pid}").exists()

    await until(reaped)
    await keeper.post(f"/sandboxes/{found[1]}/interrupt", {})  # Answered after the keeper has heard of the end.
    text, _, error = await shown(kernel, again)
    assert error == ""
    said = "Rank 1 ended by itself with exit code 137 (SIGKILL). It was started again, without its variables."
    assert said in text
    assert await kernel.value("told") == [[[1, 2], "own"]] * 2
    assert said not in (await shown(kernel, again))[0]
    await kernel.run("%remote close ends")


async def test_ranks_go_with_a_kernel_that_is_killed(keeper: KeeperClient, folder: Path) -> None:
    """Although it could not say so; the notebook's next kernel does not wait for what they hold."""

    async def ranks() -> set[str]:
        found = (await keeper.get("/sandboxes"))["sandboxes"]
        return {one["id"] for one in found if one["owner"] == "remote" and one["state"] == "running"}

    before = await ranks()
    async with kernel_of(keeper, folder) as kernel:
        await kernel.run("%%remote\npass")
        await kernel.run("%%remote detach session=two\nimport time\ntime.sleep(1000)")
        assert len(await ranks()) == len(before) + 2
        kernel.client.execute("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")

        async def gone() -> bool:
            return await ranks() == before

        await until(gone)
