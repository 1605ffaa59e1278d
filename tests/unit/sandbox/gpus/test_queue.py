"""Who is served next, and who makes room: every order of requests, releases, crashes and preemptions."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmcell.sandbox.errors import InvalidRequestError, NoGpuAvailableError
from warmcell.sandbox.gpus.allocator import Grant, Use
from warmcell.sandbox.gpus.queue import Holding, Ticket, estimate_s, rivals, serve, to_reclaim
from warmcell.sandbox.gpus.requests import parse
from warmcell.sandbox.models import GIB, GpuDevice, SandboxId

PARTS = 4


def machine(*kinds: tuple[str, int]) -> tuple[GpuDevice, ...]:
    return tuple(
        GpuDevice(uuid=f"GPU-{index}", index=index, name=name, memory_total_bytes=gib * GIB)
        for index, (name, gib) in enumerate(kinds)
    )


PAIR = machine(("A100", 80), ("A100", 80))


def ticket(number: int, request: str) -> Ticket:
    return Ticket(number=number, request=parse(request), sandbox_id=f"t{number}", pid=1, uid=0, since=0.0)


def served(
    request: str, before: list[Ticket], uses: dict[str, Use], devices: tuple[GpuDevice, ...] = PAIR
) -> list[int]:
    try:
        return [device.index for device in serve(parse(request), before, devices, uses, most_parts=PARTS).devices]
    except NoGpuAvailableError:
        return []


def test_nobody_passes_one_who_waits_for_two() -> None:
    """The device that is free is kept for them, until the other one comes."""
    assert served("A100", [ticket(1, "A100:2")], {"GPU-0": Use("bob")}) == []
    assert served("A100:2", [], {}) == [0, 1]


def test_whoever_wants_something_else_is_not_held_up() -> None:
    """A device that nobody before could use is given at once."""
    devices = machine(("A100", 80), ("T4", 16))
    assert served("T4", [ticket(1, "A100")], {"GPU-0": Use("bob")}, devices) == [1]
    assert served("any", [ticket(1, "A100")], {"GPU-0": Use("bob")}, devices) == [1]


def test_a_device_that_is_shared_runs_dry_for_one_who_wants_it_whole() -> None:
    """No further share is given of it, while another device's are."""
    uses = {"GPU-0": Use("bob", 2, 1), "GPU-1": Use("eve", 2, 1)}
    assert served("A100/2", [ticket(1, "A100")], uses) == [1]
    assert served("A100/2", [ticket(1, "A100:2")], uses) == []


def test_a_share_goes_where_shares_are() -> None:
    """So that the other device stays whole; shares of another size do not mix."""
    assert served("A100/2", [], {"GPU-1": Use("bob", 2, 1)}) == [1]
    assert served("A100/4", [], {"GPU-0": Use("bob", 2, 1)}) == [1]
    assert served("A100", [], {"GPU-0": Use("bob", 2, 1)}) == [1]


def test_who_counts_as_before_somebody() -> None:
    """Those who could take what one waits for, also by way of others; nobody else."""
    devices = machine(("A100", 80), ("T4", 16), ("L4", 24))
    waiting = [ticket(1, "A100"), ticket(2, "T4"), ticket(3, "L4")]
    assert [one.number for one in rivals(parse("A100"), waiting, devices)] == [1]
    waiting.append(Ticket(number=4, request=parse(["A100", "T4"]), sandbox_id="x", pid=1, uid=0, since=0.0))
    assert [one.number for one in rivals(parse("A100"), waiting, devices)] == [1, 2, 4]


def test_the_longest_idle_make_room_and_no_more_than_needed() -> None:
    """One device is wanted: one gives it, of the kind that is wanted; a request that cannot be met takes none."""
    devices = machine(("A100", 80), ("A100", 80), ("T4", 16))
    uses = {device.uuid: Use("x") for device in devices}
    idle = [Holding(SandboxId(name), (uuid,)) for name, uuid in (("t", "GPU-2"), ("old", "GPU-1"), ("new", "GPU-0"))]
    assert to_reclaim([ticket(1, "A100")], devices, uses, idle) == ["old"]
    assert to_reclaim([ticket(1, "A100"), ticket(2, "any")], devices, uses, idle) == ["old", "t"]
    assert to_reclaim([ticket(1, "A100:2")], devices, uses, idle[:2]) == []
    assert to_reclaim([ticket(1, "H100")], devices, uses, idle) == []
    assert to_reclaim([], devices, uses, idle) == []


def test_nobody_makes_room_for_one_who_is_served_anyway() -> None:
    """A device is free, so the idle one keeps its own."""
    idle = [Holding(SandboxId("old"), ("GPU-0",))]
    assert to_reclaim([ticket(1, "A100")], PAIR, {"GPU-0": Use("x")}, idle) == []


