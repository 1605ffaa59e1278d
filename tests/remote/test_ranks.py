"""Several ranks: what they are told, what is shown of them, work queues, futures, and cells that were detached."""

import math
import os
import random
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.keeper.conftest import until
from tests.integration.process.guest import Kernel
from tests.integration.process.test_guest_kernels import output_of
from tests.remote.conftest import interrupt, is_sum, kernel_of, reply_of
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.guest.magics.groups import RANKS

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRAIN = (Path(__file__).parent / "cells" / "train.py").read_text()


async def shown(kernel: Kernel, code: str) -> tuple[str, str, str]:
    """Run a cell: what its groups are in the end, as text and as HTML, and its error."""
    last: dict[str, Any] = {}
    error = ""

    def hook(message: dict[str, Any]) -> None:
        nonlocal error
        kind, content = message["msg_type"], message["content"]
        if kind in ("display_data", "update_display_data") and not is_sum(content["data"]):
            last.update(message["content"]["data"])
        elif message["msg_type"] == "error":
            error = "\n".join(message["content"]["traceback"])

    await kernel.client.execute_interactive(code, output_hook=hook, timeout=120, stop_on_error=False)
    return last.get("text/plain", ""), last.get("text/html", ""), re.sub(r"\x1b\[[\d;]*m", "", error)


async def test_ranks_know_each_other_and_bring_back_lists(kernel: Kernel) -> None:
    """Each has torchrun's variables; values come back in the order of the ranks; one network, one shared memory."""
    await kernel.run(
        "names = ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'ROLE_RANK', 'ROLE_WORLD_SIZE', 'GROUP_RANK', 'MASTER_ADDR', "
        "'MASTER_PORT', 'NCCL_HOSTID']"
    )
    output = await kernel.run(
        "%%remote n=3 get=told as=places\nimport os\ntold = [os.environ[name] for name in names]\n"
        "[os.readlink(f'/proc/self/ns/{kind}') for kind in ('net', 'ipc')]"
    )
    assert output.status == "ok", output
    told = await kernel.value("told")
    ranks = [str(rank) for rank in range(3)]
    assert [one[:7] for one in told] == [[rank, "3", rank, rank, "3", "0", "127.0.0.1"] for rank in ranks]
    assert len({tuple(one[7:]) for one in told}) == 1
    assert await kernel.value("len({tuple(one) for one in places})") == 1


async def test_output_is_grouped_by_rank(kernel: Kernel) -> None:
    """A group for each, with its text, what was written over left out, and its displays; then a summary."""
    text, html, error = await shown(
        kernel,
        "%%remote n=3\nimport os\nfrom IPython.display import HTML\nr = os.environ['RANK']\n"
        "print('0 %\\r50 %\\r100 % of', r)\nprint('<tag>')\nHTML(f'<b>rank {r}</b>')",
    )
    assert error == ""
    for rank in range(3):
        assert f"── Rank {rank} · done" in text
        assert f"100 % of {rank}\n<tag>" in text
        assert f"<b>rank {rank}</b>" in html
    assert "50 %" not in text
    assert "&lt;tag&gt;" in html
    assert re.search(r"3 ranks · done · \d+\.\d s, \d+\.\d s of ranks · \d+\.\d MiB sent$", text)


async def test_the_first_failure_stops_the_others(kernel: Kernel) -> None:
    """Its error is this cell's, with its rank's name; the others are interrupted; what all printed is kept."""
    text, _, error = await shown(
        kernel,
        "%%remote n=3\nimport os, time\nprint('begun', flush=True)\n"
        "if os.environ['RANK'] == '1':\n    raise ValueError('only this one')\ntime.sleep(1000)",
    )
    assert error.startswith("Rank 1:")
    assert error.endswith("ValueError: only this one")
    assert re.search(r"── Rank 1 · failed · CPU · .*\nbegun\nValueError: only this one\n", text)
    assert re.search(r"── Rank 0 · stopped · CPU · .*\nbegun\n", text)
    assert (await kernel.run("%%remote n=3 as=fine\nos.environ['RANK']")).status == "ok"
    assert await kernel.value("fine") == ["0", "1", "2"]


