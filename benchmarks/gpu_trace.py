"""`python -m benchmarks.gpu_trace`: GPU-hours that notebooks hold over a day, with and without giving idle ones back.

A simulation of policy alone: the clock is made up, devices are simulated, and who is served and who makes room is
decided by the engine's own code (`sandbox.gpus.queue`). Sessions come from a seeded generator whose distributions are
those of the production trace in Carver et al., "NotebookOS: A Replicated Notebook Platform for Interactive Training
with On-Demand GPUs", ASPLOS 2026 (arXiv 2503.20591): half of all cells that train take at most 2 minutes and three
quarters at most 5; the median time from one to the next of a session is 5 minutes; nearly 70 % of GPUs are not used in
all of their session's life, and those that are reserved are idle for more than 81 % of the time. What that does not say
is assumed: both times are log-normal, sessions arrive at random and last four hours at the median.

Where a parked kernel goes on at the first sign of a cell, how long that is before the cell follows from the
keystroke-level model (Card, Moran and Newell, CACM 23(7), 1980): 0.4 s from mouse to keys, 1.35 s to make up one's
mind, before a text and before the command that runs it; and 0.24 s for a key (168,000 people: Dhakal et al.,
"Observations on Typing from 136 Million Keystrokes", CHI 2018). How many keys a cell takes is assumed (20 at the
median), as is that every second cell is clicked into first, and how many are run as they stand, by keys alone or not.

Where it goes on as soon as somebody comes back to the notebook, how that begins follows from 10,000 recorded sessions of
86 programmers (Parnin and Rugaber, "Resumption strategies for interrupted programming tasks", Software Quality Journal
19(1), 2011): in 7 % nothing is looked at before code is written, and in 10 % that begins within the first minute. Of
those minutes nothing more is said: the rest is taken to begin after exactly one, and whoever looks at something before
that to look at one thing, which takes 2 s. Runs are taken to be as that study has it of edits. How often somebody comes
back, looks around and leaves again is assumed.
"""

import argparse
import heapq
import itertools
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from warmcell.sandbox.errors import NoGpuAvailableError
from warmcell.sandbox.gpus import queue
from warmcell.sandbox.gpus.allocator import Use
from warmcell.sandbox.gpus.queue import Holding, Ticket
from warmcell.sandbox.gpus.requests import parse
from warmcell.sandbox.models import GIB, GpuDevice, SandboxId

HOUR_S = 3600.0
CELL_MEDIAN_S, CELL_Q3_S = 120.0, 300.0
BETWEEN_MEDIAN_S = 300.0
UNUSED = 0.7
SESSION_MEDIAN_S = 4 * HOUR_S
SPREAD = math.log(CELL_Q3_S / CELL_MEDIAN_S) / statistics.NormalDist().inv_cdf(0.75)
"""Of the logarithm, as the two quantiles of a cell's length have it; the same is assumed for the rest."""

RESUME_S, SUSPEND_S = 0.5, 1.0
"""What it takes to have a kernel of 1 GB go on, and to save it: more than `make bench` measures (P4, P11)."""

VRAM_S_PER_GIB = 0.2
"""What it takes to park a GiB, or to bring it back: 5 GiB/s, as was published for a whole H100 on PCIe 5
(NVIDIA/cuda-checkpoint, issue 29); a pinned copy does 26 to 55. Not measured by us yet."""

PARK_S = 0.1
"""What parking takes beside that: to leave the kernel, and to go on with it."""

HOME_S, MIND_S, KEY_S = 0.4, 1.35, 0.24
AWAY_S = 120.0
"""Whoever has not touched a notebook for so long, and does, has come back to it (labextension/src/model/earlyWake.ts)."""

STRAIGHT, SOON, SOON_S = 0.07, 0.10, 60.0
LOOKS_AROUND = 0.5
"""How often somebody comes back between two cells of a notebook for nothing. Assumed."""

KEYS_MEDIAN = 20.0
CLICKED_INTO = 0.5

PLAIN_START_S = 3.6
"""One plain start with its imports, which the delay is compared with (P3's baseline)."""

SEEDS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Session:
    """A notebook: when it opens, its cells as (thought before it, length), and how long it stays open after them."""

    at: float
    cells: tuple[tuple[float, float], ...]
    tail_s: float


