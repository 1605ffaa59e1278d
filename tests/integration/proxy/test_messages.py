"""What passes between clients and a guest, and what does not."""

import asyncio
from typing import Any

import pytest
import zmq
from jupyter_client.asynchronous import AsyncKernelClient

from tests.integration.proxy.conftest import TIMEOUT_S, MakeRig, Rig, ipc, until
from tests.leaks import Places


async def output(client: AsyncKernelClient, kind: str) -> dict[str, Any]:
    """The next message of a kind that the client hears."""
    while True:
        message: dict[str, Any] = await client.get_iopub_msg(timeout=TIMEOUT_S)
        if message["msg_type"] == kind:
            return message


async def test_a_request_its_reply_and_its_output_pass(rig: Rig) -> None:
    """Everything arrives as it was sent, signed for the client, buffers included, small and large."""
    guest = await rig.guest()
    client = await rig.subscribed()
    sent = client.execute("1 + 1")
    request = await guest.asked()
    assert request["content"]["code"] == "1 + 1"
    buffers = [b"small", bytes(5 << 20), b""]
    guest.publish("display_data", {"data": {"text/plain": "x" * 300_000}}, request, buffers=buffers)
    guest.finish(request)
    shown = await output(client, "display_data")
    assert shown["parent_header"]["msg_id"] == sent
    assert len(shown["content"]["data"]["text/plain"]) == 300_000
    assert [bytes(buffer) for buffer in shown["buffers"]] == buffers
    reply = await client.get_shell_msg(timeout=TIMEOUT_S)
    assert (reply["msg_type"], reply["parent_header"]["msg_id"]) == ("execute_reply", sent)


async def test_what_is_too_large_is_told_in_its_place(make_rig: MakeRig, places: Places) -> None:
    """Output in the stream of its cell, a reply as an error; what comes before and after passes, as does the kernel."""
    rig = await make_rig(ipc(places), message_max_bytes=2**20)
    guest = await rig.guest()
    client = await rig.subscribed()
    sent = client.execute("large")
    request = await guest.asked()
    guest.publish("stream", {"name": "stdout", "text": "before"}, request)
    guest.publish("display_data", {"data": {"text/plain": "x" * 2**22}}, request)
    guest.publish("display_data", {"data": {}}, request, buffers=[bytes(2**19), bytes(2**20), b"small", bytes(2**20)])
    guest.publish("stream", {"name": "stdout", "text": "after"}, request)
    guest.reply(request, {"status": "ok", "user_expressions": {"large": "x" * 2**21}})
    told = [await output(client, "stream") for _ in range(4)]
    assert [one["parent_header"]["msg_id"] for one in told] == [sent] * 4
    texts = [one["content"]["text"] for one in told]
    assert (texts[0], texts[3]) == ("before", "after")
    for text, mib in ((texts[1], 4), (texts[2], 3)):
        assert f"A display_data message of {mib} MiB is left out: at most 1 MiB go at once." in text
    reply = await client.get_shell_msg(timeout=TIMEOUT_S)
    assert (reply["msg_type"], reply["parent_header"]["msg_id"]) == ("execute_reply", sent)
    assert (reply["content"]["status"], reply["content"]["ename"]) == ("error", "MessageTooLarge")
    client.execute("small")
    guest.finish(await guest.asked())
    assert (await client.get_shell_msg(timeout=TIMEOUT_S))["content"]["status"] == "ok"


async def test_large_buffers_pass_to_the_guest(rig: Rig) -> None:
    """A widget's upload reaches a guest that reads it late."""
    guest = await rig.guest()
    client = await rig.subscribed()
    guest.reading.clear()
    data = bytes(range(256)) * 40_000
    message = client.session.msg("comm_msg", {"comm_id": "x", "data": {}})
    client.session.send(client.shell_channel.socket, message, buffers=[data])
    client.comm_info()
    guest.reading.set()
    found = [await guest.asked(), await guest.asked()]
    assert [each["msg_type"] for each in found] == ["comm_msg", "comm_info_request"]
    assert bytes(found[0]["buffers"][0]) == data


