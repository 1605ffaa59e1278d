"""A real kernel is left alone and goes on, with its clients connected throughout."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.proxy.conftest import TIMEOUT_S, Rig, until
from tests.integration.proxy.kernels import PRINTER, Kernel, behind, state
from tests.leaks import Places
from warmcell.sandbox.errors import ConflictError, OperationTimeoutError, SnapshotError


@pytest.fixture
async def kernel(rig: Rig, places: Places) -> AsyncIterator[Kernel]:
    async with behind(rig, places.root / "k") as made:
        yield made


HOOK = """
from warmcell.sandbox.guest.kernel import hooks
@hooks.before_snapshot
def veto():
    raise RuntimeError("a file is half written")
"""


def _connections_to(prefix: str) -> list[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [line for line in lines if prefix in line and line.split()[5] == "03"]


async def test_nothing_is_lost_or_said_twice_over_many_pauses(kernel: Kernel) -> None:
    """A thread that prints all the time through twenty pauses is heard as if there had been none."""
    await kernel.run(PRINTER)
    connected = len(_connections_to(kernel.prefix))
    for number in range(20):
        await kernel.pause()
        assert len(_connections_to(kernel.prefix)) == connected - 4  # The kernel has one to itself.
        await kernel.go_on(restored=bool(number % 2))
    assert await kernel.run("stop.set(); thread.join(); print('joined')")
    await kernel.until(lambda: "end of" in kernel.text())
    numbers = [line for line in kernel.text().splitlines() if line.isdigit()]
    end = next(line for line in kernel.text().splitlines() if line.startswith("end of"))
    assert numbers == [str(n) for n in range(int(end.split()[-1]))]


async def test_a_cell_goes_on_through_pauses(kernel: Kernel, places: Places) -> None:
    """A kernel is paused in the middle of a cell; the cell stays open, and is answered once and heard as a whole."""
    enough = places.root / "enough"
    until_enough = f"n < 150 or not os.path.exists({str(enough)!r})"
    name = kernel.client.execute(
        f"import os, time\nn = 0\nwhile {until_enough}:\n    print(n)\n    n += 1\n    time.sleep(0.002)",
        user_expressions={"n": "n"},
    )
    await kernel.until(lambda: "3" in kernel.text(name))
    for _ in range(4):
        assert await kernel.pause() == (name,)
        assert kernel.proxy.busy
        await kernel.go_on(restored=True)
    enough.touch()
    await kernel.finished(name)
    printed = int(kernel.reply(name)["user_expressions"]["n"]["data"]["text/plain"])  # The kernel's own reply.
    assert kernel.text(name).split() == [str(n) for n in range(printed)]
    assert printed >= 150
    assert not kernel.proxy.busy
    states = [state(each) for each in kernel.heard if each["parent_header"].get("msg_id") == name]
    assert [each for each in states if each] == ["busy", "idle"]


@pytest.mark.parametrize(("last", "status"), [("print('end')", "ok"), ("1 / 0", "error")])
async def test_a_cell_that_ends_while_the_kernel_is_away_is_answered(
    kernel: Kernel, places: Places, last: str, status: str
) -> None:
    """Its reply went to nobody; it is made up from what was kept, and comes once. Other requests are asked again."""
    away, ended = places.root / "away", places.root / "ended"
    name = kernel.client.execute(
        f"import os, time\nprint('begun', flush=True)\nwhile not os.path.exists({str(away)!r}): time.sleep(0.01)\n"
        f"open({str(ended)!r}, 'w').close()\n{last}"
    )
    completion = kernel.ask("complete_request", {"code": "pri", "cursor_pos": 3})
    await kernel.until(lambda: "begun" in kernel.text(name))
    assert await kernel.pause() == (name, completion)
    away.touch()
    await until(ended.exists)
    await asyncio.sleep(0.2)
    await kernel.go_on()
    await kernel.finished(name, completion)
    assert (kernel.reply(name)["status"], kernel.reply(name)["execution_count"]) == (status, 1)
    assert kernel.reply(name).get("ename", "") == ("ZeroDivisionError" if status == "error" else "")
    assert kernel.text(name) == ("begun\nend\n" if status == "ok" else "begun\n")
    if status == "ok":
        assert "print" in kernel.reply(completion)["matches"]
    assert await kernel.run("print('next')") == "next\n"
    assert not kernel.proxy.busy


async def test_requests_wait_in_order_while_a_kernel_is_away(kernel: Kernel) -> None:
    """What comes between pause and go_on is done afterwards; an interrupt of that time too."""
    await kernel.run("said = []")
    await kernel.pause()
    names = [kernel.client.execute(f"said.append({n})") for n in range(50)]
    await kernel.go_on()
    await kernel.finished(*names)
    assert await kernel.run("print(said)") == f"{list(range(50))}\n"


async def test_a_restored_kernel_freshens_itself_first(kernel: Kernel) -> None:
    """Token, env and cwd reach it before any client's request does."""
    await kernel.pause("token")
    name = kernel.client.execute("import os; print(os.environ['WISHED'], os.getcwd())")
    await kernel.go_on(token="token", restored=True, clone=True, env={"WISHED": "b"}, cwd="/usr")
    await kernel.finished(name)
    assert kernel.text(name) == "b /usr\n"


