"""Work inside a sandbox's namespaces, each in a process of its own that ends with the work.

Everything that such a process needs of the host it has open before it enters.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

from warmcell.sandbox.helper import linux
from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from warmcell.sandbox.helper.places import Place

LAST_PID = "/proc/sys/kernel/ns_last_pid"
WORK_TIMEOUT_S = 20.0


class Cancelled(Exception):
    """The caller has gone meanwhile."""


def do(place: Place, work: Callable[[], Any], *, namespaces: Sequence[str] = ("mnt",)) -> Any:
    """Run `work` in some of the sandbox's namespaces and return what it does, which JSON can say.

    Raises:
        HelperError: `work` raised it.
        OSError: `work` raised it.
    """
    return begin(place, work, namespaces=namespaces)()


def begin(place: Place, work: Callable[[], Any], *, namespaces: Sequence[str] = ("mnt",)) -> Callable[[], Any]:
    """As `do`, but what is returned waits for it; it has to be called."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            linux.die_with_parent()
            said = json.dumps({"is": _worked(place, work, namespaces)})
        except HelperError as error:
            said = json.dumps({"problem": error.to_json()})
        except OSError as error:
            said = json.dumps({"errno": error.errno or 0, "what": str(error.filename or error)})
        except BaseException as error:
            said = json.dumps({"errno": 5, "what": f"{type(error).__name__}: {error}"})
        with contextlib.suppress(OSError), os.fdopen(writing, "w") as file:
            file.write(said)
        os._exit(0)
    os.close(writing)
    return lambda: _result(child, reading)


def _result(child: int, reading: int) -> Any:
    try:
        heard = _read_all(reading, time.monotonic() + WORK_TIMEOUT_S)
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    answer: dict[str, Any] = json.loads(heard) if heard else {"errno": 5, "what": "it was killed"}
    if "problem" in answer:
        problem = answer["problem"]
        raise HelperError(problem["code"], problem["message"], hint=problem["hint"], details=problem["details"])
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["what"])
    return answer["is"]


def _worked(place: Place, work: Callable[[], Any], namespaces: Sequence[str]) -> Any:
    for name in namespaces:
        if name in place.namespaces:
            linux.setns(place.namespaces[name])
    if "pid" not in namespaces:
        return work()
    # A pid namespace is that of the next fork.
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    said = _read_all(reading, time.monotonic() + WORK_TIMEOUT_S)
    os.waitpid(child, 0)
    return json.loads(said or b"null")


def _read_all(fd: int, deadline: float) -> bytes:
    waiting = select.poll()
    waiting.register(fd, select.POLLIN | select.POLLHUP)
    said = b""
    while waiting.poll(max(0.0, 1e3 * (deadline - time.monotonic()))):
        data = os.read(fd, 65536)
        if not data:
            return said
        said += data
    raise HelperError("timeout", "Work inside the sandbox did not end", details={"timeout": WORK_TIMEOUT_S})


