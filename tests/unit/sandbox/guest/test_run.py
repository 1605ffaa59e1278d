"""One cell's connection: its answer is read as it comes, in whatever pieces."""

import json
import socket
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from warmcell.sandbox.guest.magics.api import KeeperError, _told
from warmcell.sandbox.guest.magics.run import Inbox, Run
from warmcell.sandbox.guest.values import dumps

VALUES = dumps({"x": list(range(100)), "y": bytes(300_000)})
LINES = [{"msg_type": "stream", "content": {"text": "a" * 1000}}, {"msg_type": "stream", "content": {"text": "ü"}}]


def chunked(*parts: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def whole(status: int, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def line(**said: Any) -> bytes:
    return json.dumps(said).encode() + b"\n"


class Cell:
    """A run, and the other end of its connection, which answers so many bytes at a time and may then close."""

    def __init__(self, answer: bytes, *, piece: int = 2**20, closes: bool = False) -> None:
        ours, self.theirs = socket.socketpair()
        self.connection = cast(Any, ours)
        self.inbox = Inbox()
        self.kept: list[object] = []
        connection = cast(Any, SimpleNamespace(sock=ours, close=ours.close))
        head = {"code": "1", "rank": 0}
        self.run = Run(lambda: connection, "/p", head, b"body", self.inbox, _told, self.kept.append)
        self._answering = threading.Thread(target=self._say, args=(answer, piece, closes))

    def _say(self, answer: bytes, piece: int, closes: bool) -> None:
        self.theirs.recv(2**16)
        for at in range(0, len(answer), piece):
            self.theirs.sendall(answer[at : at + piece])
        if closes:
            self.theirs.close()

    def events(self) -> list[Any]:
        """All up to its end."""
        self.run.begin()
        self._answering.start()
        found = [self.inbox.get(60)]
        while found[-1] is not None and found[-1].message is not None:
            found.append(self.inbox.get(60))
        self.run.close()
        self._answering.join()
        self.connection.close()
        self.theirs.close()
        return found


@pytest.mark.parametrize("piece", [1000, 7, 2**20])
def test_an_answer_is_read_in_whatever_pieces_it_comes(piece: int) -> None:
    """Lines one by one, then values; and the connection is good for another cell."""
    done = line(done=True, status="ok", get=len(VALUES))
    first, rest = VALUES[:1000], VALUES[1000:]
    cell = Cell(chunked(line(**LINES[0]), line(**LINES[1]) + done + first, rest), piece=piece)
    *messages, last = cell.events()
    assert [event.message for event in messages] == LINES
    assert (last.done["status"], last.error) == ("ok", None)
    assert cell.run.values == {"x": list(range(100)), "y": bytes(300_000)}
    assert len(cell.kept) == 1
    short = Cell(whole(200, done.replace(str(len(VALUES)).encode(), b"0")), piece=piece)
    assert [event.done["status"] for event in short.events()] == ["ok"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (whole(409, b'{"message": "No", "hint": "Do", "code": "conflict"}'), "No. Do"),
        (chunked(line(done=True, status="failed", failure={"message": "It ended", "code": "sandbox_died"})), "ended"),
        (chunked(line(done=True, status="ok", get=len(VALUES)), VALUES)[:-5000], "ended early"),
        (chunked(line(**LINES[0])), "ended early"),
        (b"", "ended early"),
        (b"nonsense\r\n\r\n", "cannot be reached"),
    ],
)
def test_what_comes_instead_of_an_end_is_an_error(answer: bytes, said: str) -> None:
    """With what was said; its connection is not used again."""
    cell = Cell(answer, piece=700, closes=True)
    last = cell.events()[-1]
    assert isinstance(last.error, KeeperError)
    assert said in str(last.error)
    assert cell.kept == []


def test_a_run_is_aborted_from_elsewhere() -> None:
    """Whoever waits hears why."""
    cell = Cell(b"")
    cell.run.begin()
    assert cell.inbox.get(0) is None
    threading.Thread(target=cell.run.abort, args=(KeeperError("given up"),)).start()
    event = cell.inbox.get(60)
    assert event is not None
    assert str(event.error) == "given up"
    cell.connection.close()
    cell.theirs.close()


def test_a_long_line_in_small_pieces_is_read_once() -> None:
    """8 MiB of one message: what was looked at is not looked at again with each piece."""
    text = "x" * (8 * 2**20)
    cell = Cell(chunked(*[bytes(part) for part in _pieces(line(text=text))], line(done=True, status="ok")))
    message, last = cell.events()
    assert len(message.message["text"]) == len(text)
    assert last.done["status"] == "ok"


def _pieces(data: bytes) -> list[memoryview]:
    view = memoryview(data)
    return [view[at : at + 4096] for at in range(0, len(data), 4096)]


def test_who_waits_goes_on_in_time_however_much_comes() -> None:
    """As to show how much of it there is, and to see whether the stop button was pressed."""
    inbox, (ours, theirs) = Inbox(), socket.socketpair()
    with ours, theirs:
        theirs.send(b"never read")
        looked: list[int] = []
        inbox.watch(ours.fileno(), cast(Any, SimpleNamespace(read=lambda: looked.append(1))))
        assert inbox.get(0.01) is None
        assert looked
