"""Starting processes, and the `exec` operation: frames between a connection and a process."""

from __future__ import annotations

import _signal
import os

from .endpoint import Endpoint, ignore
from .jsonline import decode, encode
from .loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, NoReturn

STDIN, STDOUT, STDERR, CONTROL = range(4)
"""Channels of frames."""

FRAME_MAX_BYTES = 2**20
LEFTOVER_MAX_BYTES = 4 * 2**20
"""What an ended process may have left in its pipes; the kernel's own bound on a pipe is 1 MiB."""

SIGNALS = _signal.valid_signals() - {_signal.SIGKILL, _signal.SIGSTOP}
"""Those that a process starts with unhandled, whatever init handles and whatever was ignored where the keeper began."""

NOT_FOUND, NOT_RUNNABLE = 127, 126
"""Exit codes of a command that cannot be started, as a shell has them."""


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str,
    stdin: int,
    stdout: int,
    stderr: int,
    keep: Sequence[int] = (),
    terminal: bool = False,
) -> int:
    """Start `argv` in a session of its own and return its pid.

    What keeps it from starting is said on its own `stderr`, with exit code 126 or 127.

    Args:
        argv: Looked up on the PATH of `env`.
        env: The whole environment.
        cwd: Its directory.
        stdin: Its descriptor 0.
        stdout: Its descriptor 1.
        stderr: Its descriptor 2.
        keep: Descriptors that it inherits under the same number.
        terminal: `stdin` is a terminal and becomes its controlling one.

    Raises:
        OSError: There is no room for another process.
    """
    # A signal to the child before it is itself would run our handlers, on our loop's pipe.
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _become(argv, env, cwd, (stdin, stdout, stderr), keep, terminal)
    finally:  # At the limit of processes there is none; init goes on, and must hear of those that end.
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
    return pid


def close_all(fds: Iterable[int]) -> None:
    """Close what nobody needs any more."""
    for fd in fds:
        os.close(fd)


def _become(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    stdio: tuple[int, int, int],
    keep: Sequence[int],
    terminal: bool,
) -> NoReturn:
    """Turn this fresh child into `argv`."""
    try:
        _signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            _signal.signal(number, _signal.SIG_DFL)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        os.setsid()
        die_with_parent()
        # Above the standard ones first: any of them may itself be 0, 1 or 2.
        high = [_above_stdio(fd) for fd in stdio]
        for target, fd in enumerate(high):
            os.dup2(fd, target)
        for fd in keep:
            os.set_inheritable(fd, True)
        if terminal:
            import fcntl
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.chdir(cwd)
        os.execvpe(argv[0], list(argv), dict(env))
    except OSError as error:
        what = cwd if error.filename == cwd else argv[0]
        _end(f"{what}: {error.strerror}", NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_RUNNABLE)
    except BaseException as error:
        _end(f"{argv[0]}: {error}", NOT_RUNNABLE)


