"""Kernels come and go behind a proxy; its clients stay."""

import asyncio
import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.manager import KernelManager

from tests.integration.proxy.conftest import TIMEOUT_S, Guest, MakeRig, Rig, ipc, until
from tests.leaks import Places
from warmcell.kernel_provisioner.proxy import Connection, KernelProxy
from warmcell.sandbox.errors import ConflictError, InvalidRequestError, OperationTimeoutError, TransportError


async def heard(client: AsyncKernelClient, text: str) -> int:
    """How many streams a client hears up to the one with this text."""
    count = 0
    while True:
        message = await client.get_iopub_msg(timeout=TIMEOUT_S)
        if message["msg_type"] == "stream":
            count += 1
            if message["content"]["text"] == text:
                return count


async def test_ready_is_when_the_guest_answers_and_is_heard(rig: Rig) -> None:
    """`wait_ready` gives the guest's own kernel_info; afterwards no output can be lost."""
    guest = await rig.guest(connect=False)
    await rig.proxy.connect_guest(guest.prefix)
    info = await rig.proxy.wait_ready(timeout=TIMEOUT_S)
    assert info["implementation"] == guest.name
    assert await rig.proxy.wait_ready(timeout=TIMEOUT_S) == info


async def test_a_guest_may_bind_late(rig: Rig) -> None:
    """The proxy may be told of a kernel before its sockets are there."""
    guest = await rig.guest(connect=False, start=False)
    await rig.proxy.connect_guest(guest.prefix)
    waiting = asyncio.create_task(rig.proxy.wait_ready(timeout=TIMEOUT_S))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    guest.start()
    assert (await waiting)["implementation"] == guest.name


async def test_a_guest_that_does_not_answer_is_not_ready(rig: Rig) -> None:
    """A deadline, and a typed error with operation and time; the guest may still become ready later."""
    guest = await rig.guest(connect=False)
    guest.reading.clear()
    await rig.proxy.connect_guest(guest.prefix)
    with pytest.raises(OperationTimeoutError, match=r"did not answer within 0\.2 s") as caught:
        await rig.proxy.wait_ready(timeout=0.2)
    assert caught.value.details == {"operation": "wait_ready", "timeout": 0.2}
    guest.reading.set()
    assert (await rig.proxy.wait_ready(timeout=TIMEOUT_S))["implementation"] == guest.name


async def test_a_guest_that_is_not_heard_is_not_ready(rig: Rig) -> None:
    """A reply alone proves no subscription; it is asked again until its output comes through, and requests wait."""
    guest = await rig.guest(connect=False)
    guest.mute = True
    await rig.proxy.connect_guest(guest.prefix)
    rig.client().execute("waits")
    with pytest.raises(OperationTimeoutError):
        await rig.proxy.wait_ready(timeout=0.3)
    assert guest.requests.empty()
    guest.mute = False
    await rig.proxy.wait_ready(timeout=TIMEOUT_S)
    assert (await guest.asked())["content"]["code"] == "waits"


async def test_a_guest_that_dies_at_once_is_told(rig: Rig) -> None:
    """Who waits for it does not wait for the deadline."""
    guest = await rig.guest(connect=False)
    guest.reading.clear()
    await rig.proxy.connect_guest(guest.prefix)
    waiting = asyncio.create_task(rig.proxy.wait_ready(timeout=TIMEOUT_S))
    await asyncio.sleep(0.05)
    await guest.end()
    with pytest.raises(TransportError, match="closed its sockets"):
        await waiting
    with pytest.raises(TransportError):
        await rig.proxy.wait_ready(timeout=TIMEOUT_S)


async def test_without_a_guest_nothing_can_be_waited_for(rig: Rig) -> None:
    """Neither readiness nor an interrupt has an addressee."""
    with pytest.raises(ConflictError, match="No kernel is connected"):
        await rig.proxy.wait_ready(timeout=1)
    with pytest.raises(ConflictError, match="No kernel is connected"):
        await rig.proxy.interrupt()


async def test_requests_wait_for_the_next_kernel(rig: Rig) -> None:
    """In their order, and counted as open meanwhile."""
    client = rig.client()
    sent = [client.execute(str(number)) for number in range(20)]
    await until(lambda: rig.proxy.open_requests == 20)
    assert rig.proxy.busy
    guest = await rig.guest()
    assert [(await guest.asked())["header"]["msg_id"] for _ in sent] == sent


