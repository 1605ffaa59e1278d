"""The wire protocol, against libzmq and against whoever would break it."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.anything import LENGTHS, give_anything
from tests.leaks import Places
from warmcell.kernel_provisioner.proxy import zmtp
from warmcell.kernel_provisioner.proxy.zmtp import LARGE_BYTES, Cut, Part, Peer, ZmtpError, encode

READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
GREETING = b"\xff" + 8 * b"\0" + b"\x7f\x03\x00NULL" + 16 * b"\0" + 32 * b"\0"
MESSAGES = [
    [b"one"],
    [b"", b"two", b""],
    [b"x" * 255, b"y" * 256],
    [os.urandom(LARGE_BYTES), b"z"],
    [os.urandom(3 << 20)],
]


MakeSocket = Callable[[int], "zmq.Socket[bytes]"]


@pytest.fixture
def libzmq() -> Iterator[MakeSocket]:
    """Makes sockets of libzmq's."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made: list[zmq.Socket[bytes]] = []

    def make(kind: int) -> zmq.Socket[bytes]:
        made.append(context.socket(kind))
        return made[-1]

    yield make
    for each in made:
        each.close(linger=0)
    context.term()


def pump(peer: Peer, until: Callable[[], bool]) -> list[list[bytes]]:
    """Read and flush until something is so; what came, as bytes."""
    found: list[list[bytes]] = []
    deadline = time.monotonic() + 60
    while not until() and time.monotonic() < deadline:
        found += [[bytes(part) for part in frames] for frames in peer.read()]
        peer.flush()
    assert until(), f"state {peer.state} after 60 s"
    return found


def sized(found: list[list[bytes]], number: int) -> Callable[[], bool]:
    return lambda: len(found) >= number


@pytest.mark.parametrize("kind", [zmq.ROUTER, zmq.DEALER])
def test_libzmq_takes_us_for_a_dealer(libzmq: MakeSocket, places: Places, kind: int) -> None:
    """Small and large messages go both ways whole, with our identity in front at a ROUTER."""
    path = str(places.root / "guest")
    theirs = libzmq(kind)
    theirs.bind(f"ipc://{path}")
    ours = Peer(socket.socket(socket.AF_UNIX), b"DEALER", identity=b"me", connected=False)
    ours.connect(path)
    pump(ours, lambda: ours.state == "open")
    for message in MESSAGES:
        ours.write(encode(message))
        pump(ours, lambda: not ours.unsent_bytes)
        assert theirs.poll(10_000)
        got = theirs.recv_multipart()
        assert got == ([b"me", *message] if kind == zmq.ROUTER else message)
        theirs.send_multipart(got)
        found: list[list[bytes]] = []
        while not found:
            found += [[bytes(part) for part in frames] for frames in ours.read()]
        assert found == [message]
    ours.close()


def test_we_hear_what_libzmq_publishes(libzmq: MakeSocket, places: Places) -> None:
    """As a SUB we have subscribed to everything, and a publisher that goes leaves its last words."""
    path = str(places.root / "guest")
    theirs = libzmq(zmq.XPUB)
    theirs.bind(f"ipc://{path}")
    ours = Peer(socket.socket(socket.AF_UNIX), b"SUB", connected=False)
    ours.connect(path)
    pump(ours, lambda: ours.state == "open")
    assert theirs.recv() == b"\x01"
    for message in MESSAGES:
        theirs.send_multipart(message)
    theirs.close()
    assert pump(ours, lambda: ours.state == "closed") == MESSAGES
    ours.close()


