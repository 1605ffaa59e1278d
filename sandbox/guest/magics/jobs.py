"""Remote cells as things: what runs, or has run, in the background or in front."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .board import Board
from .fanout import FanOut, Show
from .widgets import COMMS

LOG_MAX = 5000
"""Messages of one cell that are kept: its last ones."""

LOG_MAX_SIZE = 16 * 2**20
"""Characters in them."""

KEPT = 50
"""Cells that have ended and are still known."""


class NotDoneError(TimeoutError):
    """A detached cell still runs."""


class Job:
    """One remote cell. `result()` waits for what it brings back."""

    cannot_travel = ("a remote cell", "Send what it has brought back, as in job.result().")

    def __init__(
        self,
        number: int,
        cell: str,
        place: str,
        fan_out: FanOut,
        devices: Sequence[str],
        *,
        gpus_each: float = 0,
        quiet: bool,
    ) -> None:
        self.number = number
        self.cell = cell
        self.place = place
        self.board = Board(devices, gpus_each=gpus_each)
        """What its ranks have shown and done."""
        self._fan_out = fan_out
        self._quiet = quiet
        self._log: collections.deque[tuple[str, int, Any]] = collections.deque()
        self._log_size = 0
        self._viewers: list[Show] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._values: list[Mapping[str, Any]] = []
        self._error: BaseException | None = None
        self._bringing = threading.Lock()
        self._brought = False
        self._result: Any = None
        self._finish: Callable[[list[Mapping[str, Any]]], Any] = list

    def __repr__(self) -> str:
        return f"<remote cell {self.number} {self.state} after {self.board.seconds:.1f} s in {self.place}>"

    @property
    def state(self) -> str:
        """`runs`, `done`, `failed` or `stopped`."""
        return self.board.state

    # For its user

    def done(self) -> bool:
        """Whether it has ended."""
        return self._over.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; False if it has not after `timeout` seconds."""
        return self._over.wait(timeout)

    def result(self, timeout: float | None = None) -> Any:
        """What it brought back: the value of its last line, or what `get=` names.

        When that is first asked for, what `get=` names is put into this notebook; later nothing is changed there.

        Raises:
            NotDoneError: It runs still after `timeout` seconds.
            BaseException: What it raised.
        """
        if not self.wait(timeout):
            raise NotDoneError(f"Remote cell {self.number} still runs")
        if self._error is not None:
            raise self._error
        with self._bringing:
            if not self._brought:
                self._result, self._brought = self._finish(self._values), True
            return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What it raised, if it did; raises NotDoneError as `result`."""
        if not self.wait(timeout):
            raise NotDoneError(f"Remote cell {self.number} still runs")
        return self._error

    def stop(self) -> None:
        """Interrupt it."""
        if not self.done():
            self._fan_out.stop()

    # For the magic

    def run(self, finish: Callable[[list[Mapping[str, Any]]], Any], after: Callable[[], None]) -> None:
        """Run it to its end. What comes of it is kept.

        Args:
            finish: Makes the result of what the ranks have brought back.
            after: Called when it has ended, however that came.
        """
        self._finish = finish
        try:
            self._values = self._fan_out.run(self)
            state = "done"
        except BaseException as error:
            self._error = error
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
        finally:
            with self._lock:
                self.board.sent_bytes = self._fan_out.sent_bytes
                self.board.finish(state)
            try:
                after()
            finally:
                self._over.set()

    def attach(self, view: Show) -> None:
        """Have `view` show all that is known of it, and all that comes."""
        with self._lock:
            for rank, group in enumerate(self.board.groups):
                for opened in group.models.opened():
                    view.message(rank, opened)
            for name, rank, what in self._log:
                getattr(view, name)(rank, what)
            self._viewers.append(view)

    def leave(self, view: Show) -> None:
        """`view` shows no more of it."""
        with self._lock:
            self._viewers.remove(view)

    # As a `Show`

    def begin(self, rank: int, label: str) -> None:
        """A task begins."""
        self._tell("begin", rank, label)

    def message(self, rank: int, message: Mapping[str, Any]) -> None:
        """Output comes."""
        if self._quiet and message["msg_type"] == "execute_result":
            return
        self._tell("message", rank, message)

    def end(self, rank: int, failed: str) -> None:
        """A task has ended."""
        self._tell("end", rank, failed)

    def tick(self) -> None:
        """Whoever shows it may do so now."""
        with self._lock:
            self.board.sent_bytes = self._fan_out.sent_bytes
            for view in self._viewers:
                view.tick()

    def _tell(self, name: str, rank: int, what: Any) -> None:
        with self._lock:
            getattr(self.board, name)(rank, what)
            if name != "message" or what["msg_type"] not in (*COMMS, "usage"):  # Those the board keeps.
                self._log.append((name, rank, what))
                self._log_size += _size(what)
                while len(self._log) > LOG_MAX or (self._log_size > LOG_MAX_SIZE and len(self._log) > 1):
                    self._log_size -= _size(self._log.popleft()[2])
            for view in self._viewers:
                getattr(view, name)(rank, what)


def _size(what: Any) -> int:
    """About how much of what is told is text or pictures."""
    if not isinstance(what, Mapping):
        return len(what)
    content = what["content"]
    return len(str(content.get("text", ""))) + sum(len(str(one)) for one in content.get("data", {}).values())


class Jobs:
    """Those of one notebook."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._count = 0

    def next_number(self) -> int:
        """How the next one is called."""
        self._count += 1
        return self._count

    def add(self, job: Job) -> None:
        """Know it, and forget those that ended long ago."""
        self._jobs[job.number] = job
        ended = [number for number, one in self._jobs.items() if one.done()]
        for number in ended[:-KEPT]:
            del self._jobs[number]

    def all(self) -> list[Job]:
        """All that are known."""
        return list(self._jobs.values())

    def find(self, text: str) -> Job:
        """The one of this number; without one the last that runs, or the last.

        Raises:
            KeyError: There is none; the message says what there is.
        """
        if text:
            if not text.isdigit() or int(text) not in self._jobs:
                known = ", ".join(map(str, self._jobs)) or "none yet"
                raise KeyError(f"there is no remote cell {text}; there are: {known}")
            return self._jobs[int(text)]
        if not self._jobs:
            raise KeyError("no remote cell has run yet")
        running = [job for job in self._jobs.values() if not job.done()]
        return (running or list(self._jobs.values()))[-1]
