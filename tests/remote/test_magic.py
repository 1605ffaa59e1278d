"""`%%remote` in real kernels, through a real keeper: what it sends, shows, raises and stops."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from tests.integration.process.guest import Kernel
from tests.integration.process.test_guest_kernels import output_of, plain_kernel
from tests.leaks import Places
from tests.remote.conftest import body_of, interrupt, kernel_of, reply_of
from warmcell.sandbox.client.keeper import KeeperClient

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def remotes(keeper: KeeperClient) -> list[str]:
    """Ids of sandboxes that no notebook's kernel is in."""
    return [
        box["id"]
        for box in (await keeper.get("/sandboxes"))["sandboxes"]
        if not box["kernel_id"] and box["state"] == "running"
    ]


async def test_a_cell_runs_elsewhere_and_says_where(kernel: Kernel) -> None:
    """The first line names the sandbox and how it was started; the process is another one; the next cell is warm."""
    here = await kernel.value("__import__('os').getpid()")
    first = await kernel.run("%%remote session=where\nimport os\nx = 1\nprint(os.getpid())")
    assert re.match(r"Remote: sandbox [a-z0-9]{12} on CPU, not isolated, started cold in \d+ ms\n", first.text), first
    assert int(body_of(first)) != here
    second = await kernel.run("%%remote session=where\nprint(os.getpid(), x)")
    assert ", warm\n" in second.text
    assert body_of(second) == body_of(first).strip() + " 1\n"
    assert (await kernel.run("x")).error.startswith("NameError")


async def test_a_plain_kernel_has_it_too(module_places: Places, keeper: KeeperClient) -> None:
    """After `%load_ext warmcell`: values go, come back, and its sandboxes go with the extension."""
    (module_places.root / "h").mkdir()
    async with plain_kernel(module_places.root, home=module_places.root / "h") as kernel:
        assert (await kernel.run("%load_ext warmcell")).status == "ok"
        before = await remotes(keeper)
        await kernel.run(
            "import numpy as np\nbig = np.arange(100_000)\ndef total(x):\n    return int(x.sum()) + one\none = 1"
        )
        output = await kernel.run("%%remote get=found\nfound = {'total': total(big), 'big': big + 1}")
        assert output.status == "ok", output
        assert await kernel.value("[found['total'], int(found['big'][-1])]") == [4999950001, 100000]
        (new,) = set(await remotes(keeper)) - set(before)
        assert (await keeper.get(f"/sandboxes/{new}"))["owner"] == "remote"  # So it is released when it is idle.
        forked = await kernel.run("%%remote fork\n1")
        assert forked.error == "ForkError: This kernel cannot be forked. Run the notebook on a Warmcell kernel."
        await kernel.run("%unload_ext warmcell")
        assert await remotes(keeper) == before


async def test_without_an_engine_nothing_is_forked(kernel: Kernel, keeper: KeeperClient) -> None:
    """The error says why, and what to do; nothing was made, and cells without fork go on as before."""
    before = await remotes(keeper)
    forked = await kernel.run("%%remote fork n=2\n1")
    assert forked.error.startswith("ForkError: "), forked
    assert "cannot save memory. Use the bubblewrap backend" in forked.error or "on this machine" in forked.error
    assert forked.text == ""
    assert await remotes(keeper) == before
    assert (await kernel.run("%%remote\n6 * 7")).status == "ok"


async def test_what_a_cell_reads_is_sent_by_itself(kernel: Kernel) -> None:
    """Objects, functions with what they use, modules; and what is assigned there can be brought back."""
    await kernel.run("import math\ndata = {'a': [1, 4]}\nscale = 2\ndef double(n):\n    return scale * math.sqrt(n)")
    output = await kernel.run("%%remote get=result\nresult = {k: sum(double(x) for x in v) for k, v in data.items()}")
    assert output.status == "ok", output
    assert await kernel.value("result") == {"a": 6.0}


async def test_what_a_rank_has_is_sent_again_only_when_it_changes(kernel: Kernel) -> None:
    """An array crosses once; a change here crosses again; what the rank made of it meanwhile stays otherwise."""
    await kernel.run("import numpy as np\narray = np.zeros(1_000_000)")
    sent = "int(get_ipython().magics_manager.magics['cell']['remote'].__self__._jobs.all()[-1]._fan_out.sent_bytes)"
    assert body_of(await kernel.run("%%remote\narray[0] += 1\nprint(array[0])")) == "1.0\n"
    assert await kernel.value(sent) > 8_000_000
    assert body_of(await kernel.run("%%remote\narray[0] += 1\nprint(array[0])")) == "2.0\n"
    assert await kernel.value(sent) < 10_000
    await kernel.run("array[1] = 5")
    assert body_of(await kernel.run("%%remote\nprint(array[:2])")) == "[0. 5.]\n"
    assert body_of(await kernel.run("%%remote\ndel array")) == ""
    assert body_of(await kernel.run("%%remote\nprint(array[1])")) == "5.0\n"
    await kernel.run("%%remote\narray = 'its own'")
    assert body_of(await kernel.run("%%remote\nprint(array)")) == "its own\n"
    assert body_of(await kernel.run("%%remote send=array\nprint(array[1])")) == "5.0\n"