async def test_replies_go_to_who_asked(rig: Rig) -> None:
    """Two clients of one kernel hear the same output, and each its own replies."""
    guest = await rig.guest()
    one, other = await rig.subscribed(), await rig.subscribed()
    one.execute("one")
    request = await guest.asked()
    other.execute("other")
    second = await guest.asked()
    guest.publish("stream", {"name": "stdout", "text": "for all"})
    guest.finish(second)
    guest.finish(request)
    for client, sent in ((one, request), (other, second)):
        reply = await client.get_shell_msg(timeout=TIMEOUT_S)
        assert reply["parent_header"]["msg_id"] == sent["header"]["msg_id"]
        assert (await output(client, "stream"))["content"]["text"] == "for all"


async def test_bad_signatures_are_dropped(rig: Rig) -> None:
    """A client with another key, or with none, reaches nobody; who has the key still does."""
    guest = await rig.guest()
    for key in (b"wrong", b""):
        stranger = rig.client(key=key)
        stranger.execute("bad")
        stranger.session.send(stranger.control_channel.socket, "shutdown_request", {"restart": False})
    rig.client().execute("good")
    assert (await guest.asked())["content"]["code"] == "good"
    assert guest.requests.empty()


async def test_a_recorded_message_cannot_be_sent_again(rig: Rig) -> None:
    """The same signed frames are forwarded once."""
    guest = await rig.guest()
    client = rig.client()
    frames = client.session.serialize(client.session.msg("execute_request", {"code": "once"}))
    for _ in range(3):
        client.shell_channel.socket.send_multipart(frames)
    client.execute("last")
    assert [(await guest.asked())["content"]["code"] for _ in range(2)] == ["once", "last"]


async def test_noise_from_a_client_harms_nobody(rig: Rig, places: Places) -> None:
    """Neither another protocol nor frames that are no message stop the others."""
    guest = await rig.guest()
    _, writer = await asyncio.open_unix_connection(rig.connection.path("shell"))
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    await writer.drain()
    client = rig.client()
    for frames in ([b""], [b"<IDS|MSG>"], [b"<IDS|MSG>", b"", b"{}", b"{}", b"{}", b"{}"], [b"\xff" * 70_000]):
        client.shell_channel.socket.send_multipart(frames)
    client.execute("good")
    assert (await guest.asked())["content"]["code"] == "good"
    writer.close()


async def test_noise_from_a_guest_harms_nobody(rig: Rig) -> None:
    """A guest that says what is no message loses that message alone."""
    guest = await rig.guest()
    client = await rig.subscribed()
    for socket in (guest.sockets["iopub"], guest.sockets["shell"]):
        await socket.send_multipart([b"nobody", b"\xff", b"<IDS|MSG>"])
        await socket.send_multipart([b"<IDS|MSG>", b"", b'{"msg_type":"status"}', b"[", b"{", b"", b"x" * 100_000])
    guest.publish("stream", {"name": "stdout", "text": "good"})
    assert (await output(client, "stream"))["content"]["text"] == "good"


async def test_each_new_subscriber_is_welcomed(rig: Rig) -> None:
    """`iopub_welcome` comes to every client, and only when it subscribes."""
    await rig.guest()
    first = await rig.subscribed()
    await rig.subscribed()
    seen = []
    while await first.iopub_channel.msg_ready():
        seen.append((await first.get_iopub_msg())["msg_type"])
    assert "iopub_welcome" not in seen


async def test_a_topic_is_a_topic(rig: Rig) -> None:
    """A client that wants streams alone gets streams alone."""
    guest = await rig.guest()
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    socket.subscribe(b"stream")
    socket.connect(rig.connection.url("iopub"))
    welcome = await asyncio.wait_for(socket.recv_multipart(), TIMEOUT_S)
    assert welcome[0] == b"stream"
    guest.publish("display_data", {})
    guest.publish("stream", {"text": "x"})
    heard = await asyncio.wait_for(socket.recv_multipart(), TIMEOUT_S)
    assert heard[0] == b"stream"
    socket.unsubscribe(b"stream")
    socket.close(linger=0)
    context.term()


