"""Work inside a sandbox's namespaces, each in a process of its own that ends with the work.

Everything that such a process needs of the host it has open before it enters.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import select
import signal
import socket
import sys
import time

from warmcell.sandbox.helper import linux
from warmcell.sandbox.helper.places import children
from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from warmcell.sandbox.helper.places import Place

LAST_PID = "/proc/sys/kernel/ns_last_pid"
WORK_TIMEOUT_S = 60.0
NEEDED_LOOK_S = 0.25
"""There is no event for a process that has ended and that its tracer has not seen the end of."""


class Cancelled(Exception):
    """The caller has gone meanwhile."""


def do(place: Place, work: Callable[[], Any], *, namespaces: Sequence[str] = ("mnt",)) -> Any:
    """Run `work` in some of the sandbox's namespaces and return what it does, which JSON can say.

    Raises:
        HelperError: `work` raised it, or it does not end.
        OSError: `work` raised it.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = _fork_into(place) if "pid" in namespaces else os.fork()
    if child == 0:
        try:
            linux.die_with_parent()
            with os.fdopen(writing, "wb") as file:
                file.write(_said(lambda: _worked(place, work, namespaces)))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        return _heard(reading)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _worked(place: Place, work: Callable[[], Any], namespaces: Sequence[str]) -> Any:
    for name in namespaces:
        if name in place.namespaces and name != "pid":
            linux.setns(place.namespaces[name])
    return work()


def _fork_into(place: Place) -> int:
    """Fork, into the sandbox's pid namespace."""
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    linux.setns(place.namespaces["pid"])  # It is that of the next fork.
    try:
        child = os.fork()
    except OSError as error:
        linux.setns(own)
        raise HelperError("conflict", "The sandbox has ended", hint="Start another one.") from error
    if child:
        linux.setns(own)
    os.close(own)
    return child


def _said(work: Callable[[], Any]) -> bytes:
    """A line that says what comes of `work`."""
    try:
        said = {"is": work()}
    except HelperError as error:
        said = {"problem": error.to_json()}
    except OSError as error:
        said = {"errno": error.errno or errno.EIO, "what": str(error.filename or error)}
    except BaseException as error:
        said = {"errno": errno.EIO, "what": f"{type(error).__name__}: {error}"}
    return json.dumps(said).encode() + b"\n"


def _heard(fd: int) -> Any:
    """What another process does with its `_said`."""
    said = _read_line(fd, time.monotonic() + WORK_TIMEOUT_S)
    if not said.endswith(b"\n"):
        raise _killed()
    answer: dict[str, Any] = json.loads(said)
    if "problem" in answer:
        problem = answer["problem"]
        raise HelperError(problem["code"], problem["message"], hint=problem["hint"], details=problem["details"])
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["what"])
    return answer["is"]


def _killed() -> HelperError:
    """Whatever was to work in a sandbox was killed; mostly with it."""
    return HelperError(
        "snapshot_failed",
        "The sandbox has ended, or what the helper did in it was killed",
        hint="Try again; if it has ended, start another one.",
    )


def _read_line(fd: int, deadline: float) -> bytes:
    """Up to the end of a line, or less if the other end closes."""
    waiting = select.poll()
    waiting.register(fd, select.POLLIN | select.POLLHUP)
    said = b""
    while waiting.poll(max(0.0, 1e3 * (deadline - time.monotonic()))):
        data = os.read(fd, 65536)
        said += data
        if not data or data.endswith(b"\n"):
            return said
    raise HelperError("timeout", "Work inside the sandbox did not end", details={"timeout": WORK_TIMEOUT_S})


