"""One cell on the ranks of a sandbox: each once, or item by item; the first failure stops the rest."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..values import CannotTravelError, Packed, lost_of
from .api import KeeperError
from .board import STOPPED
from .failures import error_of
from .run import Event, Inbox, Run
from .sending import Load
from .stopping import Presses, held

STOP_TIMEOUT_S = 10.0
"""How long interrupted cells have to end before their sandbox is removed."""

NOT_STOPPED = f"The remote cell has not stopped within {STOP_TIMEOUT_S:.0f} s, so its sandbox was removed"

TRIES = 3
"""How often a task is begun whose rank ends under it."""

LOST = ("sandbox_died", "sandbox_start")
"""Codes that say that a rank has ended, or could not start, and only that."""

REFUSED = "capacity"
"""The code that says that values do not fit."""

KNOWN = ("timeout", REFUSED)
"""Codes after which the ranks are what they were."""

PRESSES_MAX = 3
"""When the stop button is pressed this often nobody waits for the end, and the ranks are lost."""

TICK_S = 0.1
REMIND_S = 2.0


class Task(NamedTuple):
    """One cell to be run."""

    code: str
    extra: Mapping[str, Any] | Packed
    """Variables for it alone, or what they were when they were packed."""
    rank: int | None = None
    """Where; None: on whichever rank is free."""
    label: str = ""
    """How it is called in errors; empty: as its rank."""


class Show(Protocol):
    """Whoever shows what ranks say."""

    def begin(self, rank: int, label: str) -> None:
        """A task begins on that rank."""

    def message(self, rank: int, message: Mapping[str, Any]) -> None:
        """Something of its output."""

    def end(self, rank: int, failed: str) -> None:
        """It has ended; `failed` says how, empty: well, `STOPPED`: it was told to."""

    def tick(self) -> None:
        """Now and then."""


class Held(Protocol):
    """What ranks were sent."""

    sent: int
    """Bytes so far."""

    def lose(self, rank: int) -> None:
        """Nobody knows what this one has."""

    def missed(self, rank: int, names: Iterable[str]) -> None:
        """This one does not have those."""


class Ranks(Protocol):
    """Kernels that a cell runs on: those of one sandbox, or clones."""

    ranks: int
    """How many."""

    replaced: bool
    """Whether another kernel takes the place of one that has ended, with the next cell there."""

    @property
    def place(self) -> str:
        """Where they are, in a few words."""

    @property
    def devices(self) -> Sequence[str]:
        """What each computes on, in a few words."""

    @property
    def gpus_each(self) -> float:
        """GPUs that each holds."""

    @property
    def store(self) -> Held:
        """What they were sent."""

    def run(self, head: Mapping[str, Any], body: bytes, inbox: Inbox) -> Run:
        """A cell on one of them."""

    def interrupt(self, rank: int) -> None:
        """Interrupt what runs on one."""

    def lose(self) -> None:
        """Nobody knows what they are doing."""


class Sent(Protocol):
    """What they need for a cell."""

    def load(self, rank: int, extra: Any) -> Load:
        """What one is to load before it, and `extra`."""

    def loaded(self, rank: int, load: Load) -> None:
        """It has it."""


class FanOut:
    """Runs tasks on ranks and gathers what they bring back."""

    def __init__(
        self,
        pod: Ranks,
        tasks: Sequence[Task],
        *,
        parcel: Sent,
        get: Sequence[str] = (),
        last: str = "",
        timeout_s: float | None = None,
        cell: int = 0,
        retry: bool = False,
        together: bool = True,
        sent_before: int | None = None,
        progress: Callable[[int, int], None] = lambda got, total: None,
    ) -> None:
        """Prepare it.

        Args:
            pod: Where.
            tasks: What is run.
            parcel: Variables that all of them need.
            get: Variables to bring back from each.
            last: What to call the value of each one's last line; empty: it is not brought back.
            timeout_s: For each task.
            cell: Number of the cell here.
            retry: A task whose rank ends under it is begun again: on that rank's next kernel, or on another rank.
            together: The first that fails stops the others.
            sent_before: What the ranks had been sent before it, in bytes. None: all so far.
            progress: Told how many bytes of how many have come back, while they come.
        """
        self._pod = pod
        self._tasks = tasks
        self._parcel = parcel
        self._head = {"get": list(get), "last": last, "ranks": pod.ranks}
        self._cell = cell
        self._retry = retry
        self._together = together
        self.on_result: Callable[[int, Mapping[str, Any]], None] = lambda number, values: None
        """Told what a task has brought back, as it ends."""
        self.on_error: Callable[[int, BaseException], None] = lambda number, error: None
        """Told how a task has failed."""
        self._timeout_s = timeout_s
        self._sent_before = pod.store.sent if sent_before is None else sent_before
        self._interrupted_at = 0.0
        self._inbox = Inbox()
        self._progress = progress
        self._coming: list[Run] = []
        """Those whose values come back at the same time, until the last has them."""
        self._running: dict[int, tuple[Run, Any]] = {}
        self._waiting = collections.deque(range(len(tasks)))
        self._tries = [0] * len(tasks)
        self._gone: set[int] = set()
        """Ranks that have ended for good."""
        self._again: dict[int, list[str]] = {}
        """Task to what its rank was believed to have, and has not."""
        self._failed: dict[int, str] = {}
        """Rank to how its task failed."""
        self._first: BaseException | None = None
        self._stopping: threading.Timer | None = None
        self.results: list[Mapping[str, Any] | None] = [None] * len(tasks)

    def run(self, show: Show) -> list[Mapping[str, Any]]:
        """Run them all; what each has brought back, in their order.

        Raises:
            KeyboardInterrupt: Stopped. Three times, so that nobody waited for the end: then the ranks are lost.
            KeeperError: A rank or all of the sandbox is gone.
            BaseException: What the first that failed raised.
        """
        try:
            with held(most=PRESSES_MAX) as presses:
                self._run(show, presses)
        except BaseException:
            self._pod.lose()
            raise
        finally:
            if self._stopping is not None:
                self._stopping.cancel()
            for run, _ in self._running.values():
                run.close()
        if self._first is not None:
            raise self._first
        if self._stopping is not None and any(result is None for result in self.results):
            raise KeyboardInterrupt
        return [dict(result or {}) for result in self.results]

    def _run(self, show: Show, presses: Presses) -> None:
        begun, heeded = False, 0
        while self._running or not begun:
            if presses.count > heeded:
                heeded = presses.count
                self.stop()
            try:
                if not begun:
                    begun = True
                    self._assign(show)
                    show.tick()  # While the ranks work, rather than once they have.
                    continue
                event = self._inbox.get(TICK_S)
                if event is None:
                    show.tick()
                    self._remind()
                else:
                    self._take(event, show)
                self._look_at_what_comes()
            except KeyboardInterrupt:  # What was being sent is left.
                if presses.given_up:
                    raise
                self.stop()

    def _look_at_what_comes(self) -> None:
        running = [run for run, _ in self._running.values()]
        self._coming += [run for run in running if run.size and run not in self._coming]
        if self._coming:
            self._progress(sum(run.got for run in self._coming), sum(run.size for run in self._coming))
            if not any(run in running for run in self._coming):
                self._coming = []

    @property
    def sent_bytes(self) -> int:
        """What had to be sent for it."""
        return self._pod.store.sent - self._sent_before

    def stop(self, *, but: int | None = None) -> None:
        """Interrupt all that runs, but one task, and begin nothing more. Callable from any thread."""
        self._waiting.clear()
        if self._stopping is None:
            self._stopping = threading.Timer(STOP_TIMEOUT_S, self._give_up)
            self._stopping.daemon = True
            self._stopping.start()
        self._interrupt(but)

    def _interrupt(self, but: int | None = None) -> None:
        self._interrupted_at = time.monotonic()
        for rank, (run, _) in list(self._running.items()):
            if run.task == but:
                continue
            if not run.begun:
                self._running.pop(rank)
                continue
            try:
                self._pod.interrupt(rank)
            except KeeperError:
                self._give_up()

    def _remind(self) -> None:
        """Interrupt again what should have ended: a rank may not have begun when it was interrupted."""
        if self._stopping is not None and time.monotonic() - self._interrupted_at > REMIND_S:
            self._interrupt()

    def _give_up(self) -> None:
        for run, _ in list(self._running.values()):
            run.abort(KeeperError(NOT_STOPPED, code="aborted"))

    def _assign(self, show: Show) -> None:
        """Give every free rank the next task that it may have."""
        for rank in range(self._pod.ranks):
            while rank not in self._running and rank not in self._gone:  # One that is refused leaves it free.
                number = next((one for one in self._waiting if self._tasks[one].rank in (None, rank)), None)
                if number is None:
                    break
                self._waiting.remove(number)
                self._begin(number, rank, show)

    def _begin(self, number: int, rank: int, show: Show) -> None:
        task = self._tasks[number]
        try:
            load = self._parcel.load(rank, task.extra)
        except (CannotTravelError, KeeperError) as error:
            if getattr(error, "code", REFUSED) != REFUSED:
                raise
            self._refused(number, rank, error, show)
            return
        show.begin(rank, task.label)
        head = {**self._head, "code": task.code, "rank": rank, "send": len(load.body), "load": load.told}
        if self._timeout_s is not None:
            head["timeout_s"] = self._timeout_s
        run = self._pod.run(head, load.body, self._inbox)
        run.task = number
        self._running[rank] = (run, load)
        run.begin()  # An interrupt that comes before this finds it known, and not begun.

    def _refused(self, number: int, rank: int, error: Exception, show: Show) -> None:
        """What a task needs cannot be sent: it has failed, and the ranks are as they were."""
        show.begin(rank, self._tasks[number].label)
        show.end(rank, str(error))
        self._fail(error, number)

    def _take(self, event: Event, show: Show) -> None:
        run = event.run
        if self._running.get(run.rank, (None, None))[0] is not run:
            return
        if event.message is not None:
            self._hear(run, event.message, show)
            return
        load = self._running.pop(run.rank)[1]
        if run.task in self._again:  # It had lost what it was believed to have.
            self._pod.store.missed(run.rank, self._again.pop(run.task))
            self._waiting.appendleft(run.task)
        elif event.error is not None:
            self._lost(run, event.error, show)
        else:
            self._parcel.loaded(run.rank, load)
            self.results[run.task] = run.values
            failed = self._failed.pop(run.rank, "")
            if (event.done or {}).get("status") == "ok":
                self.on_result(run.task, run.values)
            elif not failed:
                failed = "failed"
            show.end(run.rank, failed)
        if self._stopping is None:
            self._assign(show)

    def _hear(self, run: Run, message: Mapping[str, Any], show: Show) -> None:
        if message["msg_type"] != "error":
            show.message(run.rank, message)
            return
        content = message["content"]
        if message.get("step") == "load" and content.get("ename") == "LookupError" and self._tries[run.task] < TRIES:
            self._tries[run.task] += 1
            self._again[run.task] = lost_of(str(content.get("evalue")))
            return
        stopped = self._stopping is not None and content.get("ename") == "KeyboardInterrupt"
        self._failed[run.rank] = STOPPED if stopped else f"{content.get('ename')}: {content.get('evalue')}"
        label = self._tasks[run.task].label
        several = self._pod.ranks > 1
        where = label or (f"Rank {run.rank}" if several else "")
        self._fail(error_of(content, where=where, rank=run.rank if several else None, cell=self._cell), run.task)

    def _lost(self, run: Run, error: BaseException, show: Show) -> None:
        code = getattr(error, "code", "")
        known = code in KNOWN or isinstance(error, CannotTravelError)
        if not known:
            self._pod.store.lose(run.rank)
        show.end(run.rank, str(error))
        self._failed.pop(run.rank, None)
        if self._retry and code in LOST and self._tries[run.task] + 1 < TRIES and self._stopping is None:
            if not self._pod.replaced:
                self._gone.add(run.rank)
            if len(self._gone) < self._pod.ranks:
                self._tries[run.task] += 1
                self._waiting.appendleft(run.task)
                return
        if not known and (self._together or code not in LOST):
            self._pod.lose()
        self._fail(error, run.task)

    def _fail(self, error: BaseException, number: int) -> None:
        self.on_error(number, error)
        if not self._together:
            return
        if self._first is None:
            self._first = error
            if self._stopping is None:
                self.stop(but=number)