async def test_modules_of_the_folder_are_as_they_are_here(kernel: Kernel, folder: Path) -> None:
    """A module that was changed and loaded again here is the changed one there too."""
    (folder / "wc_own.py").write_text("def f():\n    return 1\n")
    await kernel.run("import sys, importlib; sys.path.insert(0, ''); import wc_own")
    assert body_of(await kernel.run("%%remote\nprint(wc_own.f())")) == "1\n"
    (folder / "wc_own.py").write_text("def f():\n    return 'changed'\n")
    await kernel.run("importlib.reload(wc_own)")
    assert body_of(await kernel.run("%%remote\nprint(wc_own.f())")) == "changed\n"


async def test_as_names_the_value_of_the_last_line(kernel: Kernel) -> None:
    """It is shown as ever, and here under that name."""
    output = await kernel.run("%%remote as=answer\n40 + 2")
    assert output.data[-1]["text/plain"] == "42"
    assert await kernel.value("answer") == 42


async def test_output_is_shown_as_it_comes(kernel: Kernel) -> None:
    """What is printed first is here while the cell still runs; stderr is stderr."""
    kernel.client.execute(
        "%%remote\nimport sys, threading\nprint('begun', flush=True)\nprint('oh', file=sys.stderr, flush=True)\n"
        "event = threading.Event(); event.wait(1000)"
    )
    await output_of(kernel, "begun")
    await output_of(kernel, "oh")
    interrupt(kernel)
    await reply_of(kernel)


async def test_rich_display_updates_and_clears(kernel: Kernel) -> None:
    """Display data come with their metadata and ids, results as display, clear_output clears."""
    shown: list[dict[str, Any]] = []
    code = (
        "%%remote\nfrom IPython.display import HTML, clear_output, display\n"
        "handle = display(HTML('<b>1</b>'), display_id='mine', metadata={'k': 'v'})\n"
        "handle.update(HTML('<b>2</b>'))\nclear_output(wait=True)\n40 + 2"
    )
    await kernel.client.execute_interactive(code, output_hook=shown.append, timeout=60)
    kinds = ("display_data", "update_display_data", "clear_output", "execute_result")
    told = [message for message in shown if message["msg_type"] in kinds]
    assert [message["msg_type"] for message in told] == [*kinds[:3], "display_data"]
    first, update, clear, result = (message["content"] for message in told)
    assert first["data"]["text/html"] == "<b>1</b>"
    assert first["metadata"] == {"k": "v"}
    assert first["transient"] == update["transient"] == {"display_id": "mine"}
    assert update["data"]["text/html"] == "<b>2</b>"
    assert clear["wait"] is True
    assert result["data"]["text/plain"] == "42"


async def test_a_figure_that_was_made_here_is_a_picture_there(kernel: Kernel) -> None:
    """Although nothing there has imported pyplot."""
    await kernel.run("import matplotlib.pyplot as plt\nfigure, axes = plt.subplots(); plt.close(figure)")
    output = await kernel.run("%%remote session=figures\naxes.set_title('there')\nfigure")
    assert [data for data in output.data if "image/png" in data], output
    await kernel.run("%remote close figures")


async def test_an_error_there_is_an_error_here(kernel: Kernel) -> None:
    """It has the remote's name, text and traceback, lines as they are counted here, and the sandbox is still good."""
    errors: list[dict[str, Any]] = []
    reply = await kernel.client.execute_interactive(
        "%%remote\ndef inner():\n    return {}['missing']\ninner()",
        output_hook=lambda m: errors.append(m["content"]) if m["msg_type"] == "error" else None,
        timeout=60,
        stop_on_error=False,
    )
    assert reply["content"]["status"] == "error"
    assert (errors[0]["ename"], errors[0]["evalue"]) == ("KeyError", "'missing'")
    traceback = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(errors[0]["traceback"]))
    assert f"Cell In[{reply['content']['execution_count']}], line 4" in traceback
    assert "inner" in traceback
    for ours in ("urlopen", "magic", "fanout"):
        assert ours not in traceback
    assert body_of(await kernel.run("%%remote\nprint(inner.__name__)")) == "inner\n"


