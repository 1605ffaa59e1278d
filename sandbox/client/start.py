"""Find the user's keeper, or start it: one per user and machine, however many ask at once."""

import fcntl
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from warmcell.sandbox import errors
from warmcell.sandbox.paths import Paths, cannot_write

START_TIMEOUT_S = 330.0
"""A keeper that starts waits for its predecessor, which may be saving kernels; it says itself what hinders it."""

LISTENS_S = 1.0
"""Whoever listens accepts within this."""

KEEPER_MODULE = "warmcell.extension.keeper"


def is_listening(paths: Paths) -> bool:
    """Whether somebody accepts connections on the keeper's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(LISTENS_S)
        try:
            probe.connect(str(paths.keeper_socket))
        except OSError:
            return False
        return True


def has_kernels(paths: Paths) -> bool:
    """Whether a keeper that starts now would find, or miss, kernels that another one had."""
    return paths.ledger.exists()


def ensure_keeper(paths: Paths) -> None:
    """Start the keeper unless it listens. Blocks; call it in a thread from a loop.

    Raises:
        TransportError: It did not come up; the message has its last words.
        BackendUnavailableError: The runtime directory cannot be used.
    """
    if is_listening(paths):
        return
    paths.make()
    with _starter_lock(paths):
        if not is_listening(paths):
            _start(paths)


def _start(paths: Paths) -> None:
    read, write = os.pipe()
    try:
        try:
            with open(paths.keeper_log, "ab") as log:
                argv = [sys.executable, "-m", KEEPER_MODULE, "--detach", "--ready-fd", str(write)]
                subprocess.run(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write], cwd="/", check=False
                )
        except OSError as error:
            why = cannot_write(paths.state, "WARMCELL_STATE_DIR", error)
            raise errors.TransportError(f"The keeper cannot be started: {why.message}", hint=why.hint) from error
        finally:
            os.close(write)
        said = _read_until_closed(read, START_TIMEOUT_S)
    finally:
        os.close(read)
    answer = json.loads(said) if said else {"message": _last_words(paths)}
    if answer.get("ready"):
        return
    raise errors.TransportError(
        f"The keeper did not start: {answer.get('message')}",
        hint=answer.get("hint") or f"{paths.keeper_log} says more.",
    )


def _last_words(paths: Paths) -> str:
    """The last line of its log: a keeper that could not even say why."""
    with open(paths.keeper_log, "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
        lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it ended without a word"


def _read_until_closed(fd: int, timeout: float) -> bytes:
    """All that comes until the writer closes its end."""
    deadline, said = time.monotonic() + timeout, b""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                piece = os.read(fd, 65536)
                if not piece:
                    return said
                said += piece
    raise errors.TransportError(
        f"The keeper did not answer within {timeout:.0f} s", hint="Look into keeper.log in the state directory."
    )


@contextmanager
def _starter_lock(paths: Paths) -> Iterator[None]:
    """Held, on the runtime directory itself, while one caller starts a keeper: others wait and then find it."""
    lock = os.open(paths.runtime, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
