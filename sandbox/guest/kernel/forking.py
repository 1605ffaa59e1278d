"""`warmcell.fork`: a running cell becomes several, each in a sandbox of its own.

The answer is a file in the run directory, looked for again and again. A kernel can be saved only while it has no
connection to the outside, and what wakes it must work in a clone too, whose run directory is another one: an inotify
watch would be on the old directory, a pipe or lock would have no one at its other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..magics.answers import wait_for_answer
from ..magics.api import Api, KeeperError
from ..magics.stopping import held
from ..values import CannotTravelError, dumps, loads
from . import newborn

RESULT_LOOK_S = 0.02
RESULT_LOOK_MAX_S = 0.25
MOST = 1024
FORK_TIMEOUT_S = 60.0
"""How long a fork is waited for that was interrupted."""

_run = ""


class ForkError(Exception):
    """There is no fork, for the reason that it says."""

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(f"{message.rstrip('.')}. {hint}".strip() if hint else message)
        self.code = code

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class CloneError(Exception):
    """What a clone's cell raised, with its traceback."""

    def __init__(self, value: str, traceback: Sequence[str]) -> None:
        super().__init__(value)
        self._traceback = list(traceback)

    def _render_traceback_(self) -> list[str]:
        return self._traceback


class Clone:
    """One clone, as the original sees it."""

    def __init__(self, api: Api, sandbox_id: str, rank: int) -> None:
        self.id = sandbox_id
        self.rank = rank
        self._api = api
        self._told: bytes | None = None

    def __repr__(self) -> str:
        return f"<clone {self.rank} in sandbox {self.id}>"

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has a result; False if it has none after `timeout` seconds.

        No connection is kept meanwhile, so this kernel can be saved while it waits.

        Raises:
            KeeperError: It ended without one.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = RESULT_LOOK_S
        while self._told is None:
            self._told = self._api.result(self.id)
            if self._told is not None:
                break
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(pause if deadline is None else max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(RESULT_LOOK_MAX_S, 1.5 * pause)
        return True

    def result(self, timeout: float | None = None) -> Any:
        """What it gave to `done`; without that, the value of the last expression of its cell.

        Raises:
            TimeoutError: It has none after `timeout` seconds.
            CloneError: Its cell raised an error.
            CannotTravelError: The value could not be sent.
            KeeperError: It ended without a result.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"clone {self.rank} has no result after {timeout:g} s")
        assert self._told is not None
        head, _, data = self._told.partition(b"\n")
        told = json.loads(head)
        if "cannot" in told:
            raise CannotTravelError(told["cannot"])
        if "ename" in told:
            raise CloneError(f"{told['ename']}: {told['evalue']}", told["traceback"])
        return loads(data)["value"]

    def kill(self) -> None:
        """End it and its sandbox; one that is gone already is no error."""
        self._api.delete(self.id)


class Fork:
    """What `fork` gives: in the original the clones, in each clone its number."""

    def __init__(self, rank: int | None, clones: Sequence[Clone], *, report: Report | None = None) -> None:
        self.rank = rank
        """None in the original; 0 to n-1 in the clones."""
        self.clones = tuple(clones)
        """In the original; empty in a clone."""
        self._report = report

    def __repr__(self) -> str:
        return f"<clone {self.rank}>" if self.rank is not None else f"<the original of {len(self.clones)} clones>"

    def done(self, value: Any = None) -> None:
        """In a clone: let `value` be what `result()` gives in the original. The cell goes on. Only once.

        Raises:
            ForkError: This is the original, or there is a result already.
            CannotTravelError: The value cannot be pickled.
        """
        if self._report is None:
            raise ForkError("done() is for clones, and this is the original")
        self._report.value(value)


class Report:
    """A clone's result on its way to the original."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._made = False

    def value(self, value: Any) -> None:
        """Hand over a value."""
        if self._made:
            raise ForkError("This clone has handed over its result already")
        self._write({}, dumps({"value": value}))

    def of_cell(self, result: Any) -> None:
        """Called at the end of the cell: hand over its outcome if nothing was handed over."""
        from IPython.core.getipython import get_ipython

        shell: Any = get_ipython()
        with contextlib.suppress(ValueError):
            shell.events.unregister("post_run_cell", self.of_cell)
        if self._made:
            return
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            lines = list(shell.InteractiveTB.structured_traceback(type(error), error, error.__traceback__))
            self._write({"ename": type(error).__name__, "evalue": str(error), "traceback": lines}, b"")
            return
        try:
            data = dumps({"value": result.result})
        except CannotTravelError as cannot:
            self._write({"cannot": str(cannot)}, b"")
        else:
            self._write({}, data)

    def _write(self, head: Mapping[str, Any], data: bytes) -> None:
        _write(self._path, json.dumps(head).encode() + b"\n" + data)
        self._made = True


def settle(run: str) -> None:
    """Tell this module where the kernel's run directory is."""
    global _run
    _run = run


def fork(n: int = 1) -> Fork:
    """Make `n` clones of this kernel, each in a sandbox of its own, and go on in all of them.

    All variables, threads and child processes are there in each, with memory shared until it is written; open files are
    the clone's own. Random generators are seeded anew, except those that the notebook holds itself.

        f = warmcell.fork(4)
        if f.rank is None:
            parts = [clone.result() for clone in f.clones]
        else:
            f.done(train(f.rank))

    Raises:
        ForkError: It cannot be had here, or not now; the message says why.
    """
    if type(n) is not int or not 1 <= n <= MOST:
        raise ValueError(f"fork() makes 1 to {MOST} clones, not {n!r}")
    token = secrets.token_hex(8)
    answer = divide(n, token)
    rank = answer.get("rank")
    if rank is None:
        api = Api(f"{_run}/api.sock")
        return Fork(None, [Clone(api, str(each), number) for number, each in enumerate(answer.get("clones") or ())])
    report = Report(f"{_run}/result-{token}")
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    if shell is not None:
        shell.events.register("post_run_cell", report.of_cell)
    return Fork(int(rank), (), report=report)


def divide(n: int, token: str, *, ranks: bool = False) -> Mapping[str, Any]:
    """Make `n` clones, and go on in all of them: what the keeper answers the original, or this clone.

    Args:
        n: How many.
        token: Sixteen hexadecimal digits that nobody else has.
        ranks: They are the ranks of a cell: they end with this kernel's process, and are told what ranks are.

    Raises:
        ForkError: It cannot be had here, or not now; the message says why.
        KeyboardInterrupt: The clones that were made meanwhile are gone again.
    """
    if not _run:
        raise ForkError("This kernel cannot be forked", "Run the notebook on a Warmcell kernel.", "unsupported")
    if not os.path.exists(f"{_run}/api.sock"):
        raise ForkError(
            "This kernel has nobody to ask for a fork",
            "Kernels that Warmcell's keeper started can be forked; restart this one in Jupyter.",
            "unsupported",
        )
    sys.stdout.flush()
    sys.stderr.flush()
    api = Api(f"{_run}/api.sock")
    with held() as presses:  # Else nobody would know of the clones that come.
        try:
            api.fork(token, n, ranks=ranks)
        except KeeperError as error:
            raise ForkError(str(error), code=error.code) from None
        try:
            answer = wait_for_answer(_run, token, unless=lambda: presses.seconds_ago > FORK_TIMEOUT_S)
        except TimeoutError:
            raise KeyboardInterrupt from None
    if presses.count:
        for clone in answer.get("clones") or ():
            with contextlib.suppress(KeeperError):
                api.delete(str(clone))
        raise KeyboardInterrupt
    if answer.get("ok") is not True:
        code = str(answer.get("code", ""))
        raise ForkError(str(answer.get("message") or "The fork failed"), str(answer.get("hint") or ""), code)
    if answer.get("rank") is not None:
        newborn.reseed()
    return answer


def _write(path: str, content: bytes) -> None:
    """Make a file that is whole as soon as it has its name."""
    part = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.part")
    with open(part, "wb") as file:
        file.write(content)
    os.rename(part, path)