async def test_progress_bars_are_those_of_their_ranks(kernel: Kernel) -> None:
    """tqdm's, as text and as widgets, of one rank and of several; where each was when it ended."""
    cell = (
        "import os\nfrom tqdm.notebook import tqdm as bars\nfrom tqdm import tqdm\n"
        "n = int(os.environ['RANK']) + 2\nfor _ in bars(range(4 * n), desc=f'bar of {n}'): pass\n"
        "for _ in tqdm(range(n), ncols=60): pass"
    )
    text, html, error = await shown(kernel, f"%%remote n=2\n{cell}")
    assert error == ""
    for n in (2, 3):
        assert re.search(rf"bar\sof\s{n}:\s100% 100 % \s*{4 * n}/{4 * n}\s", text)
        assert re.search(rf"100%\|█+\| {n}/{n} ", text)
    assert html.count("value='1.0000'") == 2
    text, html, error = await shown(kernel, f"%%remote\n{cell}")
    assert error == ""
    assert re.search(r"bar\sof\s2:\s100% 100 % \s*8/8\s", text)


async def test_a_rank_tells_its_memory_while_it_works(kernel: Kernel) -> None:
    """Each its own, as it grows."""
    kernel.client.execute(
        "%%remote n=2\nimport os, threading\nx = bytearray(os.urandom(1) * (int(os.environ['RANK']) * 200 * 2**20))\n"
        "threading.Event().wait(1000)"
    )
    while True:
        message = await kernel.client.get_iopub_msg(timeout=60)
        if message["msg_type"] == "update_display_data":
            ranks = message["content"]["data"][RANKS]["ranks"]
            if all(one["memory_bytes"] for one in ranks):
                break
    assert ranks[1]["memory_bytes"] - ranks[0]["memory_bytes"] > 150 * 2**20
    interrupt(kernel)
    await reply_of(kernel)


async def test_the_stop_button_stops_all_ranks(kernel: Kernel) -> None:
    """Each is interrupted, and its variables are kept."""
    kernel.client.execute("%%remote n=3\nkept = 1\nimport time\nprint('sleeps', flush=True)\ntime.sleep(1000)")
    await until_shown(kernel, "sleeps", 3)
    interrupt(kernel)
    assert (await reply_of(kernel))["ename"] == "KeyboardInterrupt"
    assert (await kernel.run("%%remote n=3 as=kept\nkept")).status == "ok"


async def until_shown(kernel: Kernel, text: str, times: int) -> None:
    """Wait until the groups of the cell that runs have it so often."""
    while True:
        message = await kernel.client.get_iopub_msg(timeout=60)
        shows = message["msg_type"] in ("display_data", "update_display_data")
        if shows and message["content"]["data"]["text/plain"].count(text) == times:
            return


async def test_training_on_four_ranks_is_training_on_one(kernel: Kernel) -> None:
    """A cell with DDP, which names nothing of ours, has the loss of one process after 20 steps."""
    one, four = "%%remote get=loss\n", "%%remote n=4 get=losses\n"
    assert (await kernel.run(one + TRAIN)).error == ""
    text, _, error = await shown(kernel, four + TRAIN.replace("loss = ", "losses = "))
    assert error == "", text
    loss, losses = await kernel.value("loss"), await kernel.value("losses")
    assert len(losses) == 4
    assert all(math.isclose(loss, each, abs_tol=1e-6) for each in losses)


async def test_each_item_once_in_order_although_ranks_die(kernel: Kernel, folder: Path) -> None:
    """A work queue over 40 items survives two ranks that are killed, and brings back 40 results in order."""
    await kernel.run("items = list(range(40)); factor = 10")
    _, _, error = await shown(
        kernel,
        "%%remote n=4 each=items as=results\nimport os, signal\n"
        "if item in (7, 22):\n    try:\n        os.close(os.open(f'died-{item}', os.O_CREAT | os.O_EXCL))\n"
        "    except FileExistsError:\n        pass\n    else:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "(index, item * factor)",
    )
    assert error == ""
    assert sorted(path.name for path in folder.glob("died-*")) == ["died-22", "died-7"]
    assert await kernel.value("results") == [[n, 10 * n] for n in range(40)]


