"""A sandbox that the helper has made, held by the process that made it until its keeper or the helper ends."""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import resource
import select
import signal
import socket
import time

from warmcell.sandbox.backends.processes import only_child, start_time
from warmcell.sandbox.backends.stage import main as stage
from warmcell.sandbox.backends.stage.alone import fork
from warmcell.sandbox.backends.stage.linux import CLONE_NEWPID, Refused
from warmcell.sandbox.helper import linux
from warmcell.sandbox.helper.enter import Cancelled
from warmcell.sandbox.helper.places import field
from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from warmcell.sandbox.backends.cgroups import Cgroup
    from warmcell.sandbox.helper.owners import Owners
    from warmcell.sandbox.helper.wire import Conversation
    from warmcell.sandbox.models import LimitStatus

START_TIMEOUT_S = 60.0
GRACE_S = 30.0
LINE_MAX_BYTES = 1 << 16
ENDING = "The helper that had made the sandbox has ended"
TAIL_BYTES = 4096
LIMITS = (
    (resource.RLIMIT_CORE, 0, 0),
    (resource.RLIMIT_MEMLOCK, 8 << 20, 8 << 20),
    (resource.RLIMIT_NICE, 0, 0),
    (resource.RLIMIT_NOFILE, 1024, 1 << 19),
    (resource.RLIMIT_RTPRIO, 0, 0),
)
"""What the helper may have been given must not become its users': soft and hard, at most."""


def hold(
    conversation: Conversation,
    plan: Mapping[str, Any],
    *,
    owners: Owners,
    group: Cgroup | None,
    limits: Mapping[str, LimitStatus],
    alive: int,
) -> None:
    """Start it, tell the caller, wait for its end or bring it about, tell that.

    Args:
        conversation: With its keeper; when that hangs up, or says anything, the sandbox is ended.
        plan: For the stage.
        owners: Where it is registered.
        group: Its control group.
        limits: What that holds.
        alive: A pipe whose other end closes when the helper ends.

    Raises:
        HelperError: It did not start.
        Cancelled: The caller has gone before it was up.
    """
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    os.fchown(writing, conversation.uid, conversation.gid)  # Programs open their own stderr by its name.
    try:
        child, process = fork(CLONE_NEWPID)
    except Refused as error:
        raise _failed(str(error), reading) from None
    if child == 0:
        _become(theirs, writing)
    theirs.close()
    os.close(writing)
    first = -1
    began = _Start(ours, conversation.fileno(), alive)
    try:
        try:
            data = marshal.dumps(dict(plan))
            began.send(len(data).to_bytes(8, "big") + data)
            said = began.line()
            if "failed" in said:
                raise _failed(f"{said['failed']}: {os.strerror(said['errno'])}", reading)
            began.line()  # {"child-pid": …}, which is another number here.
            first, pid = _first_of(child)
            began.line()  # {"up": true}
        except EOFError:
            code = _wait(child, process)
            child = -1
            raise _failed(f"it ended with exit code {code}", reading) from None
        with owners.owned(pid, conversation.uid):
            answer = {
                "ok": True,
                "pid": pid,
                "outer": child,
                "report": said["stage"],
                "limits": {name: one.to_json() for name, one in limits.items()},
            }
            began.fds += [os.dup(reading), *_events(group)]
            conversation.say(answer, fds=began.fds)
            began.close_fds()
            why = _wait_for_end(conversation.fileno(), process, alive)
            _kill(first)
            code = _wait(child, process)
            child = -1
        killed = 0
        if group is not None:
            killed = group.oom_kills()
            group.remove_within(GRACE_S)
        conversation.say({"ended": code, "oom_kills": killed, "why": why})
    finally:
        if child > 0:
            _kill(first)
            _kill(process)
            _wait(child, process)
        for fd in (reading, process, first):
            if fd >= 0:
                os.close(fd)
        began.close()


