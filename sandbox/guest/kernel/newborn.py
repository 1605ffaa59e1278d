"""A fresh child of the fork server becomes a process of its own: nothing shared that must not be."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping

from . import threads
from .report import Report


@contextlib.contextmanager
def reporting(report: Report) -> Iterator[None]:
    """Whatever fails within is told to init before it ends the process."""
    try:
        yield
    except BaseException as error:
        report.failed(error)
        raise


def die_with(lifeline: int) -> None:
    """Be killed when the last writer of that pipe is gone; nothing where it is -1.

    A kernel's parent is the fork server, which may be replaced under it, so the parent's death is no sign.
    """
    if lifeline >= 0:
        # Opened anew, because whom it signals is a property of the open file, which children share.
        own = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(own, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        os.close(lifeline)


def settle(lifeline: int) -> None:
    """Take session, streams, signals, randomness and threads of one's own."""
    os.setsid()
    die_with(lifeline)
    Report.silence()
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reseed()
    threads.restore()


def move(*, env: Mapping[str, str], cwd: str) -> None:
    """Take over an environment and a directory.

    Raises:
        OSError: The directory cannot be entered.
    """
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    forget_places()


def reseed() -> None:
    """Give this process randomness that nobody else with the same memory has, template, kernel or clone."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()
        if cuda_initialized():
            torch.cuda.seed_all()
    uuid = sys.modules.get("uuid")
    if uuid is not None:
        # libuuid keeps its node and clock in its own memory, so it is asked no more. The bit says: no real address.
        uuid._node = int.from_bytes(os.urandom(6), "big") | 1 << 40  # type: ignore[attr-defined]
        uuid._generate_time_safe = uuid._last_timestamp = None  # type: ignore[attr-defined]
    tempfile = sys.modules.get("tempfile")
    if tempfile is not None:
        tempfile._name_sequence = None  # type: ignore[attr-defined]
    if "_ssl" in sys.modules:
        sys.modules["_ssl"].RAND_add(os.urandom(32), 32.0)
    multiprocessing = sys.modules.get("multiprocessing.process")
    if multiprocessing is not None and not multiprocessing._children:
        # With children that came along it shares the key by which they know each other.
        multiprocessing.current_process().authkey = os.urandom(32)


def forget_files() -> None:
    """After a restore: files that others share with this process have other numbers now, and new ones may get theirs.

    torch looks up by these numbers whether it has a tensor already that it is handed, and would give one for another.
    """
    reductions = sys.modules.get("torch.multiprocessing.reductions")
    if reductions is not None:
        known = reductions.shared_cache
        for key in [key for key in list(known) if isinstance(key, tuple) and all(isinstance(n, int) for n in key)]:
            known.pop(key, None)


def forget_places() -> None:
    """Drop what was worked out from the template's environment and directory."""
    time.tzset()
    tempfile = sys.modules.get("tempfile")
    if tempfile is not None:
        tempfile.tempdir = tempfile._name_sequence = None  # type: ignore[attr-defined]
    matplotlib = sys.modules.get("matplotlib")
    if matplotlib is not None and os.path.exists("matplotlibrc"):
        # It is read from the current directory at import.
        with contextlib.suppress(OSError, ValueError):
            read = matplotlib.rc_params_from_file("matplotlibrc", use_default_template=False)
            changes = {name: read[name] for name in read if name != "backend"}  # That one the environment sets.
            matplotlib.rcParams.update(changes)
            matplotlib.rcParamsOrig.update(changes)


def cuda_initialized() -> bool:
    """Whether torch has a CUDA context; asked without making one."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return bool(cuda is not None and cuda.is_initialized())