async def test_the_stop_button_stops_the_remote_cell(kernel: Kernel) -> None:
    """An interrupt here is one there; the cell ends with KeyboardInterrupt, and what it made is kept."""
    kernel.client.execute("%%remote\nimport time\nkept = 5\nprint('up', flush=True)\ntime.sleep(1000)")
    await output_of(kernel, "up")
    interrupt(kernel)
    assert (await reply_of(kernel))["ename"] == "KeyboardInterrupt"
    assert body_of(await kernel.run("%%remote\nprint(kept)")) == "5\n"


async def test_a_stop_that_is_pressed_twice_keeps_the_sandbox(kernel: Kernel) -> None:
    """The cell is interrupted twice, as it would be here; what it made is there still."""
    kernel.client.execute(
        "%%remote\nimport time\nkept = 7\ntry:\n    print('up', flush=True)\n    time.sleep(1000)\n"
        "finally:\n    print('once more', flush=True)\n    time.sleep(1000)"
    )
    await output_of(kernel, "up")
    interrupt(kernel)
    await output_of(kernel, "once more")
    interrupt(kernel)
    assert (await reply_of(kernel))["ename"] == "KeyboardInterrupt"
    assert body_of(await kernel.run("%%remote\nprint(kept)")) == "7\n"


async def test_a_cell_that_does_not_stop_loses_its_sandbox(kernel: Kernel, keeper: KeeperClient) -> None:
    """A third stop gives up on it, or ten seconds do; it is removed, and the next cell gets another."""
    kernel.client.execute(
        "%%remote session=deaf\nimport signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\nimport threading; threading.Event().wait(1000)"
    )
    await output_of(kernel, "deaf")
    before = await remotes(keeper)
    for _ in range(3):
        interrupt(kernel)
        await asyncio.sleep(0.3)
    assert (await reply_of(kernel))["ename"] in ("KeyboardInterrupt", "KeeperError")
    gone = set(before) - set(await remotes(keeper))
    assert len(gone) == 1


async def test_a_timeout_stops_the_cell_and_keeps_the_sandbox(kernel: Kernel) -> None:
    """The error says how long it had; what the cell had made is there still."""
    output = await kernel.run("%%remote timeout=0.5s\nmade = 1\nimport time; time.sleep(1000)")
    assert output.status == "error"
    assert "did not end within 0.5 s and was interrupted. Give it more time" in output.error
    assert body_of(await kernel.run("%%remote\nprint(made)")) == "1\n"


async def test_what_cannot_be_is_one_error(kernel: Kernel) -> None:
    """A malformed line, a variable that is not there or cannot travel, an unknown GPU: one message each."""
    await kernel.run(
        "five = 5; endless = __import__('itertools').count()\n"
        "lock = __import__('threading').Lock(); log = open('/dev/null')\n"
        "def use():\n    return lock\n"
        "import asyncio, sys, tqdm, ipywidgets, concurrent.futures\nout = sys.stdout; slider = ipywidgets.IntSlider()\n"
        "bar = tqdm.tqdm(total=3); pool = concurrent.futures.ThreadPoolExecutor(1)\n"
        "task = asyncio.ensure_future(asyncio.sleep(0))"
    )
    await kernel.run("%%remote detach as=job\n1")
    await kernel.run("job.wait(60)")
    for cell, said in {
        "%%remote gpus=A100\n1": "Did you mean gpu?",
        "%%remote n=0\n1": "ranks are counted from 1 to 32",
        "%%remote send=missing\n1": "there is no variable missing",
        "%%remote each=missing\n1": "there is no variable missing",
        "%%remote each=endless\n1": "endless has more than 1,000,000 items. Take them in parts",
        "import warmcell; warmcell.remote()(abs).map(endless)": "what is mapped has more than 1,000,000 items",
        "%%remote each=five\n1": "five has no items, it is of type int",
        "%%remote\n  \n": "there are none",
        "%%remote\nlock.acquire()": "lock cannot be sent: it is a lock. Make one in the remote cell",
        "%%remote\nuse()": "use (which uses lock) cannot be sent: it is a lock",
        "%%remote\nlog.write('x')": "log cannot be sent: it is an open file. Send its path",
        "%%remote\nbar.update()": "bar cannot be sent: it is a progress bar. Make it in the remote cell",
        "%%remote\nslider": "slider cannot be sent: it is a widget. Make it in the remote cell",
        "%%remote\nout.write('x')": "out cannot be sent: it is this notebook's output. Use sys.stdout",
        "%%remote\nawait task": "task cannot be sent: it is a future. Await it first",
        "%%remote\npool": "pool cannot be sent: it is a pool of workers",
        "%%remote session=more\njob": "job cannot be sent: it is a remote cell. Send what it has brought back",
        "%%remote get=there\nimport threading\nthere = [threading.Lock()]": "there[0] cannot be brought back: it is a",
        "%%remote as=got\n(i for i in [1])": "The last line's value cannot be brought back: it is a generator",
        "%%remote gpu=Z9000\n1": "Z9000",
        "%%remote get=nothing\npass": "name 'nothing' is not defined in the remote cell",
        "%%remote\ninput('name?')": "input() cannot be answered in a remote cell",
        "%%remote\nexit()": "`%remote close`, in the notebook, removes its ranks",
        "%%remote\nquit()": "A rank does not end with its cell",
        "%remote lst": "Did you mean ls?",
        "%remote logs 999": "there is no remote cell 999",
    }.items():
        output = await kernel.run(cell)
        assert output.status == "error", cell
        assert said in output.text + output.error, cell
        assert "Traceback" not in output.text
    untold = await kernel.client.execute("%%remote get=nothing\npass", reply=True, stop_on_error=False, timeout=60)
    assert untold["content"]["traceback"] == ["NameError: name 'nothing' is not defined in the remote cell"]


