"""A real ipykernel behind the proxy, spoken to by jupyter_client: everything that a direct kernel does."""

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.asynchronous import AsyncKernelClient

from tests.leaks import Places, own_places
from warmcell.kernel_provisioner.proxy import Connection, KernelProxy

TIMEOUT_S = 60.0
PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}


@dataclass
class Process:
    """A kernel with unsigned sockets, as a sandbox has it."""

    prefix: Path
    popen: subprocess.Popen[bytes]


def start_kernel(prefix: Path) -> Process:
    """Start one; it binds its sockets by and by."""
    file = prefix.with_suffix(".json")
    connection = {**PORTS, "transport": "ipc", "ip": str(prefix), "key": "", "signature_scheme": "hmac-sha256"}
    file.write_text(json.dumps(connection))
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", str(file), "--HistoryManager.enabled=False"]
    nowhere = subprocess.DEVNULL
    return Process(prefix, subprocess.Popen(argv, stdin=nowhere, stdout=nowhere, stderr=nowhere))


def end_kernel(process: Process) -> None:
    process.popen.kill()
    process.popen.wait()


@pytest.fixture(scope="module")
def kernel() -> Iterator[Process]:
    """One for all tests that leave it as it was."""
    with own_places() as places:
        made = start_kernel(places.root / "g")
        yield made
        end_kernel(made)


@pytest.fixture
async def proxy(kernel: Process, places: Places) -> AsyncIterator[KernelProxy]:
    connection = Connection.from_json({**PORTS, "transport": "ipc", "ip": str(places.root / "h"), "key": "secret"})
    made = KernelProxy(connection, name="test")
    await made.start()
    await made.connect_guest(str(kernel.prefix))
    await made.wait_ready(timeout=TIMEOUT_S)
    yield made
    await made.close()


@pytest.fixture
async def client(proxy: KernelProxy) -> AsyncIterator[AsyncKernelClient]:
    made = AsyncKernelClient()
    made.load_connection_info(proxy.connection.to_json())  # type: ignore[arg-type]
    made.start_channels()
    await made.wait_for_ready(timeout=TIMEOUT_S)
    yield made
    made.stop_channels()