async def test_each_item_once_in_order_although_ranks_are_killed(kernel: Kernel, folder: Path) -> None:
    """Two ranks, killed from outside when so many items are done: other moments and ranks with each seed."""
    chance = random.Random(40)
    await kernel.run("%%remote n=4 as=pids\nimport os\nos.getpid()")
    pids = await kernel.value("pids")
    await kernel.run("numbers = list(range(40))")
    kernel.client.execute(
        "%%remote n=4 each=numbers as=results\nimport os, time\nopen(f'item-{index}', 'w').close()\n"
        "while index >= 30 and not os.path.exists('killed'): time.sleep(0.01)\n(index, item ** 2)"
    )
    for pid, done in zip(chance.sample(pids, 2), sorted(chance.sample(range(1, 25), 2)), strict=True):
        await until(partial(files, folder, "item-*", done))
        os.kill(pid, signal.SIGKILL)
    (folder / "killed").touch()
    assert (await reply_of(kernel))["status"] == "ok"
    assert await kernel.value("results") == [[n, n**2] for n in range(40)]
    assert (await kernel.run("%%remote n=4 as=after\nos.getpid()")).error == ""
    assert len(set(await kernel.value("after")) & set(pids)) == 2


async def files(folder: Path, pattern: str, count: int) -> bool:
    """Whether there are so many."""
    return len(list(folder.glob(pattern))) >= count


async def test_an_item_that_kills_every_rank_is_given_up(kernel: Kernel) -> None:
    """It is tried three times, then the error says how the rank ended."""
    await kernel.run("items = [1, 2]")
    _, _, error = await shown(kernel, "%%remote n=2 session=killed each=items\nimport os\nos._exit(item + 40)")
    assert re.search(r"Rank \d ended by itself with exit code 4\d", error)


async def test_a_function_runs_on_ranks(kernel: Kernel) -> None:
    """Calls, maps and futures; errors are the function's own, and stop nobody else's future."""
    await kernel.run("import warmcell\nbase = 100\ndef f(x, plus=0):\n    return base // x + plus")
    await kernel.run("g = warmcell.remote(n=3)(f)")
    assert await kernel.value("[g(5), g(5, plus=1), g.map([1, 2, 4]), g.map([])]") == [20, 21, [100, 50, 25], []]
    assert await kernel.value("[one.result(60) for one in [g.submit(n) for n in (1, 2, 5, 10)]]") == [100, 50, 20, 10]
    assert (await kernel.run("g.map([1, 0, 2])")).error.startswith("ZeroDivisionError")
    assert await kernel.value("[type(one.exception(60)).__name__ for one in [g.submit(0), g.submit(1)]]") == [
        "ZeroDivisionError",
        "NoneType",
    ]
    assert (await kernel.run("warmcell.remote(n=0)")).error.startswith(
        "ArgumentError: n=0: ranks are counted from 1 to"
    )
    assert "c.Warmcell" not in (await kernel.run("warmcell.remote(n=0)")).error


async def test_functions_of_all_kinds_run_on_ranks(kernel: Kernel) -> None:
    """Asynchronous ones are awaited there; methods, objects, classes and partial ones; without parentheses, too."""
    await kernel.run(
        "import asyncio, functools, warmcell\n@warmcell.remote\nasync def later(x):\n    'Adds one.'\n"
        "    await asyncio.sleep(0)\n    return x + 1\n"
        "class Scale:\n    def __init__(self, n): self.n = n\n    def by(self, x): return self.n * x\n"
        "    __call__ = by\nremote = warmcell.remote()"
    )
    assert await kernel.value("[later(1), later.map([2, 3]), later.__name__, later.__doc__]") == [
        2,
        [3, 4],
        "later",
        "Adds one.",
    ]
    assert await kernel.value("[remote(Scale(3).by)(4), remote(Scale(3))(5), remote(Scale)(6).n]") == [12, 15, 6]
    assert await kernel.value("[isinstance(remote(Scale)(6), Scale), remote(functools.partial(pow, 2))(5)]") == [
        True,
        32,
    ]
    refused = await kernel.run("remote(lambda: (x for x in [1]))()")
    assert "What the function returns cannot be brought back: it is a generator" in refused.error, refused