async def test_a_remote_cell_has_remote_cells_one_level_deep(kernel: Kernel, keeper: KeeperClient) -> None:
    """In sandboxes of their own, which go with the rank's; those have none, and no rank may ask for what is saved."""
    before = await remotes(keeper)
    output = await kernel.run(
        "%%remote session=outer get=found,told,refused\nimport os\nshell, base = get_ipython(), 40\n"
        "shell.run_cell_magic('remote', 'get=found', 'import os\\nfound = [base + 2, os.getpid()]')\n"
        "found.append(os.getpid())\nagain = \"get_ipython().run_cell_magic('remote', '', '1')\"\n"
        "told = refused = ''\ntry:\n    shell.run_cell_magic('remote', '', again)\nexcept Exception as error:\n"
        "    told = str(error)\ntry:\n    shell.run_line_magic('snapshot', '')\nexcept Exception as error:\n"
        "    refused = str(error)"
    )
    assert output.error == "", output
    answer, inner, outer = await kernel.value("found")
    assert answer == 42
    assert len({inner, outer, await kernel.value("__import__('os').getpid()")}) == 3
    assert "No other sandbox can be asked for from here" in await kernel.value("told")
    assert "A rank of a remote cell has no snapshots" in await kernel.value("refused")
    assert len(await remotes(keeper)) == len(before) + 2
    await kernel.run("%remote close outer")
    assert await remotes(keeper) == before


async def test_a_sandbox_that_is_gone_is_said_to_be_gone(kernel: Kernel, keeper: KeeperClient) -> None:
    """When a kept sandbox was removed meanwhile, the next cell says that its variables are lost and runs in another."""
    output = await kernel.run("%%remote session=gone\nx = 1")
    found = re.search(r"sandbox (\w{12})", output.text)
    assert found is not None
    await keeper.delete(f"/sandboxes/{found[1]}")
    output = await kernel.run("%%remote session=gone\nprint('x' in globals())")
    assert "it is gone, with its variables" in output.text
    assert output.text.endswith("False\n")


async def test_a_remote_kernel_that_dies_is_said_to_have_died(kernel: Kernel) -> None:
    """The cell fails with how it ended, and the next one runs in a new sandbox."""
    output = await kernel.run("%%remote session=dies\nimport os; os._exit(7)")
    assert output.status == "error"
    assert "7" in output.error
    after = (await kernel.run("%%remote session=dies\npass")).text
    assert "it is gone, with its variables; another one takes its place" in after
    assert "started" in after
    assert "gone" not in (await kernel.run("%%remote session=dies\npass")).text


async def test_sandboxes_go_with_the_kernel_or_when_told(keeper: KeeperClient, folder: Path) -> None:
    """`%remote close` removes them, and the end of the notebook's kernel."""
    before = await remotes(keeper)
    async with kernel_of(keeper, folder) as kernel:
        await kernel.run("%%remote\npass")
        await kernel.run("%%remote session=other\npass")
        assert len(await remotes(keeper)) == len(before) + 2
        assert (await kernel.run("%remote close other")).text == "1 sandboxes removed\n"
        assert len(await remotes(keeper)) == len(before) + 1
    assert await remotes(keeper) == before


async def test_help_shows_the_table(kernel: Kernel) -> None:
    """`%%remote?` is the documentation."""
    reply = await kernel.client.execute("%%remote?", reply=True, timeout=60)
    text = reply["content"]["payload"][0]["data"]["text/plain"]
    for word in ("gpu=H100:2", "send=data,model", "timeout=15m", "memory=8GiB", "detach"):
        assert word in text
