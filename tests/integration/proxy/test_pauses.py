"""A real kernel is left alone and goes on, with its clients connected throughout."""

import asyncio
import contextlib
import json
import queue
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.asynchronous import AsyncKernelClient

from tests.integration.proxy.conftest import TIMEOUT_S, MakeRig, Rig, ipc, until
from tests.leaks import Places
from warmcell.sandbox.errors import ConflictError, OperationTimeoutError, SnapshotError

PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}
LOOK_AGAIN_S = 0.2
"""jupyter_client sends past asyncio, and what comes just then is not always announced."""
SERVER = Path(__file__).with_name("saved_kernel.py")


@contextlib.contextmanager
def process(prefix: Path) -> Any:
    """A kernel that can be paused."""
    file = prefix.with_suffix(".json")
    file.write_text(
        json.dumps({**PORTS, "transport": "ipc", "ip": str(prefix), "key": "", "signature_scheme": "hmac-sha256"})
    )
    nowhere = subprocess.DEVNULL
    made = subprocess.Popen([sys.executable, str(SERVER), str(file)], stdin=nowhere, stdout=nowhere, stderr=nowhere)
    try:
        yield made
    finally:
        made.kill()
        made.wait()


class Kernel:
    """A kernel behind a rig's proxy, with a client whose messages are all kept."""

    def __init__(self, rig: Rig, prefix: Path) -> None:
        self.rig, self.proxy, self.prefix = rig, rig.proxy, str(prefix)
        self.heard: list[dict[str, Any]] = []
        self.replies: list[dict[str, Any]] = []
        self.changed = asyncio.Condition()

    async def begin(self) -> None:
        """Connect proxy and client."""
        await self.proxy.connect_guest(self.prefix)
        await self.proxy.wait_ready(timeout=TIMEOUT_S)
        self.client = await self.rig.subscribed()

    async def listen(self) -> None:
        """Keep what comes."""

        async def take(get: Any, into: list[dict[str, Any]]) -> None:
            while True:
                try:
                    message = await get(timeout=LOOK_AGAIN_S)
                except queue.Empty:
                    continue
                async with self.changed:
                    into.append(message)
                    self.changed.notify_all()

        await asyncio.gather(
            take(self.client.get_iopub_msg, self.heard),
            take(self.client.get_shell_msg, self.replies),
            take(self.client.get_control_msg, self.replies),
        )

    async def until(self, condition: Any) -> None:
        """Wait for something among what came."""
        async with asyncio.timeout(TIMEOUT_S), self.changed:
            await self.changed.wait_for(condition)

    async def finished(self, *names: str) -> None:
        """Wait until these requests are answered and the kernel was idle after them."""

        def done() -> bool:
            answered = {each["parent_header"]["msg_id"] for each in self.replies}
            idle = {each["parent_header"]["msg_id"] for each in self.heard if _state(each) == "idle"}
            return answered.issuperset(names) and idle.issuperset(names)

        await self.until(done)

    async def run(self, code: str) -> str:
        """What a cell prints."""
        name = self.client.execute(code)
        await self.finished(name)
        return self.text(name)

    def text(self, name: str | None = None) -> str:
        """What was printed, by one cell or at all."""
        return "".join(
            each["content"]["text"]
            for each in self.heard
            if each["msg_type"] == "stream" and name in (None, each["parent_header"].get("msg_id"))
        )

    def reply(self, name: str) -> dict[str, Any]:
        """The only reply to a request."""
        (found,) = (each for each in self.replies if each["parent_header"]["msg_id"] == name)
        content: dict[str, Any] = found["content"]
        return content

    async def pause(self, token: str = "t") -> tuple[str, ...]:
        """Leave the kernel."""
        return await self.proxy.pause(token=token, timeout=TIMEOUT_S)

    async def go_on(self, **wishes: Any) -> None:
        """Come back to it."""
        await self.proxy.go_on(self.prefix, **{"token": "t", "restored": False, "timeout": TIMEOUT_S, **wishes})

    def ask(self, kind: str, content: dict[str, Any] | None = None, *, channel: str = "shell") -> str:
        """Send any request; its msg_id."""
        message = self.client.session.msg(kind, content or {})
        getattr(self.client, f"{channel}_channel").send(message)
        return str(message["header"]["msg_id"])