async def test_a_client_stays_over_a_restart_and_hears_both_kernels(rig: Rig) -> None:
    """The last words of the old kernel, then `starting`, then the new one; on one connection."""
    first = await rig.guest()
    client = await rig.subscribed()
    for number in range(300):
        first.publish("stream", {"name": "stdout", "text": str(number)})
    await first.end()
    await rig.proxy.drop_guest()
    assert await heard(client, "299") == 300
    client.execute("between")
    second = await rig.guest()
    assert (await second.asked())["content"]["code"] == "between"
    second.publish("stream", {"name": "stdout", "text": "new"})
    states = []
    while (message := await client.get_iopub_msg(timeout=TIMEOUT_S))["msg_type"] != "stream":
        states.append(message["content"]["execution_state"])
    assert states[0] == "starting"
    assert "idle" in states
    assert message["content"]["text"] == "new"


async def test_the_last_words_of_a_living_guest_are_taken_along(rig: Rig) -> None:
    """What it said before it was dropped arrives, read or not; its side is closed afterwards, completely."""
    guest = await rig.guest()
    client = await rig.subscribed()
    held = threading.Event()
    assert rig.proxy._relay is not None
    rig.proxy._relay.submit(lambda: held.wait(TIMEOUT_S))
    for number in range(500):
        guest.publish("stream", {"name": "stdout", "text": f"{number}"})
    dropping = asyncio.create_task(rig.proxy.drop_guest())
    await asyncio.sleep(0.05)
    held.set()
    await dropping
    assert await heard(client, "499") == 500
    assert not _connections_to(guest)


async def test_a_silent_guest_is_dropped_all_the_same(rig: Rig) -> None:
    """One that hangs costs a quarter of a second, not the restart."""
    guest = await rig.guest()
    guest.reading.clear()
    began = asyncio.get_running_loop().time()
    await rig.proxy.drop_guest()
    assert asyncio.get_running_loop().time() - began < 2
    await rig.proxy.drop_guest()


async def test_what_was_meant_for_the_old_kernel_does_not_reach_the_new(rig: Rig) -> None:
    """A late shutdown or interrupt must not end or stop the kernel that replaces its addressee."""
    await rig.guest()
    await rig.proxy.drop_guest()
    client = rig.client()
    for kind in ("shutdown_request", "interrupt_request"):
        client.session.send(client.control_channel.socket, kind, {})
    client.session.send(client.stdin_channel.socket, "input_reply", {"value": "late"})
    client.session.send(client.control_channel.socket, "debug_request", {})
    await until(lambda: rig.proxy.open_requests == 1)
    second = await rig.guest()
    assert (await second.asked())["msg_type"] == "debug_request"
    assert not await second.sockets["stdin"].poll(50)


async def test_a_shutdown_overtakes_what_waits_for_a_kernel_that_hangs(rig: Rig) -> None:
    """A kernel that never becomes ready can still be told to leave."""
    guest = await rig.guest(connect=False)
    guest.reading.clear()
    await rig.proxy.connect_guest(guest.prefix)
    client = rig.client()
    client.execute("waits")
    await until(lambda: rig.proxy.open_requests == 1)
    client.session.send(client.control_channel.socket, "shutdown_request", {"restart": False})
    _, rest = guest._session.feed_identities(
        await asyncio.wait_for(guest.sockets["control"].recv_multipart(), TIMEOUT_S)
    )
    assert guest._session.deserialize(rest)["msg_type"] == "shutdown_request"


async def test_requests_after_a_death_wait_even_before_anybody_noticed_it(rig: Rig) -> None:
    """Between the end of a kernel and `drop_guest` a request is not thrown after it."""
    first = await rig.guest()
    client = await rig.subscribed()
    await first.end()
    await asyncio.sleep(0.05)
    client.execute("to the next")
    second = await rig.guest()
    assert (await second.asked())["content"]["code"] == "to the next"


async def test_a_kernel_that_goes_on_is_joined_in_the_middle_of_a_cell(rig: Rig) -> None:
    """Reconnected with fresh=False it is ready while its shell is busy, and no client is told otherwise."""
    guest = await rig.guest()
    client = await rig.subscribed()
    await rig.proxy.drop_guest()
    await rig.proxy.connect_guest(guest.prefix, fresh=False)
    await rig.proxy.wait_ready(timeout=TIMEOUT_S)
    guest.publish("stream", {"text": "here"})
    kinds = []
    while not kinds or kinds[-1] != "stream":
        kinds.append((await client.get_iopub_msg(timeout=TIMEOUT_S))["msg_type"])
    assert kinds == ["stream"]


