"""What a kernel says is bounded until somebody listens, on whichever channel it comes."""

import asyncio
from collections.abc import Iterator

import pytest
import zmq

from tests.leaks import Places
from warmcell.extension.keeper.rank_client import NAMES, WAITING_MAX_BYTES, ChannelName, RankClient
from warmcell.kernel_provisioner.proxy.connection import CHANNELS
from warmcell.kernel_provisioner.proxy.wire import Author

PIECE = "x" * 2**18
TOLD = 256


@pytest.fixture
def sockets(places: Places) -> Iterator[dict[ChannelName, "zmq.Socket[bytes]"]]:
    """Of a kernel that says what it likes, without a bound of its own."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    found = {name: context.socket(zmq.XPUB if name == "iopub" else zmq.ROUTER) for name in NAMES}
    for name, one in found.items():
        one.sndhwm = 0
        one.bind(f"ipc://{places.root}/k-{CHANNELS.index(name) + 1}")
    yield found
    for one in found.values():
        one.close(linger=0)
    context.term()


@pytest.mark.parametrize("channel", NAMES)
async def test_what_nobody_listens_to_is_not_read(
    channel: ChannelName, places: Places, sockets: dict[ChannelName, "zmq.Socket[bytes]"]
) -> None:
    """Up to a bound; all of it is there for whoever listens then."""
    client = RankClient(f"{places.root}/k")
    try:
        async with asyncio.timeout(60):
            await client.open()
            to = []
            if channel == "iopub":
                await asyncio.to_thread(sockets[channel].recv)
            else:
                client.request(channel, "kernel_info_request", {})
                to = [(await asyncio.to_thread(sockets[channel].recv_multipart))[0]]
            for number in range(TOLD):
                _, message = Author().make("stream", {"name": "stdout", "text": PIECE, "number": number})
                sockets[channel].send_multipart([*to, *map(bytes, message.frames(b""))])
            while channel not in client._held:  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0)
            assert WAITING_MAX_BYTES / 2 < client._waiting_bytes < 2 * WAITING_MAX_BYTES
            heard = [await client.hear() for _ in range(TOLD)]
        assert [one.message.read_content()["number"] for one in heard if one is not None] == list(range(TOLD))
    finally:
        client.close()
