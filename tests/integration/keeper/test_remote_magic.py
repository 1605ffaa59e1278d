"""`%%remote` in real kernels, through a real keeper: one of Warmcell's own, and a plain one with `%load_ext`."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.integration.process.guest import Kernel, Output, connected
from tests.integration.process.test_guest_kernels import output_of, plain_kernel
from tests.leaks import Places
from warmcell.sandbox.channel import KernelStarted
from warmcell.sandbox.client.keeper import KeeperClient

both = pytest.mark.parametrize("kernel", ["warmcell", "plain"], indirect=True)


@contextlib.asynccontextmanager
async def warmcell_kernel(keeper: KeeperClient, body: dict[str, Any]) -> AsyncIterator[Kernel]:
    """A notebook's kernel as the provisioner starts it."""
    await keeper.post("/kernels", body)
    client = await connected(body["connection"], key=body["connection"]["key"])
    yield Kernel(KernelStarted(pid=0, started_from="cold", sockets=""), client)
    client.stop_channels()
    await keeper.delete(f"/kernels/{body['kernel_id']}")


@pytest.fixture(params=["warmcell"])
async def kernel(
    request: pytest.FixtureRequest, keeper: KeeperClient, kernel_body: Callable[..., dict[str, Any]], places: Places
) -> AsyncIterator[Kernel]:
    """A kernel with `%%remote` in it."""
    (places.root / "h").mkdir()
    if request.param == "warmcell":
        async with warmcell_kernel(keeper, kernel_body()) as kernel:
            yield kernel
    else:
        async with plain_kernel(places.root, home=places.root / "h") as kernel:
            assert (await kernel.run("%load_ext warmcell")).status == "ok"
            yield kernel
            await kernel.run("%unload_ext warmcell")


def body_of(output: Output) -> str:
    """What the cell printed after the line that says where it ran."""
    first, _, rest = output.text.partition("\n")
    assert first.startswith("Remote: "), output
    return rest


async def remotes(keeper: KeeperClient) -> list[str]:
    """Ids of sandboxes that no notebook's kernel is in."""
    return [box["id"] for box in (await keeper.get("/sandboxes"))["sandboxes"] if not box["kernel_id"]]


@both
async def test_a_cell_runs_elsewhere_and_says_where(kernel: Kernel, keeper: KeeperClient) -> None:
    """The first line names the sandbox and how it was started; the process is another one; the next cell is warm."""
    here = await kernel.value("__import__('os').getpid()")
    first = await kernel.run("%%remote\nimport os\nx = 1\nprint(os.getpid())")
    assert re.match(r"Remote: sandbox [a-z0-9]{12} on CPU, not isolated, started cold in \d+ ms\n", first.text), first
    assert int(body_of(first)) != here
    second = await kernel.run("%%remote\nprint(os.getpid(), x)")
    assert ", warm\n" in second.text
    assert body_of(second) == body_of(first).strip() + " 1\n"
    assert len(await remotes(keeper)) == 1
    assert (await kernel.run("x")).error.startswith("NameError")


@both
async def test_variables_go_there_and_come_back(kernel: Kernel) -> None:
    """Objects and functions of the notebook are sent, others brought back as objects."""
    await kernel.run("data = {'a': [1, 2]}\ndef double(n):\n    return 2 * n")
    output = await kernel.run(
        "%%remote send=data,double get=result\nresult = {k: double(sum(v)) for k, v in data.items()}"
    )
    assert output.status == "ok", output
    assert await kernel.value("result") == {"a": 6}


async def test_output_is_shown_as_it_comes(kernel: Kernel) -> None:
    """What is printed first is here while the cell still runs; stderr is stderr."""
    await kernel.run("%%remote\npass")
    kernel.client.execute(
        "%%remote\nimport sys, threading\nprint('begun', flush=True)\nprint('oh', file=sys.stderr, flush=True)\n"
        "event = threading.Event(); event.wait(1000)"
    )
    await output_of(kernel, "begun")
    await output_of(kernel, "oh")
    kernel.client.control_channel.send(kernel.client.session.msg("interrupt_request"))
    await reply_of(kernel)


async def test_rich_display_updates_and_clears(kernel: Kernel) -> None:
    """Display data come with their metadata and ids, results as display, clear_output clears."""
    shown: list[dict[str, Any]] = []
    client = kernel.client
    code = (
        "%%remote\nfrom IPython.display import HTML, clear_output, display\n"
        "handle = display(HTML('<b>1</b>'), display_id='mine', metadata={'k': 'v'})\n"
        "handle.update(HTML('<b>2</b>'))\nclear_output(wait=True)\n40 + 2"
    )
    await client.execute_interactive(code, output_hook=shown.append, timeout=60)
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