@pytest.mark.parametrize(("ours", "theirs"), [(b"ROUTER", "SUB"), (b"XPUB", "DEALER"), (b"ROUTER", "PUB")])
def test_sockets_that_do_not_belong_together_part(libzmq: MakeSocket, ours: zmtp.Kind, theirs: str) -> None:
    """A client that connects to the wrong channel does not stay connected."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = libzmq(getattr(zmq, theirs))
        client.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        peer = Peer(listener.accept()[0], ours)
        with contextlib.suppress(ZmtpError):  # Who notices first is a race.
            pump(peer, lambda: peer.state == "closed")
        assert peer.state == "closed"
        peer.close()


def test_a_ping_is_answered(libzmq: MakeSocket) -> None:
    """A client that wants heartbeats of the connection keeps it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = libzmq(zmq.DEALER)
        client.heartbeat_ivl, client.heartbeat_timeout = 20, 60
        client.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        peer = Peer(listener.accept()[0], b"ROUTER")
        until = time.monotonic() + 0.2
        pump(peer, lambda: time.monotonic() > until)
        assert peer.state == "open"
        peer.close()


def test_nobody_there_yet_is_no_error(places: Places) -> None:
    """A socket that is not there, or at which nobody listens, may still come."""
    path = str(places.root / "guest")
    peer = Peer(socket.socket(socket.AF_UNIX), b"DEALER", connected=False)
    peer.connect(path)
    assert peer.state == "connecting"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    peer.connect(path)
    assert peer.state == "connecting"
    peer.close()


@pytest.mark.parametrize("what", ["link", "file"])
def test_a_guest_cannot_send_us_elsewhere(places: Places, what: str) -> None:
    """A link to another socket of this user in the place of the guest's own is not followed."""
    other, path = places.root / "other", places.root / "guest"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(other))
        listener.listen()
        path.symlink_to(other) if what == "link" else path.write_text("")
        peer = Peer(socket.socket(socket.AF_UNIX), b"DEALER", connected=False)
        peer.connect(str(path))
        assert peer.state == "closed"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
        peer.close()


class Pair:
    """A peer of ours and a raw socket at its other end."""

    def __init__(self, *, cut_above_bytes: int | None = None) -> None:
        self.raw, ours = socket.socketpair()
        self.peer = Peer(ours, b"ROUTER", cut_above_bytes=cut_above_bytes)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()
        self.raw.close()

    def say(self, data: bytes) -> list[list[Part]]:
        """Send bytes and read what they make, portion by portion."""
        found: list[list[Part]] = []
        while data:
            data = data[self.raw.send(data[:16384]) :]
            found += self.peer.read()
        return found


def test_frames_may_come_in_any_pieces() -> None:
    """A message is the same however the stream is cut."""
    stream = GREETING + READY + b"".join(bytes(chunk) for message in MESSAGES[:4] for chunk in encode(message))
    for size in (1, 7, 64, 8192):
        with Pair() as pair:
            found: list[list[bytes]] = []
            for at in range(0, min(len(stream), 3000) if size == 1 else len(stream), size):
                found += [[bytes(part) for part in frames] for frames in pair.say(stream[at : at + size])]
            assert found == MESSAGES[: 3 if size == 1 else 4]


FRAMES = st.lists(st.integers(0, 700) | st.sampled_from([LARGE_BYTES + 1, 3 * LARGE_BYTES]), min_size=1, max_size=5)


@given(st.lists(FRAMES, min_size=1, max_size=4), st.integers(1000, 20_000))
@settings(max_examples=60, deadline=None)
def test_a_message_that_is_too_large_is_cut_and_the_next_one_is_whole(messages: list[list[int]], piece: int) -> None:
    """Its first frames are there, up to the one with which it is too large, and its size; however the stream is cut."""
    most = 1000
    sent = [[bytes([number % 256]) * size for number, size in enumerate(sizes)] for sizes in messages]
    stream = b"".join(bytes(chunk) for message in sent for chunk in encode(message))
    with Pair(cut_above_bytes=most) as pair:
        pair.say(GREETING + READY)
        found = []
        for at in range(0, len(stream), piece):
            found += pair.say(stream[at : at + piece])
        for _ in stream[::1000]:  # What is left of the last portions.
            found += pair.peer.read()
    assert len(found) == len(sent)
    for got, message in zip(found, sent, strict=True):
        whole = sum(map(len, message)) <= most
        assert isinstance(got, Cut) is not whole
        if isinstance(got, Cut):
            assert got.size_bytes == sum(map(len, message))
            message = message[: next(n for n in range(len(message)) if sum(map(len, message[: n + 1])) > most)]
        assert [bytes(part) for part in got] == message