async def test_socket_files_that_jupyter_removed_come_back(rig: Rig) -> None:
    """After `cleanup_ipc_files` new clients get in again; who was connected notices nothing."""
    guest = await rig.guest()
    old = await rig.subscribed()
    manager = KernelManager()
    manager.load_connection_info(rig.connection.to_json())  # type: ignore[arg-type]
    for _ in range(3):
        manager.cleanup_ipc_files()
        assert not os.path.exists(rig.connection.path("shell"))
        await rig.proxy.rebind()
    await rig.proxy.rebind(rig.connection)
    new = await rig.subscribed()
    for client, code in ((old, "old"), (new, "new")):
        client.execute(code)
        request = await guest.asked()
        assert request["content"]["code"] == code
        guest.finish(request)
        await client.get_shell_msg(timeout=TIMEOUT_S)


async def test_other_addresses_are_served_beside_the_old_ones(rig: Rig, places: Places) -> None:
    """A manager that chose new ports gets them; connections to the old ones stay."""
    guest = await rig.guest()
    old = await rig.subscribed()
    other = ipc(places, ip=str(places.root / "other"))
    await rig.proxy.rebind(other)
    assert rig.proxy.connection == other
    new = rig.client(ip=other.ip)
    for client in (old, new):
        client.execute("x")
        await guest.asked()


async def test_a_new_key_holds_from_its_rebind_on(rig: Rig, places: Places) -> None:
    """Who signs with the old one is no longer heard."""
    guest = await rig.guest()
    await rig.proxy.rebind(ipc(places, key="changed"))
    rig.client().execute("old")
    rig.client(key=b"changed").execute("new")
    assert (await guest.asked())["content"]["code"] == "new"


async def test_sockets_are_private_and_gone_at_the_end(rig: Rig, places: Places) -> None:
    """0600 while they are there; no file, no thread and no descriptor afterwards, however often it is closed."""
    files = [Path(rig.connection.path(channel)) for channel in ("shell", "iopub", "stdin", "control", "hb")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    await rig.guest()
    await rig.subscribed()
    await rig.proxy.close()
    await rig.proxy.close()
    assert not [path for path in places.root.iterdir() if path.name.startswith("h")]
    with pytest.raises(ConflictError):
        await rig.proxy.rebind()
    assert (rig.proxy.busy, rig.proxy.open_requests, rig.proxy.last_activity) == (False, 0, 0.0)


async def test_nothing_is_left_of_many_proxies(make_rig: MakeRig, places: Places) -> None:
    """Descriptors and threads are given back."""

    async def once() -> None:
        proxy = KernelProxy(ipc(places), name="once")
        await proxy.start()
        await proxy.rebind()
        await proxy.close()

    await once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await once()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("proxy-")]


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
async def test_an_address_in_use_is_a_conflict(places: Places, transport: str) -> None:
    """Somebody else's socket is not taken away, and nothing is left of the attempt."""
    with socket.socket(socket.AF_UNIX if transport == "ipc" else socket.AF_INET) as taken:
        if transport == "ipc":
            connection = ipc(places)
            taken.bind(connection.path("control"))
        else:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            others = {f"{channel}_port": port + n for n, channel in enumerate(("shell", "iopub", "stdin", "hb"), 1)}
            connection = ipc(places, transport="tcp", ip="127.0.0.1", control_port=port, **others)
        taken.listen()
        proxy = KernelProxy(connection, name="second")
        with pytest.raises(ConflictError) as caught:
            await proxy.start()
        assert caught.value.hint
    left = {path.name for path in places.root.iterdir() if path.name.startswith("h-")}
    assert left == ({"h-4"} if transport == "ipc" else set())


@pytest.mark.parametrize(
    "changes", [{"ip": "/no/such/directory/h"}, {"transport": "tcp", "ip": "192.0.2.1", "hb_port": 65001}]
)
async def test_an_address_that_cannot_be_is_refused(places: Places, changes: dict[str, object]) -> None:
    """A directory that is not there, an address of another machine."""
    proxy = KernelProxy(ipc(places, **changes), name="nowhere")
    with pytest.raises(InvalidRequestError, match="Clients cannot be awaited"):
        await proxy.start()


async def test_a_file_that_is_no_socket_is_not_removed(places: Places) -> None:
    """A connection file that points at somebody's data does no harm."""
    connection = ipc(places)
    Path(connection.path("stdin")).write_text("precious")
    with pytest.raises(ConflictError, match="no socket"):
        await KernelProxy(connection, name="careful").start()
    assert Path(connection.path("stdin")).read_text() == "precious"


async def test_a_dead_sockets_file_is_no_hindrance(make_rig: MakeRig, places: Places) -> None:
    """After a keeper that was killed its files lie about."""
    connection: Connection = ipc(places)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(connection.path("shell"))
    rig = await make_rig(connection)
    guest = await rig.guest()
    rig.client().execute("1")
    await guest.asked()


def _connections_to(guest: Guest) -> list[str]:
    """Connected sockets at the guest's addresses, its own ends included."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [line for line in lines if guest.prefix in line and line.split()[5] == "03"]
