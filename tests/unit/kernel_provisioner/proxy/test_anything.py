"""Whatever a kernel or its clients say in messages that are sound as frames: the proxy goes on, in bounded memory."""

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from tests.leaks import Places
from warmcell.kernel_provisioner.proxy.activity import Activity
from warmcell.kernel_provisioner.proxy.clients import Client
from warmcell.kernel_provisioner.proxy.connection import Connection
from warmcell.kernel_provisioner.proxy.link import Answer, GuestLink
from warmcell.kernel_provisioner.proxy.pauses import Pauses
from warmcell.kernel_provisioner.proxy.traffic import Traffic
from warmcell.kernel_provisioner.proxy.waiter import IN, Waiter
from warmcell.kernel_provisioner.proxy.wire import parse
from warmcell.kernel_provisioner.proxy.zmtp import Cut

ASKED, OURS, COMMS, PROBE = "asked", "ours", "comms", "probe"
"""Ids of a client's cell that the kernel has, and of what the proxy has asked it itself."""

KINDS: Final = (
    *("kernel_info_request", "execute_request", "comm_info_request", "comm_open", "comm_msg", "history_request"),
    *("debug_request", "interrupt_request", "shutdown_request", "input_reply", "usage_request", "other"),
)
SAID: Final = ("status", "execute_input", "error", "stream", "iopub_welcome", "execute_reply", "comm_info_reply")
CONTENT: Final[dict[str, Any]] = {
    **{"code": "1", "comm_id": "c", "target_name": "jupyter.widget.control", "restart": True, "command": "debugInfo"},
    **{"execution_state": "idle", "execution_count": 3, "ename": "E", "evalue": "v", "traceback": ["t"]},
    **{"comms": {"c": {"target_name": "t"}}, "status": "ok", "seq": 1},
}
DEEP: Final = st.sampled_from((500, 950, 985, 2000)).map(
    lambda depth: b'{"msg_type": "status", "msg_id": ' + b"[" * depth + b"]" * depth + b"}"
)