def _state(message: dict[str, Any]) -> str:
    return str(message["content"].get("execution_state", "")) if message["msg_type"] == "status" else ""


@pytest.fixture
async def kernel(rig: Rig, places: Places) -> AsyncIterator[Kernel]:
    prefix = places.root / "k"
    with process(prefix):
        made = Kernel(rig, prefix)
        await made.begin()
        listening = asyncio.create_task(made.listen())
        yield made
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


PRINTER = """
import threading, time
stop = threading.Event()
def work():
    n = 0
    while not stop.is_set():
        print(n)
        n += 1
        time.sleep(0.0005)
    print("end of", n)
thread = threading.Thread(target=work)
thread.start()
"""


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


async def test_a_cell_goes_on_through_pauses(kernel: Kernel) -> None:
    """A kernel is paused in the middle of a cell; the cell stays open, and is answered once and heard as a whole."""
    name = kernel.client.execute("import time\nfor n in range(150):\n    print(n)\n    time.sleep(0.002)")
    await kernel.until(lambda: "3" in kernel.text(name))
    for _ in range(4):
        assert await kernel.pause() == (name,)
        assert kernel.proxy.busy
        await kernel.go_on(restored=True)
    await kernel.finished(name)
    assert kernel.text(name).split() == [str(n) for n in range(150)]
    assert kernel.reply(name)["status"] == "ok"
    assert not kernel.proxy.busy
    states = [_state(each) for each in kernel.heard if each["parent_header"].get("msg_id") == name]
    assert [each for each in states if each] == ["busy", "idle"]


@pytest.mark.parametrize(("last", "status"), [("print('end')", "ok"), ("1 / 0", "error")])
async def test_a_cell_that_ends_while_the_kernel_is_away_is_answered(
    kernel: Kernel, places: Places, last: str, status: str
) -> None:
    """Its reply went to nobody; it is made up from what was kept, and comes once. Other requests are asked again."""
    ended = places.root / "ended"
    name = kernel.client.execute(
        f"import time\nprint('begun', flush=True)\ntime.sleep(0.3)\nopen({str(ended)!r}, 'w').close()\n{last}"
    )
    completion = kernel.ask("complete_request", {"code": "pri", "cursor_pos": 3})
    await kernel.until(lambda: "begun" in kernel.text(name))
    assert await kernel.pause() == (name, completion)
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


async def test_coming_back_takes_milliseconds(kernel: Kernel) -> None:
    """No pauses between attempts or questions add to it."""
    took = []
    for _ in range(10):
        await kernel.pause()
        began = time.perf_counter()
        await kernel.go_on(restored=True)
        took.append(time.perf_counter() - began)
    assert sorted(took)[3] < 0.02, took


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
        states = [_state(each) for each in kernel.heard if each["parent_header"].get("msg_id") == name]
        assert states == ["busy", "idle"]
    assert not woken
    assert not kernel.proxy.busy
    assert kernel.proxy.idle_s > before


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


async def test_an_undone_cell_is_answered_and_what_came_after_it_kept(kernel: Kernel, places: Places) -> None:
    """The asking cell is ok with its number, later ones run in the kernel that is restored, in order."""
    await kernel.run("x = 1")
    with process(places.root / "earlier"):
        asking = kernel.client.execute("print('before', flush=True)\nimport time; time.sleep(60)")
        later = [kernel.client.execute(f"print({n})") for n in range(3)]
        await kernel.until(lambda: "before" in kernel.text(asking))
        await kernel.proxy.end_open_requests(asked_by=asking)
        waiting = kernel.client.execute("print('waited')")
        await kernel.finished(asking)
        assert kernel.reply(asking) == {
            "status": "ok",
            "execution_count": 2,
            "user_expressions": {},
            "payload": [],
        }
        kernel.prefix = str(places.root / "earlier")
        await kernel.go_on()
        await kernel.finished(*later, waiting)
        assert [kernel.text(name) for name in (*later, waiting)] == ["0\n", "1\n", "2\n", "waited\n"]
        assert not kernel.proxy.busy