async def test_an_error_there_is_an_error_here(kernel: Kernel) -> None:
    """It has the remote's name, text and traceback, the cell fails, and the sandbox is still good."""
    errors: list[dict[str, Any]] = []
    reply = await kernel.client.execute_interactive(
        "%%remote\ndef inner():\n    return {}['missing']\ninner()",
        output_hook=lambda m: errors.append(m["content"]) if m["msg_type"] == "error" else None,
        timeout=60,
        stop_on_error=False,
    )
    assert reply["content"]["status"] == "error"
    assert (errors[0]["ename"], errors[0]["evalue"]) == ("KeyError", "'missing'")
    traceback = "\n".join(errors[0]["traceback"])
    assert "inner" in traceback
    assert "urlopen" not in traceback
    assert "magic" not in traceback
    assert body_of(await kernel.run("%%remote\nprint(inner.__name__)")) == "inner\n"


@both
async def test_the_stop_button_stops_the_remote_cell(kernel: Kernel) -> None:
    """An interrupt here is one there; the cell ends with KeyboardInterrupt, and what it made is kept."""
    await kernel.run("%%remote\npass")
    kernel.client.execute("%%remote\nimport time\nkept = 5\nprint('up', flush=True)\ntime.sleep(1000)")
    await output_of(kernel, "up")
    kernel.client.control_channel.send(kernel.client.session.msg("interrupt_request"))
    assert (await reply_of(kernel))["ename"] == "KeyboardInterrupt"
    assert body_of(await kernel.run("%%remote\nprint(kept)")) == "5\n"


async def test_a_cell_that_does_not_stop_loses_its_sandbox(kernel: Kernel, keeper: KeeperClient) -> None:
    """A second stop gives up on it; the sandbox is removed, and the next cell gets another."""
    await kernel.run("%%remote\npass")
    kernel.client.execute(
        "%%remote\nimport signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('deaf', flush=True)\n"
        "import threading; threading.Event().wait(1000)"
    )
    await output_of(kernel, "deaf")
    before = await remotes(keeper)
    for _ in range(2):
        kernel.client.control_channel.send(kernel.client.session.msg("interrupt_request"))
        await asyncio.sleep(0.5)
    assert (await reply_of(kernel))["ename"] == "KeyboardInterrupt"
    assert "started" in (await kernel.run("%%remote\npass")).text
    assert not set(before) & set(await remotes(keeper))


async def test_what_cannot_be_is_one_error(kernel: Kernel) -> None:
    """A malformed line, a variable that is not there or cannot travel, an unknown GPU: one message each."""
    await kernel.run("lock = __import__('threading').Lock()")
    for cell, said in {
        "%%remote gpus=A100\n1": "Did you mean gpu?",
        "%%remote send=missing\n1": "there is no variable missing",
        "%%remote\n  \n": "there are none",
        "%%remote send=lock\n1": "lock cannot be sent",
        "%%remote gpu=Z9000\n1": "Z9000",
        "%%remote get=nothing\npass": "name 'nothing' is not defined in the remote cell",
    }.items():
        output = await kernel.run(cell)
        assert output.status == "error"
        assert said in output.text + output.error
        assert "Traceback" not in output.text


async def test_a_sandbox_that_is_gone_is_said_to_be_gone(kernel: Kernel, keeper: KeeperClient) -> None:
    """When a kept sandbox was removed meanwhile, the next cell says that its variables are lost and runs in another."""
    await kernel.run("%%remote\nx = 1")
    for sandbox in await remotes(keeper):
        await keeper.delete(f"/sandboxes/{sandbox}")
    output = await kernel.run("%%remote\nprint('x' in globals())")
    assert "it is gone, with its variables" in output.text
    assert output.text.endswith("False\n")


async def test_a_remote_kernel_that_dies_is_said_to_have_died(kernel: Kernel) -> None:
    """The cell fails with how it ended, and the next one runs in a new sandbox."""
    output = await kernel.run("%%remote\nimport os; os._exit(7)")
    assert output.status == "error"
    assert "7" in output.error
    assert "started" in (await kernel.run("%%remote\npass")).text


async def test_sandboxes_go_with_the_kernel(keeper: KeeperClient, kernel_body: Any) -> None:
    """When the notebook's kernel ends, what it had asked for is removed."""
    async with warmcell_kernel(keeper, kernel_body()) as kernel:
        await kernel.run("%%remote\npass")
        assert len(await remotes(keeper)) == 1
    assert await remotes(keeper) == []


async def test_help_shows_the_table(keeper: KeeperClient, kernel_body: Any) -> None:
    """`%%remote?` is the documentation."""
    async with warmcell_kernel(keeper, kernel_body()) as kernel:
        reply = await kernel.client.execute("%%remote?", reply=True, timeout=60)
        text = reply["content"]["payload"][0]["data"]["text/plain"]
        assert "gpu=H100:2" in text
        assert "send=data,model" in text


async def reply_of(kernel: Kernel) -> dict[str, Any]:
    """The content of the next execute reply."""
    async with asyncio.timeout(60):
        while True:
            message = await kernel.client.get_shell_msg(timeout=60)
            if message["msg_type"] == "execute_reply":
                return dict(message["content"])
