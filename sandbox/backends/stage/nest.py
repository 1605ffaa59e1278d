"""A nest: a user and a pid namespace in which a template's process lives, and the sandboxes that its forks enter.

The kernel lets a process enter a pid namespace only from one above it, and another user's namespaces only with rights
in the user namespace above them. So what enters sandboxes has to live where they were made from; this is that place,
and it has neither a file system nor a network of its own. Root in it is nobody but the guests' user, also where
root's keeper has made it: nothing in it has more rights on the host than that user.
"""

from __future__ import annotations

import _signal
import _socket
import os
import sys
from errno import EPERM

from .alone import go_on, map_ids
from .linux import (
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    Refused,
    call,
    libc,
    mount,
)
from .saying import answer, quoted


def main(fd: int, keeper: int, uid: int, gid: int) -> None:
    """Make one, hand descriptors of both namespaces to the keeper, and keep it until the keeper lets go of `fd`.

    Args:
        fd: A socket to the keeper.
        keeper: Its pid.
        uid: Who guests are to the host; only root may say another than itself.
        gid: Likewise.
    """
    control = _socket.socket(fileno=fd)
    try:
        if os.geteuid() == 0:
            _be_root_of(uid, gid)
        else:
            call("make a user namespace", libc.unshare(CLONE_NEWUSER))
            map_ids(uid, gid)
        call("die with the keeper", libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0))  # Not before: another user forgets it.
        if os.getppid() != keeper:
            sys.exit(1)
        _try_another()
        call("make a pid namespace", libc.unshare(CLONE_NEWPID))
        first = os.fork()
        if first == 0:
            _be_first(control)
        spaces = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in ("user", "pid_for_children")]
        answer(control, f'"pid": {first}', spaces)
        for space in spaces:
            os.close(space)
        os.waitpid(first, 0)
    except Refused as error:
        answer(control, f'"failed": {quoted(error.step)}, "errno": {error.errno}')
    except OSError as error:
        answer(control, f'"failed": "make a nest", "errno": {error.errno or 0}')
    sys.exit(1)


def _be_root_of(uid: int, gid: int) -> None:
    """From root of the host become root of a new user namespace, who is nobody but that user."""
    os.setgroups([])
    waiting, begin = os.pipe()
    parent = os.getpid()
    mapper = os.fork()
    if mapper == 0:  # Only from outside of it may somebody else's ids be mapped.
        os.close(begin)
        mapped = False
        try:
            if os.read(waiting, 1):
                map_ids(uid, gid, of=str(parent))
                mapped = True
        finally:
            os._exit(0 if mapped else 1)
    os.close(waiting)
    try:
        call("make a user namespace", libc.unshare(CLONE_NEWUSER))
        os.write(begin, b".")
    finally:
        os.close(begin)
        _, status = os.waitpid(mapper, 0)
    if status:
        raise Refused("map the guests' user", EPERM)
    be_root_here()


def be_root_here() -> None:
    """Be root of the user namespace that this process is in; before that it may be somebody unknown to it."""
    if os.geteuid() != 0:
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)


def _try_another() -> None:
    """See whether a sandbox in it can have a user namespace of its own: some machines let root alone make any.

    Raises:
        Refused: It cannot.
    """
    tried = os.fork()
    if tried == 0:
        refused = EPERM
        try:
            call("make a user namespace", libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
            mount("none", "/", "", MS_REC | MS_PRIVATE)
            refused = 0
        except Refused as error:
            refused = error.errno or EPERM
        finally:
            os._exit(refused)
    _, status = os.waitpid(tried, 0)
    if status:
        raise Refused("make user namespaces of sandboxes", os.waitstatus_to_exitcode(status))


def _be_first(control: _socket.socket) -> None:
    """The first process of the pid namespace: it only has to be there; all others end with it."""
    libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
    # What lives beside it has its uid, and sees the host's files no more; through this process it must not either.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # So that the kernel reaps for it.
    for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):
        _signal.signal(number, _signal.SIG_IGN)
    while True:
        try:
            if not control.recv(1):
                break
        except InterruptedError:
            continue
        except OSError:
            break
    os._exit(0)


def enter(control: _socket.socket) -> None:
    """Go on in the nest whose descriptors come with the next byte: as another child of our own parent's.

    The parent is told that one's pid, and this process ends.
    """
    said, ancillary, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(8), _socket.MSG_CMSG_CLOEXEC)
    if not said:
        sys.exit(1)
    for _, _, rights in ancillary:
        user, pid = (int.from_bytes(rights[at : at + 4], sys.byteorder) for at in (0, 4))
    if os.geteuid() == 0:
        os.setgroups([])
    call("enter the user namespace", libc.setns(user, CLONE_NEWUSER))
    call("enter the pid namespace", libc.setns(pid, CLONE_NEWPID))
    os.close(user)
    os.close(pid)
    go_on(control, 0)
    call("make a mount namespace", libc.unshare(CLONE_NEWNS))
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    # Here processes have other numbers, by which bubblewrap looks at its own.
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    be_root_here()