def part(said: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """A frame: mostly JSON."""
    written = said.map(lambda one: json.dumps(one).encode())
    return st.one_of(written, written, written, st.binary(max_size=20), DEEP)


def header(kinds: tuple[str, ...], *names: str) -> st.SearchStrategy[bytes]:
    fields = st.fixed_dictionaries({"msg_type": st.sampled_from(kinds), "msg_id": st.sampled_from(names)})
    return part(st.one_of(fields, fields, fields.flatmap(changed), JSON))


def frames(kinds: tuple[str, ...]) -> st.SearchStrategy[list[bytes]]:
    """A message of such a kind, of which any part may be odd."""
    said = st.one_of(st.just(CONTENT), changed(CONTENT), JSON)
    parents = header(("execute_request", "kernel_info_request"), ASKED, OURS, COMMS, PROBE)
    whole = st.tuples(st.just(b"<IDS|MSG>"), st.just(b""), header(kinds, ASKED, "new"), parents, part(JSON), part(said))
    few = st.lists(st.one_of(st.just(b"<IDS|MSG>"), st.binary(max_size=9)), min_size=1, max_size=8)
    return st.one_of(whole.map(list), whole.map(list), whole.map(list), few)


CHANNELS: Final = st.sampled_from(("shell", "control", "stdin", "iopub"))
GUESTS: Final = st.lists(st.tuples(CHANNELS, st.booleans(), st.booleans(), frames(SAID)), max_size=3)
CLIENTS: Final = st.lists(st.tuples(CHANNELS, frames(KINDS)), max_size=2)
Guests = list[tuple[str, bool, bool, list[bytes]]]
Clients = list[tuple[str, list[bytes]]]


class Rig:
    """A proxy but for its thread, with a client on each channel and a kernel that has a cell to do."""

    def __init__(self, place: Path) -> None:
        ports = {f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
        connection = Connection.from_json({**ports, "transport": "ipc", "ip": str(place / "h"), "key": ""})
        self.waiter, self.ends = Waiter(), list[socket.socket]()
        self.traffic = Traffic(connection, self.waiter, Activity(), name="test", message_max_bytes=2**20)
        self.pauses = Pauses(self.traffic)
        self.clients = {name: self._client(name) for name in ("shell", "control", "stdin", "iopub")}
        self.comms: Answer = Future()
        self.guest = self._guest(str(place / "g"))

    def _client(self, name: Any) -> Client:
        ours, theirs = socket.socketpair()
        self.ends.append(theirs)
        made = Client(ours, name)
        self.traffic.clients.add(made)
        self.traffic.clients.introduce(made)
        return made

    def _guest(self, prefix: str) -> GuestLink:
        made = self.traffic.guest = self.traffic.link(prefix, fresh=True)
        said = ({"msg_type": "execute_request", "msg_id": ASKED}, {}, {}, {"code": "1"})
        cell = parse([b"client", b"<IDS|MSG>", b"", *(json.dumps(one).encode() for one in said)])
        self.traffic.activity.asked("execute_request", ASKED, "shell", cell)
        self.traffic.activity.sent(ASKED)
        self.traffic.crossings.add(self.traffic.activity.unanswered(), last_input=None)
        made._asked.update({OURS: Future(), COMMS: self.comms})
        made._probes.add(PROBE)
        return made

    def says(self, name: str, ours: bool, cut: bool, said: list[bytes]) -> None:
        """The kernel says this, to the proxy or to a client; or it was too large and is there in part."""
        channel = next(one for one in self.guest.channels if one.name == name)
        whole = [*([self.traffic.author.route] if ours else []), *said]
        channel.read = lambda: iter([Cut(whole[:-1], 2**21) if cut else whole])  # type: ignore[method-assign]
        self.traffic.from_guest(self.guest, channel, IN)

    def asks(self, name: str, said: list[bytes]) -> None:
        """A client says this."""
        client = self.clients[name]
        client.read = lambda: iter([said])  # type: ignore[method-assign]
        self.traffic.from_client(client, IN)

    def sleep(self) -> None:
        """The kernel is suspended: the proxy answers for it, with what it has heard."""
        self.guest.held = True
        self.pauses.leave(self.comms)
        self.pauses.suspended(info=None, known_as=b"", on_wake=lambda: None, on_shutdown=lambda restart: None)

    def wake(self) -> None:
        """What waits is refused, and what was lost is made up for."""
        for one in self.traffic.crossings._all.values():
            one.due = one.due and 1e-9
        self.traffic.crossings.care()
        self.pauses.end_open_requests(ASKED)
        self.traffic.forget()

    def close(self) -> None:
        for channel in self.guest.channels:
            channel.close()
        for one in (*self.clients.values(), *self.ends, self.waiter):
            one.close()


@contextlib.contextmanager
def rig(place: Path) -> Iterator[Rig]:
    made = Rig(place)
    try:
        yield made
    finally:
        made.close()


@LENGTHS
def test_messages_are_passed_on_or_dropped(examples: int, places: Places) -> None:
    """While the kernel runs, while the proxy stands in for it, and when it goes on from there or is given up."""

    def carry(drawn: tuple[Guests, Clients, Clients]) -> None:
        guests, early, late = drawn
        with rig(places.root) as made:
            for said in guests:
                made.says(*said)
            for asked in early:
                made.asks(*asked)
            made.sleep()
            for asked in late:
                made.asks(*asked)
            made.wake()
            activity = made.traffic.activity
            assert isinstance(activity.busy, bool)
            assert activity.cell is None or 0 <= activity.cell < 2**53

    give_anything(st.tuples(GUESTS, CLIENTS, CLIENTS), carry, refusals=(), examples=examples, memory_max=8 * 2**20)


def test_what_a_page_asks_of_a_kernel_that_sleeps_is_answered_whatever_that_has_said(places: Places) -> None:
    """Comms that are none, and one whose id is none: a page that asks for them is answered, and others after it."""

    def asked(kind: str, **content: object) -> list[bytes]:
        said = ({"msg_type": kind, "msg_id": kind}, {}, {}, content)
        return [b"<IDS|MSG>", b"", *(json.dumps(one).encode() for one in said)]

    with rig(places.root) as made:
        for name, content in ((COMMS, {"comms": {"a": 5, "b": {"target_name": "t"}}}), (PROBE, {"status": "ok"})):
            reply = ({"msg_type": "reply", "msg_id": "r"}, {"msg_id": name}, {}, content)
            made.says("control", True, False, [b"<IDS|MSG>", b"", *(json.dumps(one).encode() for one in reply)])
        made.sleep()
        for request in (
            asked("comm_info_request", target_name="t"),
            asked("comm_msg", comm_id=["no id"]),
            asked("comm_open", comm_id={}, target_name="jupyter.widget.control"),
        ):
            made.asks("shell", request)
        made.asks("control", asked("kernel_info_request"))
        sent = made.ends[0].recv(2**16)
        assert b'"b": {"target_name": "t"}' in sent
        assert b'"a"' not in sent
        assert b"kernel_info_reply" in made.ends[1].recv(2**16)