async def test_an_undo_from_outside_aborts_what_runs(kernel: Kernel, places: Places) -> None:
    """No cell asked for it: what had begun is aborted, what had not runs in the restored kernel."""
    with process(places.root / "earlier"):
        running = kernel.client.execute("print('begun', flush=True)\nimport time; time.sleep(60)")
        later = kernel.client.execute("print('later')")
        await kernel.until(lambda: "begun" in kernel.text(running))
        await kernel.proxy.end_open_requests()
        await kernel.finished(running)
        assert kernel.reply(running)["status"] == "aborted"
        kernel.prefix = str(places.root / "earlier")
        await kernel.go_on()
        await kernel.finished(later)
        assert kernel.text(later) == "later\n"


async def test_what_an_undone_kernel_was_in_the_middle_of_is_not_heard(kernel: Kernel) -> None:
    """Undone into the middle of a cell: its end is nobody's to hear, and the kernel is busy till then."""
    cell = "import time\nprint('begun', flush=True)\ntime.sleep(1)\nprint('ghost')"
    name = kernel.client.execute(cell)
    await kernel.until(lambda: "begun" in kernel.text(name))
    inherited = await kernel.pause()
    assert inherited == (name,)
    await kernel.proxy.end_open_requests()
    assert not kernel.proxy.busy
    await kernel.go_on(restored=True, inherited=inherited)
    assert kernel.proxy.busy
    assert await kernel.run("print('next')") == "next\n"
    assert kernel.text(name) == "begun\n"
    assert kernel.reply(name)["status"] == "aborted"
    assert not kernel.proxy.busy


async def test_a_clone_in_the_middle_of_a_cell(kernel: Kernel, make_rig: MakeRig, places: Places) -> None:
    """Its proxy knows it as busy until that cell is over; output is published, and new cells run after it."""
    name = kernel.client.execute("import time\nprint('begun', flush=True)\ntime.sleep(1)\nprint('cloned')")
    await kernel.until(lambda: "begun" in kernel.text(name))
    inherited = await kernel.pause()
    other = Kernel(await make_rig(ipc(places, ip=str(places.root / "o"))), Path(kernel.prefix))
    other.client = await other.rig.subscribed()
    listening = asyncio.create_task(other.listen())
    try:
        await other.go_on(restored=True, clone=True, inherited=inherited)
        assert other.proxy.busy
        assert other.proxy.idle_s == 0
        assert await other.run("print('own')") == "own\n"
        assert other.text(name) == "cloned\n"
        assert [each["parent_header"]["msg_id"] for each in other.replies] != [name]
        assert not other.proxy.busy
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


async def test_a_question_is_answered_after_a_pause(kernel: Kernel) -> None:
    """A cell that waits in input() is asked for by the page while its kernel is away, and gets the answer later."""
    name = kernel.client.execute("print('<' + input('? ') + '>')", allow_stdin=True)
    assert (await kernel.client.get_stdin_msg(timeout=TIMEOUT_S))["content"]["prompt"] == "? "
    await kernel.pause()
    kernel.client.input("answer")
    await kernel.go_on(restored=True)
    await kernel.finished(name)
    assert kernel.text(name) == "<answer>\n"


async def test_idleness_begins_with_the_last_output(kernel: Kernel) -> None:
    """Zero while a cell runs, then growing; what a page asks by itself does not matter."""
    name = kernel.client.execute("print(1, flush=True); import time; time.sleep(0.2)")
    await kernel.until(lambda: kernel.text(name) == "1\n")
    assert kernel.proxy.idle_s == 0
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


async def test_a_client_may_come_while_a_kernel_is_suspended(kernel: Kernel) -> None:
    """A new client is ready without the kernel (jupyter_client asks for kernel_info)."""
    await kernel.pause()
    woken: list[float] = []
    await kernel.proxy.suspended(on_wake=lambda: woken.append(1))
    client: AsyncKernelClient = kernel.rig.client()
    await client.wait_for_ready(timeout=TIMEOUT_S)
    assert not woken