class Run:
    """A program that runs inside the namespaces of a sandbox and in its control groups.

    Entering takes long, so the process is there before its time: it enters, prepares, and waits for the word to become
    the program, while who made it does other things.
    """

    def __init__(
        self,
        place: Place,
        command: tuple[int, Sequence[str], Sequence[int]],
        *,
        env: dict[str, str],
        user: tuple[int, int] | None = None,
        held: Sequence[int] = (),
        join: bool = True,
        last_pid: int = 0,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to enter.

        Args:
            place: Where.
            command: A descriptor to execute, its arguments, and the descriptors that it is to have.
            env: Its whole environment.
            user: uid and gid to run it as, with all capabilities of this process; as this process if None.
            held: Descriptors that stay open until it has ended, whatever becomes of this process.
            join: Have it, and what it starts, be in the sandbox's control groups.
            last_pid: What it starts has numbers above this one, if it is not 0, and so has all that starts later.
            prepare: What is done inside, as root, before.

        Raises:
            HelperError: The sandbox has ended.
        """
        numbers = os.open(LAST_PID, os.O_WRONLY | os.O_CLOEXEC) if last_pid else -1
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._word, word = socket.socketpair()
        self._child = _fork_into(place)
        if self._child == 0:
            try:
                self._word.close()
                if not held:  # Else somebody waits for its end: criu must not be killed in the middle of what it saves.
                    linux.die_with_parent()
                word.sendall(_said(lambda: _enter(place, prepare)))
                if word.recv(1):
                    if last_pid:
                        # The number is that of the pid namespace of who writes, not of the /proc it was opened in.
                        os.pwrite(numbers, str(last_pid).encode(), 0)
                    _become(command, env, user, null, held)
            except BaseException as error:
                sys.stderr.write(f"could not enter the sandbox: {type(error).__name__}: {error}\n")
                sys.stderr.flush()
            finally:
                os._exit(125)
        word.close()
        os.close(null)
        if last_pid:
            os.close(numbers)
        self._place, self._joins, self._gone = place, join, False
        self._pidfd = os.pidfd_open(self._child)

    def go(self) -> None:
        """Let it become the program, once it has prepared.

        Raises:
            HelperError: `prepare` raised it, or does not end.
            OSError: `prepare` raised it, or the sandbox cannot be entered.
        """
        _heard(self._word.fileno())
        try:
            self._word.sendall(b".")
        except ConnectionError:
            raise _killed() from None
        self._gone = True

    @property
    def waits(self) -> int:
        """What can be read when `go` need not wait, and after that when the program has ended."""
        return self._pidfd if self._gone else self._word.fileno()

    def join(self) -> None:
        """Put it into the sandbox's control groups, and what it has started before it was in them.

        Linux may take ten milliseconds over the first of them, which is why this is done beside the program.
        """
        groups = _entrances(self._place.pid)
        moved: set[int] = set()
        while late := {self._child, *_below(self._child)} - moved:
            for pid in late:
                _move(pid, groups)
            moved |= late

    def wait(self, *, timeout_s: float, caller: int | None = None, needed: Callable[[], bool] | None = None) -> int:
        """Its exit code, as a shell says it; it is killed when time is up or the caller's socket closes.

        It is killed as well when it is not `needed` and does not end, which is looked at now and then.

        Raises:
            HelperError: Time is up.
            Cancelled: The caller has gone.
        """
        if self._joins:
            self.join()
        waiting = select.poll()
        waiting.register(self._pidfd, select.POLLIN)
        if caller is not None:
            waiting.register(caller, select.POLLRDHUP | select.POLLHUP)
        deadline, spare = time.monotonic() + timeout_s, 0
        ready: dict[int, int] = {}
        while not ready and (left_s := deadline - time.monotonic()) > 0:
            ready = dict(waiting.poll(1e3 * (left_s if needed is None else min(left_s, NEEDED_LOOK_S))))
            if not ready and needed is not None:
                spare = 0 if needed() else spare + 1
                if spare > 1:
                    return self.end()
        ended = self._pidfd in ready
        code = self.end()
        if not ready:
            raise HelperError("timeout", f"CRIU did not finish in {timeout_s:.0f} s", details={"timeout": timeout_s})
        if not ended:
            raise Cancelled
        return code

    def end(self) -> int:
        """Kill it, unless it has ended; its exit code."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            _, ended = os.waitpid(self._child, 0)
            self._code = os.waitstatus_to_exitcode(ended)
            os.close(self._pidfd)
            self._word.close()
            self._pidfd = -1
        return self._code if self._code >= 0 else 128 - self._code


def _enter(place: Place, prepare: Callable[[], None]) -> None:
    linux.name_process("warmcell-run")
    os.setsid()
    for name, fd in place.namespaces.items():
        if name != "pid":
            linux.setns(fd)
    os.chdir("/")
    _check_proc()
    prepare()


def _become(
    command: tuple[int, Sequence[str], Sequence[int]],
    env: dict[str, str],
    user: tuple[int, int] | None,
    null: int,
    held: Sequence[int],
) -> None:
    executable, words, fds = command
    for number in (0, 1, 2):
        os.dup2(null, number)
    for fd in (*fds, *held):
        os.set_inheritable(fd, True)
    linux.close_but([*fds, *held, executable])
    # A task whose list of groups is empty would get those of criu.
    os.setgroups([])
    if user is not None:
        linux.become_with_capabilities(*user)
    if not held:
        linux.die_with_parent()  # Becoming another user has undone it.
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execve(executable, list(words), env)


def hold_limits(place: Place, pids: Iterable[int]) -> None:
    """See to it that processes are in the sandbox's control groups.

    What a `Run` has started is there mostly, but not if the program ended while it was being put there itself.
    """
    groups = _entrances(place.pid)
    for pid in pids:
        _move(pid, groups)


def _check_proc() -> None:
    """Descriptors are opened through /proc, so it has to be the real one, and that of this pid namespace."""
    if os.readlink("/proc/self") != str(os.getpid()):
        raise OSError(2, "/proc is not that of the sandbox")


def _below(pid: int) -> list[int]:
    """All processes that descend from one."""
    found = children(pid)
    for child in found:
        found += children(child)
    return found


def _entrances(pid: int) -> dict[str, tuple[str, str]]:
    """Of each control group of a process, by its hierarchy's controllers: its path there, and where one enters it."""
    roots = _hierarchies()
    found: dict[str, tuple[str, str]] = {}
    try:
        own = _groups(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise _killed() from None
    for controllers, path in own.items():
        mounted, root = roots.get(controllers, ("", "/nowhere"))
        above = root.rstrip("/")
        below = path.removeprefix(above)
        if f"{path}/".startswith(f"{above}/") and "/../" not in f"{below}/":
            found[controllers] = path, f"{mounted}{below}/cgroup.procs"
    return found


def _move(pid: int, groups: Mapping[str, tuple[str, str]]) -> None:
    """Put a process, if it has not ended, into those of the groups that it is not in."""
    try:
        own = _groups(pid)
    except (FileNotFoundError, ProcessLookupError):  # The latter where it is reaped between opening and reading.
        return
    for controllers, (path, entrance) in groups.items():
        if own.get(controllers) != path:
            with contextlib.suppress(ProcessLookupError), open(entrance, "w") as group:
                group.write(str(pid))


def _groups(pid: int | str) -> dict[str, str]:
    groups: dict[str, str] = {}
    with open(f"/proc/{pid}/cgroup", errors="surrogateescape") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            groups[controllers] = path
    return groups


@functools.cache
def _hierarchies() -> Mapping[str, tuple[str, str]]:
    """Of each hierarchy, by its controllers as /proc/PID/cgroup names them: where it is mounted, and what of it.

    Looked at once in each process, none of which lives for long.
    """
    found: dict[str, tuple[str, str]] = {}
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        for line in file:
            mounted, _, described = line.partition(" - ")
            kind, _, options = described.split()[:3]
            fields = mounted.split()
            if kind == "cgroup2":
                found.setdefault("", (fields[4], fields[3]))
            elif kind == "cgroup":
                for name in _names(options):
                    found.setdefault(name, (fields[4], fields[3]))
    return found


def _names(options: str) -> list[str]:
    """What a version 1 hierarchy may be called, from its mount options."""
    words = options.split(",")
    named = [word for word in words if word.startswith("name=")]
    plain = {"rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode", "release_agent"}
    controllers = [word for word in words if word.partition("=")[0] not in plain and word not in named]
    return [*named, *([",".join(controllers), *controllers] if controllers else [])]