def _end(why: str, code: int) -> NoReturn:
    """Say why on stderr, whatever is in it: what is raised here would go on as a second init."""
    try:
        os.write(2, f"warmcell: {why}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(code)


def _above_stdio(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) if fd <= 2 else fd


_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl: Any = None
_lifeline = -1


def be_first(*, own_namespace: bool) -> None:
    """Where this is not a pid namespace's first process: adopt orphans, and end when the parent ends.

    Args:
        own_namespace: The first one is a mere reaper for this one and ends with it. The system ends all the rest then,
            so nothing needs a death signal, which would kill a restored kernel: its parent then is another.
    """
    global _prctl, _lifeline
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if not own_namespace:
        _lifeline, _ = os.pipe2(os.O_CLOEXEC)
        _prctl = prctl
        _prctl(_PR_SET_PDEATHSIG, int(_signal.SIGTERM), 0, 0, 0)


def lifeline() -> int:
    """The reading end of a pipe whose other end only init has, for who is not its child; -1 where that is needless."""
    return _lifeline


def die_with_parent() -> None:
    """Be killed when init is. A pid namespace does that by itself."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, 9, 0, 0, 0)


class Execution:
    """One process whose streams are frames on one connection."""

    def __init__(
        self,
        loop: Loop,
        connection: Endpoint,
        *,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        pty: bool,
        size: Sequence[int] = (),
    ) -> None:
        """Start the process. What the connection says from now on is frames.

        Raises:
            OSError: There is no room for another process, or for its pipes.
        """
        self.on_exit: Callable[[], object] = ignore
        self._connection = connection
        self._incoming = bytearray()
        self._running = True
        self._terminal = pty
        opened: list[int] = []
        try:
            if pty:
                master, slave = os.openpty()
                opened += (master, slave)
                if size:  # Before the process may ask for it.
                    _resize(slave, *size)
                os.set_inheritable(master, False)
                opened.append(os.dup(master))
                ends, ours = (slave, slave, slave), (master, opened[-1], -1)
            else:
                for _ in range(3):
                    opened += os.pipe2(os.O_CLOEXEC)
                ends, ours = (opened[0], opened[3], opened[5]), (opened[1], opened[2], opened[4])
            self.pid = spawn(argv, env=env, cwd=cwd, stdin=ends[0], stdout=ends[1], stderr=ends[2], terminal=pty)
        except BaseException:
            close_all(opened)
            raise
        close_all(set(ends))
        self._stdin = Endpoint(loop, ours[0], on_room=connection.resume)
        self._outputs = [
            Endpoint(loop, fd, on_data=self._sender(channel))
            for channel, fd in ((STDOUT, ours[1]), (STDERR, ours[2]))
            if fd >= 0
        ]
        connection.on_data = self._on_data
        connection.on_end = self._on_gone
        connection.on_room = self._on_room
        loop.adopt(self.pid, self._on_exit)

    def _sender(self, channel: int) -> Callable[[bytes], None]:
        return lambda data: self._send(channel, data)

    def _send(self, channel: int, data: bytes) -> None:
        self._connection.write(bytes((channel,)) + len(data).to_bytes(4, "big") + data)
        if self._connection.crowded:
            for output in self._outputs:
                output.pause()

    def _on_room(self) -> None:
        for output in self._outputs:
            output.resume()

    def _on_data(self, data: bytes) -> None:
        self._incoming += data
        while len(self._incoming) >= 5:
            size = int.from_bytes(self._incoming[1:5], "big")
            if size > FRAME_MAX_BYTES:
                self._connection.close()
                self._on_gone()
                return
            if len(self._incoming) < 5 + size:
                return
            channel, content = self._incoming[0], bytes(self._incoming[5 : 5 + size])
            del self._incoming[: 5 + size]
            self._on_frame(channel, content)

    def _on_frame(self, channel: int, content: bytes) -> None:
        if channel == STDIN and not content:
            if self._terminal:
                self._stdin.write(b"\x04")
            else:
                self._stdin.finish()
        elif channel == STDIN:
            self._stdin.write(content)
            if self._stdin.crowded:
                self._connection.pause()
        elif channel == CONTROL:
            try:
                self._control(decode(content))
            except (ValueError, TypeError, OverflowError, OSError):
                return  # A request that makes no sense changes nothing.

    def _control(self, request: Mapping[str, Any]) -> None:
        if "signal" in request and self._running:
            kill_group(self.pid, request["signal"])
        if "resize" in request and self._terminal and not self._stdin.closed:
            rows, columns = map(int, request["resize"])
            _resize(self._stdin.fd, rows, columns)

    def _on_exit(self, code: int) -> None:
        self._running = False
        for output in self._outputs:
            # What it has written is in the pipe by now. A child of it that holds the pipe open may go on
            # writing into nothing.
            output.resume()
            if not output.closed:
                output.read_available(LEFTOVER_MAX_BYTES)
            output.on_data = ignore
            output.resume()
        self._stdin.close()
        if not self._connection.closed:
            self._send(CONTROL, encode({"exit_code": code}))
            self._connection.finish_politely()
        self.on_exit()

    def _on_gone(self) -> None:
        if self._running:
            kill_group(self.pid, _signal.SIGKILL)


def _resize(fd: int, rows: int, columns: int) -> None:
    """Of a terminal, in characters."""
    import fcntl
    import termios

    size = rows.to_bytes(2, "little") + columns.to_bytes(2, "little") + bytes(4)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, size)


def kill_group(pid: int, signum: int) -> None:
    """Signal a process group, once; the process alone where it is so young that it has made none."""
    for send in (os.killpg, os.kill):
        try:
            send(pid, signum)
        except ProcessLookupError:
            continue
        return
