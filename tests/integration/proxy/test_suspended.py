"""Who answers while a kernel is suspended, and what wakes it."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from jupyter_client.asynchronous import AsyncKernelClient

from tests.integration.proxy.conftest import TIMEOUT_S, Rig
from tests.integration.proxy.kernels import Kernel, behind, state
from tests.leaks import Places
from warmcell.sandbox.errors import SnapshotError


@pytest.fixture
async def kernel(rig: Rig, places: Places) -> AsyncIterator[Kernel]:
    async with behind(rig, places.root / "k") as made:
        yield made


async def test_a_refresh_of_a_suspended_kernels_page_wakes_nothing(kernel: Kernel) -> None:
    """What a page asks by itself is answered with statuses around it, as the kernel itself would."""
    await kernel.run("import comm; comm.create_comm(target_name='slider', comm_id='c1')")
    info = kernel.ask("kernel_info_request")
    await kernel.finished(info)
    await kernel.pause()
    woken: list[float] = []
    await kernel.proxy.suspended(on_wake=lambda: woken.append(1))
    before = kernel.proxy.idle_s
    debug = {"type": "request", "seq": 7, "command": "debugInfo", "arguments": {}}
    names = {
        "info": kernel.ask("kernel_info_request"),
        "info_control": kernel.ask("kernel_info_request", channel="control"),
        "comms": kernel.ask("comm_info_request", {"target_name": "slider"}),
        "other": kernel.ask("comm_info_request", {"target_name": "none"}),
        "history": kernel.ask("history_request", {"hist_access_type": "tail", "n": 10}),
        "debug": kernel.ask("debug_request", debug, channel="control"),
        "interrupt": kernel.ask("interrupt_request", channel="control"),
    }
    await kernel.finished(*names.values())
    replies = {what: kernel.reply(name) for what, name in names.items()}
    assert replies["info"] == replies["info_control"] == {**kernel.reply(info), "banner": replies["info"]["banner"]}
    assert replies["comms"]["comms"] == {"c1": {"target_name": "slider"}}
    assert (replies["other"]["comms"], replies["history"]["history"]) == ({}, [])
    assert (replies["debug"]["body"]["isStarted"], replies["debug"]["request_seq"]) == (False, 7)
    for name in names.values():
        states = [state(each) for each in kernel.heard if each["parent_header"].get("msg_id") == name]
        assert states == ["busy", "idle"]
    assert not woken
    assert not kernel.proxy.busy
    assert kernel.proxy.idle_s > before


async def test_what_a_loaded_page_begins_waits_for_somebody_to_wake_the_kernel(kernel: Kernel) -> None:
    """Widgets' control comm and subshells, that JupyterLab begins by itself, wait; a slider's comm wakes."""
    await kernel.pause()
    woken = asyncio.Queue[float]()
    await kernel.proxy.suspended(on_wake=lambda: woken.put_nowait(1))
    control = {"comm_id": "w1", "target_name": "jupyter.widget.control", "data": {}}
    kernel.ask("comm_open", control)
    kernel.ask("comm_msg", {"comm_id": "w1", "data": {"method": "request_states"}})
    subshell = kernel.ask("create_subshell_request", channel="control")
    for channel in ("shell", "control"):  # what came before it is taken
        await kernel.finished(kernel.ask("kernel_info_request", channel=channel))
    assert woken.empty()
    await kernel.proxy.awake()
    await kernel.proxy.suspended(on_wake=lambda: woken.put_nowait(1))
    assert woken.empty()
    kernel.ask("comm_msg", {"comm_id": "slider", "data": {"method": "update"}})
    await asyncio.wait_for(woken.get(), TIMEOUT_S)
    await kernel.go_on(restored=True)
    await kernel.finished(subshell)
    assert kernel.reply(subshell)["subshell_id"]


async def test_a_cell_wakes_a_suspended_kernel_once(kernel: Kernel) -> None:
    """Cells, comms and completions wait in order and call once; after go_on the kernel answers all."""
    await kernel.run("said = []")
    await kernel.pause()
    woken = asyncio.Queue[float]()
    await kernel.proxy.suspended(on_wake=lambda: woken.put_nowait(1))
    first = kernel.ask("complete_request", {"code": "sai", "cursor_pos": 3})
    names = [first, *(kernel.client.execute(f"said.append({n})") for n in range(10))]
    await asyncio.wait_for(woken.get(), TIMEOUT_S)
    await kernel.finished(kernel.ask("kernel_info_request", channel="control"))
    await kernel.go_on(restored=True)
    await kernel.finished(*names)
    assert "said" in kernel.reply(first)["matches"]
    assert await kernel.run("print(said)") == f"{list(range(10))}\n"
    assert woken.empty()


async def test_what_waited_before_wakes_at_once_and_a_refusal_answers_it(kernel: Kernel) -> None:
    """A kernel that cannot be woken: its cells are answered with the error, and the next one calls again."""
    await kernel.pause()
    name = kernel.client.execute("1")
    await asyncio.sleep(0.05)
    woken = asyncio.Queue[float]()
    await kernel.proxy.suspended(on_wake=lambda: woken.put_nowait(1))
    await asyncio.wait_for(woken.get(), TIMEOUT_S)
    await kernel.proxy.refuse(SnapshotError("The disk is gone", hint="Bring it back."))
    await kernel.finished(name)
    assert kernel.reply(name)["evalue"] == "The disk is gone. Bring it back."
    assert [each["content"]["ename"] for each in kernel.heard if each["msg_type"] == "error"] == ["SnapshotError"]
    again = kernel.client.execute("print('here')")
    await asyncio.wait_for(woken.get(), TIMEOUT_S)
    await kernel.go_on(restored=True)
    await kernel.finished(again)
    assert kernel.text(again) == "here\n"


async def test_a_suspended_kernel_can_be_shut_down(kernel: Kernel) -> None:
    """The client has its answer, and the keeper is told whether a restart was meant."""
    await kernel.pause()
    told = asyncio.Queue[bool]()
    await kernel.proxy.suspended(on_wake=lambda: None, on_shutdown=told.put_nowait)
    name = kernel.ask("shutdown_request", {"restart": True}, channel="control")
    await kernel.finished(name)
    assert kernel.reply(name) == {"status": "ok", "restart": True}
    assert await asyncio.wait_for(told.get(), TIMEOUT_S) is True


async def test_a_client_may_come_while_a_kernel_is_suspended(kernel: Kernel) -> None:
    """A new client is ready without the kernel (jupyter_client asks for kernel_info)."""
    await kernel.pause()
    woken: list[float] = []
    await kernel.proxy.suspended(on_wake=lambda: woken.append(1))
    client: AsyncKernelClient = kernel.rig.client()
    await client.wait_for_ready(timeout=TIMEOUT_S)
    assert not woken
