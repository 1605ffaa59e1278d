"""The helper's main loop. Each request is served by a process of its own, which ends with it (clones: see `clones`).

A request cannot harm another: what a process of the helper joins, opens or crashes on is its own. The loop itself
touches nothing that a caller sends.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import select
import signal
import socket
import sys
import time

from warmcell.sandbox.helper import linux
from warmcell.sandbox.helper.busy import Busy
from warmcell.sandbox.helper.enter import Cancelled
from warmcell.sandbox.helper.operations import Helper
from warmcell.sandbox.helper.outcome import audit, tell
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.shelf import full
from warmcell.sandbox.helper.wire import Conversation, peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

WORKERS_MAX = 64
WORKERS_OF_USER_MAX = 32
"""Of one user who is not root, so that others are served whatever that user does."""
DRAIN_S = 120.0
REST_S = 300.0
"""Without a request for so long, what is kept for the next is looked through."""


def serve(
    listening: socket.socket,
    helper: Helper,
    *,
    lifeline: int | None = None,
    told: Callable[[], None] = lambda: None,
) -> None:
    """Serve requests until the lifeline closes, or SIGTERM comes if there is none, then let running ones finish.

    A keeper's own is told to end together with it at a shutdown, and the keeper then saves its kernels.

    Args:
        listening: A listening Unix stream socket.
        helper: What serves.
        lifeline: A descriptor whose other end closes when nobody needs the helper any more.
        told: Called once SIGTERM ends it as it should.
    """
    stop_reading, stop_writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(stop_writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    # A sandbox ends only once all that had entered it are reaped, and in a container nobody else may do that.
    linux.adopt_orphans()
    told()
    helper.prepare()
    gc.freeze()  # A worker that collected garbage would write to all of it, and so copy it.
    waiting = select.poll()
    waiting.register(listening, select.POLLIN)
    waiting.register(stop_reading, select.POLLIN)
    if lifeline is not None:
        waiting.register(lifeline, select.POLLIN | select.POLLHUP)
    busy = helper.busy
    with contextlib.suppress(OSError):
        _worker(busy, helper.tidy, [listening], [stop_reading, stop_writing])
    rested = time.monotonic()
    while True:
        ready = dict(waiting.poll(1e3 * max(0.0, rested + REST_S - time.monotonic())))
        if time.monotonic() >= rested + REST_S:  # However much is asked meanwhile.
            rested = time.monotonic()
            with contextlib.suppress(OSError):  # Where no process can be had, all goes on but that.
                _worker(busy, helper.rest, [listening], [stop_reading, stop_writing])
        if stop_reading in ready:
            received = os.read(stop_reading, 4096)
            _reap(busy)
            if signal.SIGTERM in received and lifeline is None:
                break
        if lifeline is not None and lifeline in ready:
            break
        if listening.fileno() in ready:
            while busy.is_full(WORKERS_MAX):
                _reap(busy, wait=True)
            with contextlib.suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    uid = peer(connection)
                    if uid != 0 and busy.of_user(uid) >= WORKERS_OF_USER_MAX:
                        _refuse(connection)
                        continue
                    work = functools.partial(_converse, helper, connection)
                    _worker(busy, work, [listening], [stop_reading, stop_writing], uid=uid)
    listening.close()
    _drain(busy, stop_reading, busy.count)
    busy.let_go()
    _drain(busy, stop_reading, busy.holds)
    with contextlib.suppress(OSError, HelperError):
        helper.rest(ending=True)


def _refuse(connection: socket.socket) -> None:
    """Somebody has so many requests under way that others would wait for them."""
    problem = HelperError("capacity", "You have too many requests under way", hint="Wait for some of them to end.")
    connection.setblocking(False)
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps({"ok": False, **problem.to_json()}).encode() + b"\n")


def _drain(busy: Busy, stop_reading: int, left: Callable[[], int | bool]) -> None:
    """Let workers end, for a while."""
    deadline = time.monotonic() + DRAIN_S
    waiting = select.poll()
    waiting.register(stop_reading, select.POLLIN)
    _reap(busy)
    while left() and time.monotonic() < deadline:
        waiting.poll(1000)
        with contextlib.suppress(BlockingIOError):
            os.read(stop_reading, 4096)
        _reap(busy)


def _reap(busy: Busy, *, wait: bool = False) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, _ = os.waitpid(-1, 0 if wait else os.WNOHANG)
            if pid == 0:
                return
            busy.ended(pid)
            wait = False


def _worker(
    busy: Busy, work: Callable[[], None], listening: list[socket.socket], own: list[int], *, uid: int = 0
) -> None:
    """Start `work` in a process of its own, without what only the loop needs."""
    if busy.forked(uid) is not None:
        return
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in listening:
            one.close()
        for fd in own:
            os.close(fd)
        linux.name_process("warmcell-work")
        gc.disable()
        work()
        code = 0
    except BaseException as error:
        audit(f"worker failed: {type(error).__name__}: {error}")
    finally:
        os._exit(code)


def _converse(helper: Helper, connection: socket.socket) -> None:
    began = time.perf_counter()
    try:
        conversation = Conversation(connection)
    except (EOFError, OSError):
        return
    except HelperError as error:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps({"ok": False, **error.to_json()}).encode() + b"\n")
        return
    failed: Exception | None = None
    try:
        helper.serve(conversation)
    except (Cancelled, HelperError, OSError) as error:
        failed = error
        if isinstance(error, OSError) and full(error, helper.base) is not None:
            helper.rest(ending=True)  # What is kept for nobody in particular is not what the disk is full of next time.
    outcome = tell(conversation, failed, base=helper.base)
    if conversation.in_parts and failed is None:
        return
    request = conversation.request
    named = " ".join(f"{name}={request[name]!r}" for name in ("op", "id", "image", "pid", "then") if name in request)
    audit(f"uid={conversation.uid} {named} ms={1e3 * (time.perf_counter() - began):.0f} {outcome}")


def main(arguments: list[str]) -> None:
    """A helper that ends with who started it: `server.main([LISTENING_FD, LIFELINE_FD, BASE, FOR_ALL])`."""
    listening, lifeline, base = int(arguments[0]), int(arguments[1]), arguments[2]
    linux.name_process("warmcell-helper")
    linux.die_with_parent(signal.SIGTERM)
    os.umask(0o077)
    with socket.socket(fileno=listening) as opened:
        serve(opened, Helper(base, os.environ, only=None if arguments[3] == "1" else os.getuid()), lifeline=lifeline)
    sys.exit(0)