@pytest.mark.parametrize(
    ("place", "devices", "ended", "expected"),
    [(1, 1, [60.0] * 2, None), (1, 1, [60.0] * 3, 60.0), (3, 2, [60.0, 120.0, 180.0], 180.0), (1, 0, [1.0] * 9, None)],
)
def test_a_wait_is_estimated_from_leases_that_ended(
    place: int, devices: int, ended: list[float], expected: float | None
) -> None:
    """One device comes back each mean lease divided by the devices; of too few nothing is said."""
    assert estimate_s(place, devices, ended) == expected


kinds = st.sampled_from([("T4", 16), ("A100", 40), ("A100", 80)])
machines = st.lists(kinds, min_size=1, max_size=5).map(lambda found: machine(*found))
wishes = st.tuples(st.sampled_from(["any", "A100", "T4", "24GiB"]), st.sampled_from(["", ":2", ":3", "/2", "/4"])).map(
    "".join
)


@dataclass
class Machine:
    """The state that all keepers see, changed as they change it."""

    devices: tuple[GpuDevice, ...]
    held: dict[str, Grant] = field(default_factory=dict)
    queue: list[Ticket] = field(default_factory=list)
    asked: int = 0

    @property
    def uses(self) -> dict[str, Use]:
        uses: dict[str, Use] = {}
        for who, grant in self.held.items():
            uses = grant.used(uses, who)
        return uses

    def ask(self, wish: str) -> None:
        self.asked += 1
        try:
            serve(parse(wish), self.queue, self.devices, self.uses, most_parts=PARTS)
        except InvalidRequestError:
            return
        except NoGpuAvailableError:
            pass
        self.queue.append(ticket(self.asked, wish))

    def settle(self, order: list[int]) -> None:
        """Keepers look in any order until nobody is served any more."""
        again = True
        while again:
            again = False
            for n in order + list(range(len(self.queue))):
                if n >= len(self.queue):
                    continue
                one = self.queue[n]
                before = [other for other in self.queue if other.number < one.number]
                try:
                    grant = serve(one.request, before, self.devices, self.uses, most_parts=PARTS)
                except NoGpuAvailableError:
                    continue
                self.held[one.sandbox_id] = grant
                self.queue.remove(one)
                again = True
                self.check()

    def reclaim(self) -> None:
        """All who have something are idle."""
        idle = [Holding(SandboxId(who), tuple(d.uuid for d in grant.devices)) for who, grant in self.held.items()]
        for who in to_reclaim(self.queue, self.devices, self.uses, idle, most_parts=PARTS):
            del self.held[who]

    def check(self) -> None:
        """No device is given twice, none is given in more shares than it has, each grant is what was asked for."""
        parts: dict[str, list[int]] = {}
        for grant in self.held.values():
            assert len({device.uuid for device in grant.devices}) == len(grant.devices)
            for device in grant.devices:
                parts.setdefault(device.uuid, []).append(grant.parts)
        for found in parts.values():
            assert len(set(found)) == 1
            assert len(found) <= found[0]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), wishes),
        st.tuples(st.sampled_from(["release", "crash", "reclaim", "leave"]), st.integers(0, 20)),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(machines, steps, st.lists(st.integers(0, 6), max_size=4))
def test_nothing_is_given_twice_or_lost_and_nobody_starves(
    devices: tuple[GpuDevice, ...], steps: list[tuple[str, object]], order: list[int]
) -> None:
    """Any sequence of requests, releases, crashes, cancels and preemptions, in any order of who looks first.

    In the end, when those who hold give back one after another, everybody is served in at most as many rounds as
    there are who wait, and then every device is free.
    """
    state = Machine(devices)
    for kind, what in steps:
        if kind == "ask":
            state.ask(str(what))
        elif kind == "reclaim":
            state.reclaim()
        elif kind == "leave" and state.queue:
            state.queue.pop(int(str(what)) % len(state.queue))
        elif kind in ("release", "crash") and state.held:
            state.held.pop(list(state.held)[int(str(what)) % len(state.held)])
        state.settle(order)
        state.check()
    waiting = len(state.queue)
    for _ in range(waiting):
        if not state.queue:
            break
        first = state.queue[0]
        state.held.clear()
        state.settle(order)
        assert first not in state.queue
    assert state.queue == []
    state.held.clear()
    assert state.uses == {}


@settings(max_examples=80, deadline=None)
@given(machines, wishes, st.lists(wishes, min_size=1, max_size=12), st.data())
def test_a_stream_of_others_never_passes_the_first(
    devices: tuple[GpuDevice, ...], wish: str, others: list[str], data: st.DataObject
) -> None:
    """Somebody waits for what is held, others come all the time, holders leave one by one: the first one is served as
    soon as those who held when it came have left, whoever came since.
    """
    state = Machine(devices)
    for each in others:
        state.ask(each)
        state.settle([])
    state.queue.clear()
    holders = list(state.held)
    state.ask(wish)
    if not state.queue:
        return
    first = state.queue[0]
    state.settle([])
    while holders and first in state.queue:
        state.held.pop(holders.pop(data.draw(st.integers(0, len(holders) - 1))), None)
        for each in others:
            state.ask(each)
        order = data.draw(st.permutations(range(len(state.queue))))
        state.settle(list(order))
    assert first not in state.queue