class Run:
    """A program that runs inside the namespaces of a sandbox and in its control groups."""

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
    ) -> None:
        """Start it.

        Args:
            place: Where.
            command: A descriptor to execute, its arguments, and the descriptors that it is to have.
            env: Its whole environment.
            user: uid and gid to run it as, with all capabilities of this process; as this process if None.
            held: Descriptors that stay open until it has ended, whatever becomes of this process.
            join: Run in the sandbox's control groups, so that what it starts is in them.
            last_pid: What it starts has numbers above this one, if it is not 0, and so has all that starts later.
        """
        numbers = os.open(LAST_PID, os.O_WRONLY | os.O_CLOEXEC) if last_pid else -1
        groups = _entrances(place.pid) if join else []
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._child = os.fork()
        if self._child == 0:
            code = 125
            try:
                code = _enter(place, command, env, user, groups, null, held, (numbers, last_pid))
            except BaseException as error:
                sys.stderr.write(f"could not enter the sandbox: {type(error).__name__}: {error}\n")
                sys.stderr.flush()
            finally:
                os._exit(code)
        os.close(null)
        for fd in (*groups, *([numbers] if last_pid else [])):
            os.close(fd)
        self._pidfd = os.pidfd_open(self._child)

    def wait(self, *, timeout_s: float, caller: int | None = None) -> int:
        """Its exit code, as a shell says it; it is killed when time is up or the caller's socket closes.

        Raises:
            HelperError: Time is up.
            Cancelled: The caller has gone.
        """
        waiting = select.poll()
        waiting.register(self._pidfd, select.POLLIN)
        if caller is not None:
            waiting.register(caller, select.POLLRDHUP | select.POLLHUP)
        ready = dict(waiting.poll(1e3 * timeout_s))
        if self._pidfd not in ready:
            self.kill()
        _, ended = os.waitpid(self._child, 0)
        os.close(self._pidfd)
        if not ready:
            raise HelperError("timeout", f"CRIU did not finish in {timeout_s:.0f} s", details={"timeout": timeout_s})
        if self._pidfd not in ready:
            raise Cancelled
        code = os.waitstatus_to_exitcode(ended)
        return code if code >= 0 else 128 - code

    def kill(self) -> None:
        """End it now."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def _enter(
    place: Place,
    command: tuple[int, Sequence[str], Sequence[int]],
    env: dict[str, str],
    user: tuple[int, int] | None,
    groups: Sequence[int],
    null: int,
    held: Sequence[int],
    last_pid: tuple[int, int],
) -> int:
    executable, words, fds = command
    linux.name_process("warmcell-run")
    if not held:  # Else somebody waits for its end: criu must not be killed in the middle of what it saves.
        linux.die_with_parent()
    for group in groups:
        os.write(group, b"0")
    for fd in place.namespaces.values():
        linux.setns(fd)
    os.chdir("/")
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if last_pid[1]:
                # The number is that of the pid namespace of who writes, not of the /proc that it was opened in.
                os.pwrite(last_pid[0], str(last_pid[1]).encode(), 0)
            for number in (0, 1, 2):
                os.dup2(null, number)
            for fd in (*fds, *held):
                os.set_inheritable(fd, True)
            linux.close_but([*fds, *held, executable])
            _check_proc()
            # A task whose list of groups is empty would get those of criu.
            os.setgroups([])
            if user is not None:
                linux.become_with_capabilities(*user)
            linux.die_with_parent()
            for number in range(1, signal.NSIG):
                if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):
                    signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execve(executable, list(words), env)
        finally:
            os._exit(126)
    linux.close_but([2, *held])
    _, ended = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(ended)
    return code if code >= 0 else 128 - code


def _check_proc() -> None:
    """Descriptors are opened through /proc, so it has to be the real one, and that of this pid namespace."""
    if os.readlink("/proc/self") != str(os.getpid()):
        raise OSError(2, "/proc is not that of the sandbox")


def _entrances(pid: int) -> list[int]:
    """Descriptors of the `cgroup.procs` of the groups that `pid` is in and this process is not."""
    theirs, own = _groups(pid), _groups("self")
    roots = _hierarchies()
    found: list[int] = []
    for controllers, path in theirs.items():
        if own.get(controllers) == path or controllers not in roots:
            continue
        mounted, root = roots[controllers]
        below = os.path.relpath(path, root)
        if below.startswith(".."):
            continue
        found.append(os.open(f"{mounted}/{below}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
    return found


def _groups(pid: int | str) -> dict[str, str]:
    groups: dict[str, str] = {}
    with open(f"/proc/{pid}/cgroup") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            groups[controllers] = path
    return groups


def _hierarchies() -> dict[str, tuple[str, str]]:
    """Of each hierarchy, by its controllers as /proc/PID/cgroup names them: where it is mounted, and what of it."""
    found: dict[str, tuple[str, str]] = {}
    with open("/proc/self/mountinfo") as file:
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
    return [*named, ",".join(controllers), *controllers]