@dataclass(frozen=True, slots=True)
class Policy:
    """When an idle kernel gives its GPU back; None: never."""

    name: str
    always_after_s: float | None = None
    """However few wait."""
    asked_after_s: float | None = None
    """If somebody waits for it."""
    give_back_s: float = SUSPEND_S
    """How long it holds its GPU from then on."""
    come_back_s: float = RESUME_S
    """From having a GPU again until the cell begins."""
    sign_s: "Callable[[random.Random], float] | None" = None
    """How long before a cell there is a sign of it, at which its kernel goes on if a GPU is free; None: cells wait."""
    heeds_returns: bool = False
    """Whether it goes on as well when somebody comes back to the notebook."""


def written(chance: random.Random) -> float:
    """Seconds from the first key, or from the click before it, until a cell that somebody writes is run."""
    keys = max(1.0, chance.lognormvariate(math.log(KEYS_MEDIAN), SPREAD))
    since_first_s = (keys - 1) * KEY_S + MIND_S + 2 * KEY_S
    return since_first_s + (HOME_S + MIND_S + KEY_S if chance.random() < CLICKED_INTO else 0.0)


def some_as_they_stand(chance: random.Random) -> float:
    """The same where every fifth cell is run again unchanged, half of those by keys alone."""
    if chance.random() >= 0.2:
        return written(chance)
    return HOME_S + MIND_S + 2 * KEY_S if chance.random() < CLICKED_INTO else KEY_S


def returning(chance: random.Random) -> float:
    """Seconds from coming back to a notebook until its next cell begins to be written, or is run as it stands."""
    drawn = chance.random()
    if drawn < STRAIGHT:
        return 0.0
    return HOME_S + MIND_S + KEY_S if drawn < SOON else SOON_S


def parking(
    after_s: float,
    vram_gib: int,
    sign_s: "Callable[[random.Random], float] | None" = None,
    signs: str = "",
    *,
    heeds_returns: bool = False,
) -> Policy:
    """Parked, with so much in the memory of its GPU."""
    cost = PARK_S + VRAM_S_PER_GIB * vram_gib
    name = f"parked after {after_s:.0f} s with {vram_gib} GiB{signs}{', or by coming back' if heeds_returns else ''}"
    return Policy(name, after_s, 60.0, give_back_s=cost, come_back_s=cost, sign_s=sign_s, heeds_returns=heeds_returns)


WRITTEN = written, ", woken by typing"
MIXED = some_as_they_stand, ", woken by typing, a fifth run as they stand"


POLICIES = (
    Policy("held until the end"),
    Policy("given back when somebody waits", asked_after_s=60.0),
    Policy("given back after 60 s", always_after_s=60.0, asked_after_s=60.0),
    parking(60.0, 1),
    parking(60.0, 4),
    parking(60.0, 16),
    parking(300.0, 16),
    parking(60.0, 16, *WRITTEN),
    parking(300.0, 4, *WRITTEN),
    parking(300.0, 16, *WRITTEN),
    parking(300.0, 16, *MIXED),
    parking(300.0, 16, *WRITTEN, heeds_returns=True),
    parking(300.0, 16, *MIXED, heeds_returns=True),
)


def generate(seed: int, *, sessions: int = 60, hours: float = 24.0) -> list[Session]:
    """The sessions of a day, the same for one seed."""
    chance = random.Random(seed)

    def lasting(median: float) -> float:
        return chance.lognormvariate(math.log(median), SPREAD)

    made = []
    for _ in range(sessions):
        at, lasts, cells = chance.uniform(0, hours * HOUR_S), lasting(SESSION_MEDIAN_S), list[tuple[float, float]]()
        spent = 0.0
        while chance.random() >= UNUSED if not cells else spent < lasts:
            length = lasting(CELL_MEDIAN_S)
            cells.append((max(1.0, lasting(BETWEEN_MEDIAN_S) - length), length))
            spent += sum(cells[-1])
        made.append(Session(at, tuple(cells), max(0.0, lasts - spent)))
    return sorted(made, key=lambda one: one.at)


