"""Stages that are forked instead of started: an interpreter of this size takes longer to start than all that it does.

The keeper sends one byte with two descriptors for each, a control socket and a stderr, and which owners the stage is
going to exchange: the namespaces for that are made once, here. What is forked is the keeper's own child, as if it had
started it: it waits for it, and takes it along when it dies.
"""

from __future__ import annotations

import _socket
import marshal
import os
import sys

from .. import trees  # noqa: F401  # So that every fork has it.
from .alone import CLONE_PARENT, fork, spaces
from .linux import PR_SET_PDEATHSIG, Refused, call, libc
from .main import main as carry_out
from .owners import namespace_that_swaps
from .saying import answer, quoted, receive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

ALONE = b"1"
"""What the keeper sends if the stage is to be the first of a pid namespace."""


def main(fd: int, keeper: int) -> None:
    """Serve the requests that come on `fd` until its other end is closed."""
    control = _socket.socket(fileno=fd)
    call("die with the keeper", libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0))
    if os.getppid() != keeper:
        sys.exit(1)
    room = _socket.CMSG_SPACE(8)
    while True:
        said, ancillary, _, _ = control.recvmsg(1, room, _socket.MSG_CMSG_CLOEXEC)
        if not said:
            return
        fds = [
            int.from_bytes(rights[at : at + 4], sys.byteorder)
            for _, _, rights in ancillary
            for at in range(0, len(rights) - 3, 4)
        ]
        swaps = marshal.loads(receive(control, int.from_bytes(receive(control, 4), "big")))  # noqa: S302  # As a plan.
        try:
            _prepare(swaps)
            pid, pidfd = _fork(alone=said == ALONE)
        except Refused as error:
            answer(control, f'"failed": {quoted(error.step)}, "errno": {error.errno}')
        else:
            if pid == 0:
                control.close()
                os.dup2(fds[1], 2)
                os.close(fds[1])
                carry_out(fds[0])
            answer(control, f'"pid": {pid}', [pidfd])
            os.close(pidfd)
        for one in fds:
            os.close(one)


def _prepare(swaps: Sequence[tuple[int, int, int, int]]) -> None:
    for swap in swaps:
        try:  # noqa: SIM105  # contextlib would be loaded for this alone.
            namespace_that_swaps(*swap)
        except (Refused, OSError):
            pass  # The stage tries again, and says why not.


def _fork(*, alone: bool) -> tuple[int, int]:
    """A child of our own parent's; where it cannot be alone it is as any other, and tries again."""
    if alone:
        try:
            return fork(CLONE_PARENT | spaces())
        except Refused:
            pass
    return fork(CLONE_PARENT)