async def test_an_error_of_the_notebooks_own_is_caught_as_such(kernel: Kernel) -> None:
    """By its class, or one above it, whatever its class makes of its arguments."""
    await kernel.run(
        "import warmcell\nclass OwnError(LookupError):\n    def __init__(self, code):\n"
        "        super().__init__(f'code {code}')\ndef fails():\n    raise OwnError(5)\n"
        "def caught(kind):\n    try:\n        warmcell.remote()(fails)()\n    except kind as error:\n"
        "        return [type(error).__name__, str(error)]"
    )
    assert await kernel.value("[caught(OwnError), caught(LookupError)]") == [["OwnError", "code 5"]] * 2


async def displays(kernel: Kernel, *, until: str) -> dict[str, list[str]]:
    """What is displayed, by the request of the cell that shows it, until such a request has been worked off."""
    found: dict[str, list[str]] = {}
    while True:
        message = await kernel.client.get_iopub_msg(timeout=60)
        cell, content = message["parent_header"].get("msg_id", ""), message["content"]
        if message["msg_type"] in ("display_data", "update_display_data"):
            found.setdefault(cell, []).append(content["data"]["text/plain"])
        assert message["msg_type"] != "error", content
        if cell == until and content.get("execution_state") == "idle":
            return found


async def test_a_function_shows_what_is_sent_and_comes_back(kernel: Kernel) -> None:
    """As a cell does, once that takes long; for what was submitted in that cell, though others run by then."""
    await kernel.run(
        "import sys, warmcell, numpy as np\n"
        "magic = get_ipython().magics_manager.magics['cell']['remote'].__self__\n"
        "ours = sys.modules[type(magic).__module__.rpartition('.')[0]]\n"
        "ours.output.SHOWN_AFTER_S = ours.fanout.TICK_S = 0.0\n"
        "def back(x):\n    return x + 1\nback = warmcell.remote()(back)\nbig = np.zeros(3_000_000)"
    )
    shown_to = [str(data["text/plain"]) for data in (await kernel.run("assert back(big)[0] == 1")).data]
    assert "Sending: 0 of 23 MiB" in shown_to, shown_to
    assert any(line.startswith("Bringing back: ") for line in shown_to), shown_to
    mapped = await kernel.run("big += 1; assert [one[0] for one in back.map([big, big + 1])] == [2, 3]")
    assert any("Sending: " in str(data) for data in mapped.data), mapped
    # It waits its turn until its cell has ended and the next one runs.
    submits = kernel.client.execute("turn = back._turn.acquire()\nfuture = back.submit(big + 5)")
    awaits = kernel.client.execute("back._turn.release()\nassert future.result(60)[0] == 7")
    shown_by = await displays(kernel, until=awaits)
    assert {"Sending", "Bringing back"} == {line.partition(":")[0] for line in shown_by.pop(submits)}
    assert shown_by == {}
    await kernel.run("ours.output.SHOWN_AFTER_S, ours.fanout.TICK_S = 1.0, 0.1")


async def test_a_detached_cell_goes_on_and_can_be_asked_for(kernel: Kernel) -> None:
    """The notebook is free meanwhile; its output is kept, its value waits, and another cell there is refused."""
    output = await kernel.run(
        "%%remote detach session=bg as=job\nimport os, time\nprint('working', flush=True)\n"
        "while not os.path.exists('go-on'):\n    time.sleep(0.02)\nprint('finished')\n6 * 7"
    )
    assert "runs on its own" in output.text
    assert await kernel.value("job.done()") is False
    assert "runs in this sandbox" in (await kernel.run("%%remote session=bg\n1")).error
    assert re.search(r"runs +sandbox", (await kernel.run("%remote ls")).text)
    await kernel.run("open('go-on', 'w').close()")
    assert "working\nfinished\n" in (await kernel.run("%remote attach")).text
    assert await kernel.value("job.result(60)") == 42
    assert "working\nfinished\n" in (await kernel.run("%remote logs")).text
    assert "done after" in (await kernel.run("%remote wait")).text