async def run(client: AsyncKernelClient, code: str, **kwargs: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Execute a cell: its reply's content, and its output but for statuses."""
    heard: list[dict[str, Any]] = []
    told = {"output_hook": heard.append, "timeout": TIMEOUT_S, "stop_on_error": False, **kwargs}
    reply = await client.execute_interactive(code, **told)
    return reply["content"], [each for each in heard if each["msg_type"] not in ("status", "execute_input")]


async def ask(client: AsyncKernelClient, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """A request on the control channel, and the content of its reply."""
    message = client.session.msg(kind, content)
    client.control_channel.send(message)
    while True:
        reply = await client.get_control_msg(timeout=TIMEOUT_S)
        if reply["parent_header"]["msg_id"] == message["header"]["msg_id"]:
            found: dict[str, Any] = reply["content"]
            return found


def text(heard: list[dict[str, Any]]) -> str:
    return "".join(each["content"].get("text", "") for each in heard)


async def test_output_of_all_kinds(client: AsyncKernelClient) -> None:
    """Streams, results, rich display with updates, and a traceback."""
    code = """
import sys
from IPython.display import HTML, display
print("out"); print("err", file=sys.stderr)
handle = display(HTML("<b>1</b>"), display_id=True)
handle.update(HTML("<b>2</b>"))
6 * 7
"""
    reply, heard = await run(client, code)
    assert reply["status"] == "ok"
    kinds = [each["msg_type"] for each in heard]
    assert kinds == ["stream", "stream", "display_data", "update_display_data", "execute_result"]
    assert heard[-1]["content"]["data"]["text/plain"] == "42"
    reply, heard = await run(client, "1 / 0")
    assert (reply["status"], heard[-1]["content"]["ename"]) == ("error", "ZeroDivisionError")


async def test_a_large_output_is_whole(client: AsyncKernelClient) -> None:
    """Fifty megabytes, in one piece and in many."""
    for code in ("print('x' * 24_999_999)", "for _ in range(250): print('y' * 99_999)"):
        _, heard = await run(client, code)
        assert len(text(heard)) == 25_000_000


async def test_input(client: AsyncKernelClient) -> None:
    """`input()` asks the page and gets its answer."""
    _, heard = await run(
        client, "print('<' + input('? ') + '>')", allow_stdin=True, stdin_hook=lambda message: client.input("answer")
    )
    assert "<answer>" in text(heard)


async def test_comms_with_buffers_both_ways(client: AsyncKernelClient) -> None:
    """What widgets are made of: open, messages with binary buffers, close."""
    code = """
import comm
def opened(made, message):
    made.on_msg(lambda said: made.send({"n": len(said["buffers"][0])}, buffers=[bytes(said["buffers"][0])[::-1]]))
comm.get_comm_manager().register_target("echo", opened)
"""
    await run(client, code)
    data = bytes(range(256)) * 8000
    for kind, content, buffers in (
        ("comm_open", {"comm_id": "c1", "target_name": "echo", "data": {}}, []),
        ("comm_msg", {"comm_id": "c1", "data": {}}, [data]),
    ):
        message = client.session.msg(kind, content)
        client.session.send(client.shell_channel.socket, message, buffers=buffers)
    while (said := await client.get_iopub_msg(timeout=TIMEOUT_S))["msg_type"] != "comm_msg":
        pass
    assert said["content"]["data"] == {"n": len(data)}
    assert bytes(said["buffers"][0]) == data[::-1]


async def test_interrupts_by_message(proxy: KernelProxy, client: AsyncKernelClient) -> None:
    """The stop button's way through the control channel, and the keeper's own."""
    for interrupt in (lambda: ask(client, "interrupt_request", {}), proxy.interrupt):
        begun = asyncio.Event()
        cell = "print('begun', flush=True)\nimport time; time.sleep(60)"
        running = asyncio.create_task(
            client.execute_interactive(
                cell,
                output_hook=lambda said, begun=begun: begun.set() if said["msg_type"] == "stream" else None,
                timeout=TIMEOUT_S,
                stop_on_error=False,
            )
        )
        await asyncio.wait_for(begun.wait(), TIMEOUT_S)
        assert proxy.busy
        await interrupt()
        reply = (await running)["content"]
        assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")


async def test_subshells(client: AsyncKernelClient) -> None:
    """A second shell answers while the first is busy (JupyterLab puts comms there)."""
    made = await ask(client, "create_subshell_request", {})
    begun = asyncio.Event()
    code = "import threading; event = threading.Event(); print('begun', flush=True); event.wait(600)"
    running = asyncio.create_task(
        run(client, code, output_hook=lambda message: begun.set() if message["msg_type"] == "stream" else None)
    )
    await asyncio.wait_for(begun.wait(), TIMEOUT_S)
    messages = [client.session.msg("execute_request", {"code": each, "silent": False}) for each in ("1", "event.set()")]
    for message in messages:
        message["header"]["subshell_id"] = made["subshell_id"]
    client.shell_channel.send(messages[0])
    reply = await client.shell_channel.get_msg(timeout=TIMEOUT_S)
    assert reply["parent_header"]["msg_id"] == messages[0]["header"]["msg_id"]
    assert not running.done()
    client.shell_channel.send(messages[1])
    await running
    assert (await ask(client, "delete_subshell_request", made))["status"] == "ok"


async def test_the_debugger_is_reached(client: AsyncKernelClient) -> None:
    """`debug_request` on control: what JupyterLab's debugger begins with."""
    told = await ask(client, "debug_request", {"type": "request", "seq": 1, "command": "debugInfo", "arguments": {}})
    assert told["success"]
    assert told["body"]["isStarted"] is False


async def test_questions_of_a_page(client: AsyncKernelClient) -> None:
    """Completion, inspection, history, comms, and whether a cell is complete."""
    assert "print" in (await client.complete("prin", reply=True, timeout=TIMEOUT_S))["content"]["matches"]
    assert (await client.inspect("print", reply=True, timeout=TIMEOUT_S))["content"]["found"]
    assert (await client.is_complete("1 +", reply=True, timeout=TIMEOUT_S))["content"]["status"] == "invalid"
    assert (await client.history(reply=True, timeout=TIMEOUT_S))["content"]["status"] == "ok"
    assert (await client.comm_info(reply=True, timeout=TIMEOUT_S))["content"]["status"] == "ok"


async def test_a_kernel_is_replaced_under_a_client(
    proxy: KernelProxy, client: AsyncKernelClient, places: Places
) -> None:
    """Its last words are heard, a cell sent meanwhile runs in the next kernel, on the same connection."""
    with contextlib.ExitStack() as stack:

        def another(name: str) -> Process:
            made = start_kernel(places.root / name)
            stack.callback(end_kernel, made)
            return made

        first = another("first")
        await proxy.connect_guest(str(first.prefix))
        await proxy.wait_ready(timeout=TIMEOUT_S)
        client.execute("import os, time\nfor n in range(2000): print(n, flush=True)\ntime.sleep(0.3)\nos._exit(7)")
        await asyncio.to_thread(first.popen.wait)
        await proxy.drop_guest()
        second = another("second")
        sent = client.execute("print('from the second')")
        await proxy.connect_guest(str(second.prefix))
        await proxy.wait_ready(timeout=TIMEOUT_S)
        said = ""
        while not said.endswith("from the second\n"):
            message = await client.get_iopub_msg(timeout=TIMEOUT_S)
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                said += message["content"]["text"]
        assert message["parent_header"]["msg_id"] == sent
        assert said.splitlines() == [*(str(n) for n in range(2000)), "from the second"]


async def test_no_key_is_in_the_kernel(client: AsyncKernelClient, kernel: Process) -> None:
    """Neither its connection nor its memory of a session holds what clients sign with."""
    _, heard = await run(client, "print(repr(get_ipython().kernel.session.key))")
    assert text(heard).strip() == "b''"
    assert "secret" not in kernel.prefix.with_suffix(".json").read_text()


async def test_a_flood_of_displays_ends_in_order(client: AsyncKernelClient) -> None:
    """Thousands of messages in a row arrive in theirs."""
    _, heard = await run(client, "from IPython.display import display\nfor n in range(1500): display(n)")
    shown = [int(each["content"]["data"]["text/plain"]) for each in heard]
    assert shown == list(range(1500))