FRAME = st.tuples(st.sampled_from((0, 1, 2, 3, 4, 6, 8, 255)), st.integers(0, 2**64 - 1), st.binary(max_size=40)).map(
    lambda one: bytes((one[0],)) + (one[1].to_bytes(8) if one[0] & 2 else bytes((len(one[2]),))) + one[2]
)
COMMANDS = st.sampled_from(
    (b"\x04\x05\x04PING", READY, b"\x04\x00", b"\x00\x00", b"\x01\x01a\x00\x01b", b"\x01\x00" * 5000)
)
STREAMS = st.lists(st.one_of(FRAME, COMMANDS, st.binary(max_size=40)), max_size=6).map(b"".join)


@LENGTHS
def test_noise_ends_a_connection_or_waits_for_more(examples: int) -> None:
    """Whatever bytes come after a handshake or in its place, nothing but a ZmtpError is raised, and ends it."""

    def read(noise: bytes) -> None:
        with Pair() as pair:
            try:
                for message in pair.say(noise):
                    assert sum(map(len, message)) <= len(noise)
            except ZmtpError:
                assert pair.peer.state == "closed"
                raise

    begins = st.sampled_from((GREETING + READY, GREETING + READY, GREETING, b""))
    inputs = st.tuples(begins, STREAMS).map(b"".join)
    sound, broken = [GREETING + READY + b"\0\1x"], [GREETING + READY + b"\xff\0", b"GET /"]
    give_anything(inputs, read, refusals=ZmtpError, examples=examples, sound=sound, broken=broken)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        GREETING[:10] + b"\x01" + GREETING[11:],
        GREETING.replace(b"NULL\0", b"PLAIN"),
        GREETING + b"\x00\x01x",
        GREETING + b"\x04\x06\x05ERROR",
        GREETING + b"\x04\x08\x05READY\x05a",
        GREETING + b"\x04\x06\x05READY",
        GREETING + READY + b"\x04\x18\x04PING\0\0" + 17 * b"c",
        GREETING + b"\x06" + (1 << 20).to_bytes(8),
        GREETING + READY + b"\xff\x00",
        GREETING + READY + b"\x02" + (1 << 40).to_bytes(8),
        GREETING + READY + 5000 * b"\x01\x00",
        GREETING + READY.replace(b"DEALER", b"XPUB.."),
    ],
)
def test_what_breaks_the_protocol_is_cut_off(said: bytes) -> None:
    """Other protocols, other versions, messages before the handshake, and what has no end."""
    with Pair() as pair, pytest.raises(ZmtpError):
        pair.say(said)


def test_who_pings_and_reads_nothing_fills_nobody() -> None:
    """Nothing is kept for one that takes none of its answers; one that takes them has them again."""
    ping = b"\x04\x17\x04PING\0\0" + 16 * b"c"
    with Pair() as pair:
        pair.say(GREETING + READY)
        for _ in range(1000):
            pair.say(100 * ping)
        assert 0 < pair.peer.unsent_bytes < 128 << 10
        assert pair.peer.state == "open"
        while pair.peer.unsent_bytes:
            pair.raw.recv(1 << 20)
            pair.peer.flush()
        pair.raw.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while pair.raw.recv(1 << 20):
                pass
        pair.say(ping)
        assert pair.raw.recv(100) == ping.replace(b"\x17\x04PING\0\0", b"\x15\x04PONG")


def test_a_size_that_is_only_claimed_costs_no_memory() -> None:
    """Nine bytes that announce a gigabyte do not make the keeper hold one."""
    with Pair() as pair:
        before = _resident()
        pair.say(GREETING + READY + b"\x02" + (1 << 30).to_bytes(8) + b"x" * 100)
        assert pair.peer.state == "open"
        assert _resident() - before < 16 << 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