async def test_a_kernel_that_refuses_gets_no_request(kernel: Kernel) -> None:
    """The wrong token: its side is closed again, requests wait, and the right one is tried afterwards."""
    await kernel.pause("token")
    name = kernel.client.execute("print('in')")
    with pytest.raises(SnapshotError, match="not the one that was saved"):
        await kernel.go_on(token="other", restored=True)
    assert not kernel.text(name)
    await kernel.go_on(token="token", restored=True)
    await kernel.finished(name)
    assert kernel.text(name) == "in\n"


async def test_a_hook_that_refuses_leaves_all_as_it_was(kernel: Kernel) -> None:
    """Its words come back, and the kernel runs on with what came meanwhile."""
    await kernel.run(HOOK)
    with pytest.raises(SnapshotError, match="a file is half written"):
        await kernel.pause()
    assert await kernel.run("hooks.before.clear(); print('still here')") == "still here\n"
    await kernel.pause()
    with pytest.raises(ConflictError, match="could be paused"):
        await kernel.pause()
    await kernel.go_on()
    assert await kernel.run("print('again')") == "again\n"


async def test_a_pause_that_is_not_answered_ends(rig: Rig) -> None:
    """A deadline; requests that waited go to the kernel then."""
    guest = await rig.guest()
    client = rig.client()
    pausing = asyncio.create_task(rig.proxy.pause(token="t", timeout=0.3))
    assert (await guest.asked())["msg_type"] == "comm_info_request"
    assert (await guest.asked())["msg_type"] == "warmcell_before_snapshot_request"
    client.execute("waits")
    with pytest.raises(OperationTimeoutError) as caught:
        await pausing
    assert caught.value.details["operation"] == "pause"
    kinds = {(await guest.asked())["msg_type"] for _ in range(2)}
    assert kinds == {"warmcell_go_on_request", "execute_request"}


@pytest.mark.alone
async def test_coming_back_takes_milliseconds(kernel: Kernel) -> None:
    """No pauses between attempts or questions add to it."""
    took = [1.0]
    while min(took) >= 0.02 and len(took) < 200:  # A busy machine may be slow many times over.
        await kernel.pause()
        began = time.perf_counter()
        await kernel.go_on(restored=True)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.02, took


async def test_a_question_is_answered_after_a_pause(kernel: Kernel) -> None:
    """A cell that waits in input() is asked for by the page while its kernel is away, and gets the answer later."""
    name = kernel.client.execute("print('<' + input('? ') + '>')", allow_stdin=True)
    assert (await kernel.client.get_stdin_msg(timeout=TIMEOUT_S))["content"]["prompt"] == "? "
    await kernel.pause()
    kernel.client.input("answer")
    await kernel.go_on(restored=True)
    await kernel.finished(name)
    assert kernel.text(name) == "<answer>\n"


async def test_idleness_begins_with_the_last_output(kernel: Kernel, places: Places) -> None:
    """Zero while a cell runs, then growing; what a page asks by itself does not matter."""
    seen = places.root / "seen"
    name = kernel.client.execute(
        f"print(1, flush=True)\nimport os, time\nwhile not os.path.exists({str(seen)!r}): time.sleep(0.01)"
    )
    await kernel.until(lambda: kernel.text(name) == "1\n")
    assert kernel.proxy.idle_s == 0
    seen.touch()
    await kernel.finished(name)
    began = time.monotonic()
    await kernel.finished(kernel.ask("kernel_info_request"), kernel.ask("comm_info_request"))
    assert kernel.proxy.idle_s >= time.monotonic() - began
    await kernel.pause()
    before = kernel.proxy.idle_s
    await kernel.go_on()
    assert kernel.proxy.idle_s < before


async def test_a_restart_of_a_paused_kernel_begins_anew(kernel: Kernel) -> None:
    """Another kernel takes its place: open cells of the old one are over, those that wait are done."""
    running = kernel.client.execute("print('begun', flush=True)\nimport time; time.sleep(60)")
    await kernel.until(lambda: "begun" in kernel.text(running))
    await kernel.pause()
    kernel.ask("interrupt_request", channel="control")
    name = kernel.client.execute("print('new')")
    guest = await kernel.rig.guest()
    assert (await guest.asked())["header"]["msg_id"] == name
    assert kernel.proxy.open_requests == 1
    assert guest.requests.empty()