async def test_a_guest_asks_and_a_client_answers(rig: Rig) -> None:
    """`input()`: the question comes to the client of that cell, the answer to the guest."""
    guest = await rig.guest()
    client, other = await rig.subscribed(), await rig.subscribed()
    client.execute("input()")
    request = await guest.asked()
    guest._session.send(
        guest.sockets["stdin"],
        "input_request",
        {"prompt": "? ", "password": False},
        parent=request,
        ident=request["route"],
    )
    question = await client.get_stdin_msg(timeout=TIMEOUT_S)
    assert question["content"]["prompt"] == "? "
    assert not await other.stdin_channel.msg_ready()
    client.input("yes")
    _, rest = guest._session.feed_identities(await asyncio.wait_for(guest.sockets["stdin"].recv_multipart(), TIMEOUT_S))
    assert guest._session.deserialize(rest)["content"] == {"value": "yes"}


async def test_heartbeats_are_answered_without_a_guest(rig: Rig) -> None:
    """A kernel that restarts does not look dead to clients that ping it."""
    client = rig.client()
    client.hb_channel.time_to_dead = 0.05
    client.hb_channel.start()
    client.hb_channel.unpause()
    await asyncio.sleep(0.3)
    await until(client.hb_channel.is_beating)  # Each answer has a twentieth of a second, which a busy machine may miss.
    client.hb_channel.stop()


async def test_a_page_that_comes_back_replaces_its_old_connection(rig: Rig) -> None:
    """The same identity on a new connection gets the replies from then on."""
    guest = await rig.guest()
    client = rig.client()
    sockets = [client.context.socket(zmq.DEALER) for _ in range(2)]
    for number, socket in enumerate(sockets):
        socket.identity = b"page"
        socket.connect(rig.connection.url("shell"))
        client.session.send(socket, "execute_request", {"code": str(number)})
        guest.finish(await guest.asked())
        assert await socket.poll(1000 * TIMEOUT_S)
    for socket in sockets:
        socket.close(linger=0)


async def test_tcp_is_served_alike(make_rig: MakeRig, places: Places, unused_ports: dict[str, int]) -> None:
    """A client that insists on tcp gets the same proxy."""
    rig = await make_rig(ipc(places, transport="tcp", ip="127.0.0.1", **unused_ports))
    guest = await rig.guest()
    client = await rig.subscribed()
    client.execute("1")
    request = await guest.asked()
    guest.publish("stream", {"name": "stdout", "text": "x" * 1_000_000}, request)
    guest.finish(request)
    assert len((await output(client, "stream"))["content"]["text"]) == 1_000_000
    assert (await client.get_shell_msg(timeout=TIMEOUT_S))["content"]["status"] == "ok"


async def test_busy_and_idle_are_known(rig: Rig) -> None:
    """From the requests and statuses that pass; a page's own questions count for nothing."""
    guest = await rig.guest()
    client = await rig.subscribed()
    before = rig.proxy.last_activity
    client.kernel_info()
    await client.get_shell_msg(timeout=TIMEOUT_S)
    assert (rig.proxy.busy, rig.proxy.last_activity) == (False, before)
    client.execute("1")
    request = await guest.asked()
    assert (rig.proxy.busy, rig.proxy.open_requests) == (True, 1)
    assert rig.proxy.last_activity > before
    guest.finish(request)
    while (said := await output(client, "status"))["content"]["execution_state"] != "idle" or (
        said["parent_header"]["msg_id"] != request["header"]["msg_id"]
    ):
        pass
    await client.get_shell_msg(timeout=TIMEOUT_S)  # Reply and status come on sockets of their own, in either order.
    assert (rig.proxy.busy, rig.proxy.open_requests) == (False, 0)


async def test_interrupt_asks_the_guest(rig: Rig) -> None:
    """Over the control channel; clients hear nothing of it."""
    guest = await rig.guest()
    client = await rig.subscribed()
    await rig.proxy.interrupt()
    request = await guest.asked()
    assert (request["msg_type"], request["channel"]) == ("interrupt_request", "control")
    guest.reply(request, {"status": "ok"})
    guest.publish("status", {"execution_state": "idle"}, request)
    guest.publish("stream", {"text": "next"})
    assert (await client.get_iopub_msg(timeout=TIMEOUT_S))["msg_type"] == "stream"


@pytest.fixture
def unused_ports() -> dict[str, int]:
    """Five TCP ports that nobody uses now."""
    import socket

    sockets = [socket.socket() for _ in range(5)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = {
        f"{channel}_port": each.getsockname()[1]
        for channel, each in zip(("shell", "iopub", "stdin", "control", "hb"), sockets, strict=True)
    }
    for each in sockets:
        each.close()
    return found