async def test_a_detached_cell_has_what_was_there_when_it_began(kernel: Kernel) -> None:
    """What changes here meanwhile is not seen there: variables, and items whose turn comes later."""
    await kernel.run(
        "import numpy as np\narray = np.zeros(20_000)\nitems = [np.zeros(20_000) for _ in range(3)]; small = [0]"
    )
    await kernel.run(
        "%%remote detach session=bg each=items as=job\nimport os, time\nwhile not os.path.exists('changed'):\n"
        "    time.sleep(0.02)\nfloat(item.sum() + array.sum()) + small[0]"
    )
    await kernel.run("array[:] = 1\nsmall[0] = 1\nfor item in items: item[:] = 1\nopen('changed', 'w').close()")
    assert await kernel.value("job.result(60)") == [0.0, 0.0, 0.0]
    refused = await kernel.run(
        "items = [1, open('/dev/null')]\nget_ipython().run_cell_magic('remote', 'detach each=items', '1')"
    )
    assert "item cannot be sent: it is an open file" in refused.error


async def test_what_a_detached_cell_brings_back_is_put_here_once(kernel: Kernel) -> None:
    """Asking for its result again changes nothing that was done with the name meanwhile."""
    await kernel.run("%%remote detach session=bg get=brought as=job\nbrought = 1; brought")
    assert await kernel.value("[job.result(60), brought]") == [1, 1]
    await kernel.run("brought = 'mine'; job.result()")
    assert await kernel.value("brought") == "mine"


async def test_a_remote_function_may_call_itself(kernel: Kernel) -> None:
    """There it is the function itself; so it is where a cell reads it."""
    await kernel.run(
        "import warmcell\n@warmcell.remote()\ndef fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)"
    )
    assert await kernel.value("fib(10)") == 55
    await kernel.run("%%remote as=here\nfib(11)")
    assert await kernel.value("here") == 89


async def test_a_detached_cell_can_be_stopped(kernel: Kernel) -> None:
    """The stop button while one looks at it only stops the looking; `%remote stop` stops it."""
    await kernel.run("%%remote detach session=bg as=job\nimport time\nprint('on', flush=True)\ntime.sleep(1000)")
    kernel.client.execute("%remote attach")
    await output_of(kernel, "on")
    interrupt(kernel)
    assert (await reply_of(kernel))["status"] == "ok"
    assert await kernel.value("job.done()") is False
    assert "stopped after" in (await kernel.run("%remote stop")).text
    assert (await kernel.run("job.result()")).error.startswith("KeyboardInterrupt")


async def test_a_rank_that_takes_too_much_memory_says_so(kernel: Kernel) -> None:
    """The error says that, with the cap and what to write; where memory cannot be capped nothing is said of it."""
    output = await kernel.run("%%remote memory=300MiB session=small\nx = bytearray(2**30)\nx[-1]")
    assert output.error == "" or "killed for memory (its cap is 0.3 GiB). Ask for more with memory=" in output.error
    await kernel.run("%remote close small")


async def test_a_flood_of_output_is_bounded(kernel: Kernel) -> None:
    """What is beyond a bound is left out, and said to be; the notebook lives on."""
    output = await kernel.run("%%remote\nline = 'x' * 99999\nfor i in range(400): print(line)")
    assert output.status == "ok"
    assert len(output.text) < 17 * 2**20
    assert "more characters of output are not shown" in output.text


async def test_too_much_is_refused_before_it_is_sent(kernel: Kernel) -> None:
    """With the sizes, the largest first, and what to do instead; nothing was copied."""
    await kernel.run("import numpy as np\nhuge = np.zeros(5 * 2**30, dtype='u1'); small = np.zeros(2**20)")
    output = await kernel.run("%%remote\nhuge[0] + small[0]")
    assert "more than the 1.0 GiB that may be sent: huge 5.0 GiB, small 8.0 MiB" in output.error
    await kernel.run("del huge")


async def test_defaults_come_from_the_notebook(keeper: KeeperClient, folder: Path) -> None:
    """Its metadata reach the kernel in its environment; the line says otherwise where it wants."""
    async with kernel_of(keeper, folder, env={"WARMCELL_REMOTE": '{"n": 2}'}) as kernel:
        await kernel.run("%%remote as=ranks\nimport os; os.environ['WORLD_SIZE']")
        assert await kernel.value("ranks") == ["2", "2"]
        await kernel.run("%%remote n=1 as=ranks\nimport os; os.environ['WORLD_SIZE']")
        assert await kernel.value("ranks") == "1"
        await kernel.run("import os, warmcell\ndef ranks():\n    return os.environ['WORLD_SIZE']")
        assert await kernel.value("[warmcell.remote()(ranks)(), warmcell.remote(n=1)(ranks)()]") == ["2", "1"]
