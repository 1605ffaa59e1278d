"""What ranks keep between cells: variables that were sent, their own, and those of which neither side is sure."""

import pytest

from tests.integration.process.guest import Kernel
from tests.remote.conftest import body_of

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