@dataclass
class Run:
    """One day under one policy."""

    sessions: Sequence[Session]
    devices: tuple[GpuDevice, ...]
    policy: Policy
    held_s: float = 0.0
    active_s: float = 0.0
    start_waits_s: list[float] = field(default_factory=list)
    wake_delays_s: list[float] = field(default_factory=list)
    _events: list[tuple[float, int, str, int]] = field(default_factory=list)
    _order: "itertools.count[int]" = field(default_factory=itertools.count)
    _tickets: dict[int, Ticket] = field(default_factory=dict)
    _held: dict[int, tuple[GpuDevice, float]] = field(default_factory=dict)
    _idle_since: dict[int, float] = field(default_factory=dict)
    _next: dict[int, int] = field(default_factory=dict)
    _asked: dict[int, float] = field(default_factory=dict)
    _back_at: dict[int, float] = field(default_factory=dict)
    """When those are there that went on at a sign, and whose cell has not come yet."""
    _writes_until: dict[int, float] = field(default_factory=dict)
    """When the next cell comes of those whose kernel has not gone on for it yet."""
    _touched: dict[int, float] = field(default_factory=dict)
    """When somebody last pressed a key or a button in each notebook."""
    _writing: set[int] = field(default_factory=set)
    """Those of them that are being written in while they have their GPU."""

    def go(self) -> "Run":
        """From the first session to the end of the last."""
        for n, session in enumerate(self.sessions):
            self._at(session.at, "ask", n)
        while self._events:
            now, _, what, n = heapq.heappop(self._events)
            getattr(self, f"_{what}")(n, now)
        return self

    @property
    def idle_s(self) -> float:
        """GPU time that was held and not used."""
        return self.held_s - self.active_s

    def _at(self, when: float, what: str, n: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, n))

    def _ask(self, n: int, now: float) -> None:
        self._asked[n] = now
        number = next(self._order)
        self._tickets[n] = Ticket(number=number, request=parse("any"), sandbox_id=str(n), pid=0, uid=0, since=now)
        self._settle(0, now)

    def _settle(self, _: int, now: float) -> None:
        """Serve whoever can be served; have idle ones make room, if that is the policy."""
        while True:
            for n, ticket in sorted(self._tickets.items(), key=lambda each: each[1].number):
                before = [other for other in self._tickets.values() if other.number < ticket.number]
                try:
                    grant = queue.serve(ticket.request, before, self.devices, self._uses())
                except NoGpuAvailableError:
                    break  # All want the same here.
                del self._tickets[n]
                self._held[n] = (grant.devices[0], now)
                self._served(n, now)
            if self.policy.asked_after_s is None or not self._tickets:
                return
            long = self.policy.asked_after_s
            idle = sorted(
                (since, n) for n, since in self._idle_since.items() if n in self._held and now - since >= long
            )
            holdings = [Holding(SandboxId(str(n)), (self._held[n][0].uuid,)) for _, n in idle]
            asked = queue.to_reclaim(list(self._tickets.values()), self.devices, self._uses(), holdings)
            if not asked:
                return
            for name in asked:
                self._give_back(int(name), now)

    def _uses(self) -> dict[str, Use]:
        return {device.uuid: Use(str(n)) for n, (device, _) in self._held.items()}

    def _served(self, n: int, now: float) -> None:
        waited = now - self._asked.pop(n)
        if n in self._next:  # A cell waits for its kernel.
            self.wake_delays_s.append(waited + self.policy.come_back_s)
            self._at(now + self.policy.come_back_s, "begin", n)
        else:
            self.start_waits_s.append(waited)
            self._next[n] = 0
            self._rest(n, now)

    def _rest(self, n: int, now: float) -> None:
        """Nothing runs; somebody thinks, or has gone for the day."""
        session, done = self.sessions[n], self._next[n]
        self._idle_since[n] = now
        self._look_later(n, now)
        if done < len(session.cells):
            thought = session.cells[done][0]
            if self.policy.sign_s is not None:
                chance = random.Random(f"{session.at} {done}")
                writes_at = max(0.0, thought - self.policy.sign_s(chance))
                self._writes_until[n] = now + thought
                self._at(now + writes_at, "sign", n)
                if self.policy.heeds_returns:
                    self._at(now + max(0.0, writes_at - returning(chance)), "touch", n)
                    if chance.random() < LOOKS_AROUND:
                        self._at(now + chance.uniform(0.0, thought), "touch", n)
            self._at(now + thought, "submit", n)
        else:
            self._at(now + session.tail_s, "end", n)

    def _look_later(self, n: int, idle_since: float) -> None:
        for after in {self.policy.always_after_s, self.policy.asked_after_s} - {None}:
            assert after is not None
            self._at(idle_since + after, "look", n)

    def _look(self, n: int, now: float) -> None:
        since, always = self._idle_since.get(n), self.policy.always_after_s
        if since is not None and n in self._held and always is not None and now - since >= always:
            self._give_back(n, now)
        self._settle(n, now)

    def _sign(self, n: int, now: float) -> None:
        """It goes on if a GPU is free that nobody waits for; from then on it is as idle as after a cell."""
        if n not in self._writes_until:
            return
        if n in self._held:  # It may be parked while somebody writes, who is heard as soon as it is.
            self._writing.add(n)
            return
        self._touched[n] = now
        if self._go_on(n, now):
            del self._writes_until[n]

    def _touch(self, n: int, now: float) -> None:
        """Somebody comes back to the notebook, or has been there all the time; writing still counts afterwards."""
        away_s = now - self._touched.get(n, -math.inf)
        self._touched[n] = now
        if away_s >= AWAY_S and n not in self._held:
            self._go_on(n, now)

    def _go_on(self, n: int, now: float) -> bool:
        try:
            grant = queue.serve(parse("any"), list(self._tickets.values()), self.devices, self._uses())
        except NoGpuAvailableError:
            return False
        self._held[n] = (grant.devices[0], now)
        self._back_at[n] = self._idle_since[n] = now + self.policy.come_back_s
        self._look_later(n, self._back_at[n])
        return True

    def _submit(self, n: int, now: float) -> None:
        del self._idle_since[n]
        self._touched[n] = now
        self._writes_until.pop(n, None)
        self._writing.discard(n)
        back_at = self._back_at.pop(n, None)
        if n in self._held and back_at is not None:
            delay = max(0.0, back_at - now)
            self.wake_delays_s.append(delay)
            self._at(now + delay, "begin", n)
        elif n in self._held:
            self._begin(n, now)
        else:
            self._ask(n, now)

    def _begin(self, n: int, now: float) -> None:
        length = self.sessions[n].cells[self._next[n]][1]
        self.active_s += length
        self._at(now + length, "done", n)

    def _done(self, n: int, now: float) -> None:
        self._next[n] += 1
        self._rest(n, now)

    def _end(self, n: int, now: float) -> None:
        self._idle_since.pop(n, None)
        if n in self._held:
            self._release(n, now)

    def _give_back(self, n: int, now: float) -> None:
        """It holds its GPU until that is empty, which delays nobody else by more than that."""
        self._back_at.pop(n, None)
        heard = now + self.policy.give_back_s + KEY_S
        if n in self._writing and heard < self._writes_until.get(n, 0.0):
            self._at(heard, "sign", n)
        self.held_s += self.policy.give_back_s
        self._release(n, now)

    def _release(self, n: int, now: float) -> None:
        _, since = self._held.pop(n)
        self.held_s += now - since
        self._settle(n, now)