def _become(control: socket.socket, stderr: int) -> None:
    """The child: carry out the plan, as if just started for nothing else."""
    try:
        os.dup2(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), 0)
        os.dup2(0, 1)
        os.dup2(stderr, 2)
        for number in range(1, signal.NSIG):
            if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
                signal.signal(number, signal.SIG_DFL)
        for limit, soft, hard in LIMITS:
            _, now = resource.getrlimit(limit)
            most = hard if now == resource.RLIM_INFINITY else min(hard, now)
            resource.setrlimit(limit, (min(soft, most), most))
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("0")
        os.umask(0o022)
        linux.close_at_exec()
        stage.main(control.detach())
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)


class _Start:
    """What the stage and bubblewrap say while the sandbox starts."""

    def __init__(self, control: socket.socket, caller: int, alive: int) -> None:
        self._control = control
        self._rest = b""
        self._deadline = time.monotonic() + START_TIMEOUT_S
        self._gone = (caller, alive)
        self.fds: list[int] = []
        control.setblocking(False)

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._ready(select.POLLOUT)
            view = view[self._control.send(view) :]

    def line(self) -> dict[str, Any]:
        """The next object.

        Raises:
            EOFError: It has ended.
        """
        while b"\n" not in self._rest:
            self._ready(select.POLLIN)
            try:
                data, fds, _, _ = socket.recv_fds(self._control, LINE_MAX_BYTES, 4)
            except ConnectionError:
                raise EOFError from None
            self.fds += fds
            if not data or len(self._rest) > LINE_MAX_BYTES:
                raise EOFError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        said = json.loads(line)
        if not isinstance(said, dict):
            raise EOFError
        return said

    def close_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def close(self) -> None:
        self.close_fds()
        self._control.close()

    def _ready(self, event: int) -> None:
        waiting = select.poll()
        waiting.register(self._control, event)
        caller, alive = self._gone
        waiting.register(caller, select.POLLRDHUP)
        waiting.register(alive, select.POLLHUP)
        found = dict(waiting.poll(1e3 * max(0.0, self._deadline - time.monotonic())))
        if caller in found or alive in found:
            raise Cancelled
        if not found:
            raise HelperError("timeout", "The sandbox did not start", details={"timeout": START_TIMEOUT_S})


def _first_of(child: int) -> tuple[int, int]:
    """A descriptor of the sandbox's first process, which has to be a child of bubblewrap's, and its pid."""
    try:
        pid = only_child(child)
        found = os.pidfd_open(pid)
    except OSError:
        raise EOFError from None
    if field(pid, "PPid") != str(child) or start_time(pid) is None:
        os.close(found)
        raise EOFError
    return found, pid


def _wait_for_end(caller: int, process: int, alive: int) -> str:
    """Until the sandbox, its keeper or the helper ends; why, if that was the helper."""
    waiting = select.poll()
    waiting.register(process, select.POLLIN)
    waiting.register(caller, select.POLLIN | select.POLLRDHUP)
    waiting.register(alive, select.POLLHUP)
    ready = dict(waiting.poll())
    return ENDING if {*ready} == {alive} else ""


def _wait(child: int, process: int) -> int:
    """The exit code, as a shell says it; after a while it is killed."""
    waiting = select.poll()
    waiting.register(process, select.POLLIN)
    if not waiting.poll(1e3 * GRACE_S):
        _kill(process)
    _, ended = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(ended)
    return code if code >= 0 else 128 - code


def _kill(pidfd: int) -> None:
    if pidfd >= 0:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _failed(step: str, reading: int) -> HelperError:
    os.set_blocking(reading, False)
    said = b""
    with contextlib.suppress(BlockingIOError):
        said = os.read(reading, TAIL_BYTES)
    words = said.decode(errors="replace").strip()
    return HelperError(
        "sandbox_start",
        f"The sandbox could not start: {words or step}",
        hint="`warmcell doctor` says what this machine lacks.",
        details={"step": step, "stderr": words},
    )


def _events(group: Cgroup | None) -> list[int]:
    """The file in which the keeper sees that the kernel has killed for memory; not every kernel lets users open it."""
    path = "" if group is None else group.events()
    return [os.open(path, os.O_RDONLY | os.O_CLOEXEC)] if path else []
