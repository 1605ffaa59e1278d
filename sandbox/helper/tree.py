"""A kernel's processes while they stand still: stopped, set going again, or ended, whatever is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

from warmcell.sandbox.helper import linux, tracing
from warmcell.sandbox.helper.places import field, status
from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from warmcell.sandbox.helper.places import Place

STOP_TIMEOUT_S = 30.0
AT_REST_S = 10.0
"""What threads may take to stand still again that criu has let go of."""
UNTRACED_LOOK_S = 0.001
GUARDED_S = 1800.0
"""Longer than criu and the copy of the layer may take."""


class Tree:
    """The processes of a kernel, to be set going again or ended."""

    def __init__(self, place: Place, pid: int) -> None:
        self._place, self.pid = place, pid
        self.saved: tracing.Saved | None = None
        self.stopped_before = {one for one in place.processes(pid) if _is_stopped(one)}

    def pids(self) -> list[int]:
        """Of the host, the kernel first."""
        return list(self._place.processes(self.pid))

    def stop(self) -> None:
        """Stop every process, note down how its threads stand, and wait until no thread of any runs.

        A thread that has been looked at goes back to being stopped by itself, which on a busy machine takes a while.
        criu must not find it on the way there: it would have it run on, and wait for it in vain.
        """
        deadline = time.monotonic() + STOP_TIMEOUT_S
        self._stop_all(deadline)
        self.saved = tracing.Saved(self.pids())
        self._stop_all(deadline)

    def _stop_all(self, deadline: float) -> None:
        running = True
        while running:
            running = False
            for pid in self.pids():
                if not _all_stopped(pid):
                    running = True
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSTOP)
            if time.monotonic() > deadline:
                raise HelperError(
                    "timeout", "A process of the kernel cannot be stopped", details={"timeout": STOP_TIMEOUT_S}
                )

    def require_stopped(self, *, timeout_s: float = 0.0) -> None:
        """That nobody has set any of it going since it was stopped. Only who let go of it last may need some time.

        Raises:
            HelperError: Somebody has: what was read of it is of several moments.
        """
        deadline = time.monotonic() + timeout_s
        while not all(map(_all_stopped, self.pids())):
            if time.monotonic() >= deadline:
                raise HelperError(
                    "conflict",
                    "Something in the sandbox has set the kernel going while it was saved",
                    hint="Try again, and see that no process of the sandbox sends SIGCONT to the kernel.",
                )
            time.sleep(UNTRACED_LOOK_S)

    def is_whole(self) -> bool:
        """Whether none that is traced has died. criu waits for such a one, and the one for criu, if it has threads."""
        return not any(field(pid, "State").startswith("Z") and _is_traced(pid) for pid in self.pids())

    def thaw(self, *, repair: bool = False) -> None:
        """Go on, except what its own user had stopped; with `repair` from where it was stopped, whatever was done."""
        try:
            if repair and self.saved is not None:
                self._wait_until_untraced()
                self.saved.put_back()
        finally:
            for pid in reversed(self.pids()):
                if pid not in self.stopped_before:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)

    def _wait_until_untraced(self) -> None:
        """A tracer that dies closes its descriptors before it lets go of its threads. The dead need not be put back."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while any(_is_traced(pid, alive=True) for pid in self.pids()) and time.monotonic() < deadline:
            time.sleep(UNTRACED_LOOK_S)

    def handles(self) -> list[int]:
        """Descriptors of its processes, which name them also when their numbers are others'."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                found.append(os.pidfd_open(pid))
        return found


class Guardian:
    """A process that sets a tree going again should this one be killed before it has."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._reading, self.held = os.pipe2(os.O_CLOEXEC)
        self._children = [self._forked()]

    def _forked(self) -> int:
        child = os.fork()
        if child == 0:
            try:
                linux.close_but([2, self._reading])
                linux.name_process("warmcell-thaw")
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                waiting = select.poll()
                waiting.register(self._reading, select.POLLIN | select.POLLHUP)
                # What was held is let go of when criu has ended too, which goes on without who started it.
                if not waiting.poll(1e3 * GUARDED_S) or not os.read(self._reading, 1):
                    self._tree.thaw(repair=True)
            finally:
                os._exit(0)
        return child

    def renew(self) -> None:
        """Have one instead that knows from where the threads of the tree, which is stopped, would have to go on."""
        self._children.append(self._forked())
        os.kill(self._children[0], signal.SIGKILL)
        os.close(self._reading)

    def dismiss(self) -> None:
        """The tree goes on, or is dead."""
        os.write(self.held, b".")
        os.close(self.held)

    def wait(self) -> None:
        """Until no process of it is left."""
        for child in self._children:
            os.waitpid(child, 0)


def _all_stopped(pid: int) -> bool:
    threads: list[str] = []
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{pid}/task")
    return all((field(f"{pid}/task/{thread}", "State") or "Z")[0] in "TtZX" for thread in threads)


def _is_traced(pid: int, *, alive: bool = False) -> bool:
    """Whether any thread of it is; of those that live only, if asked."""
    threads: list[str] = []
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{pid}/task")
    found = (status(f"{pid}/task/{thread}") for thread in threads)
    return any(
        one.get("TracerPid", "0") != "0" and not (alive and one.get("State", "")[:1] in ("Z", "X")) for one in found
    )


def _is_stopped(pid: int) -> bool:
    return field(pid, "State").startswith("T")