def measure(seed: int, *, gpus: int, sessions: int = 60, hours: float = 24.0) -> list[dict[str, Any]]:
    """A row for each policy over one day."""
    day = generate(seed, sessions=sessions, hours=hours)
    devices = tuple(
        GpuDevice(uuid=f"GPU-sim-{n}", index=n, name="A100", memory_total_bytes=80 * GIB, simulated=True)
        for n in range(gpus)
    )
    rows = []
    plain = Run(day, devices, POLICIES[0]).go()
    for policy in POLICIES:
        run = Run(day, devices, policy).go()
        rows.append(
            {
                "seed": seed,
                "gpus": gpus,
                "policy": policy.name,
                "held_gpu_hours": round(run.held_s / HOUR_S, 1),
                "used_gpu_hours": round(run.active_s / HOUR_S, 1),
                "given_back": round(1 - run.idle_s / plain.idle_s, 3),
                "start_wait_p95_s": _p95(run.start_waits_s),
                "wake_delay_p95_s": _p95(run.wake_delays_s),
                "wake_ups": len(run.wake_delays_s),
            }
        )
    return rows


def _p95(found: Sequence[float]) -> float:
    return round(statistics.quantiles(found, n=20, method="inclusive")[-1], 2) if len(found) > 1 else 0.0


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--gpus", type=int, nargs="+", default=(8, 24))
    parser.add_argument("--sessions", type=int, default=60)
    arguments = parser.parse_args()
    for gpus, seed in itertools.product(arguments.gpus, arguments.seeds):
        for row in measure(seed, gpus=gpus, sessions=arguments.sessions):
            json.dump(row, sys.stdout)
            print()


if __name__ == "__main__":
    main()
