"""Writable layers over trees of the host."""

from __future__ import annotations

import _socket
import os
import sys

from .alone import number_of
from .linux import CLONE_NEWNS, CLONE_NEWUSER, MS_NODEV, MS_NOSUID, Refused, attach, call, clone, libc, mount, write
from .saying import answer, receive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


def make_overlay(plan: Mapping[str, Any], *, user: tuple[int, int] | None = None) -> str:
    """Put a writable layer over the tree `lower`; returns why that cannot be, else nothing.

    Paths are relative to the base: options cannot hold every character that a path can.

    An overlay uses what lies below it with the rights of who mounted it. With a `user` those are the user's: a layer of
    the user's own could otherwise open directories that are closed to them.
    """
    options = f"lowerdir={plan['lower']},upperdir={plan['upper']},workdir={plan['work']}{plan['options']}"
    try:
        os.mkdir(plan["path"])
        if user is None:
            mount("overlay", plan["path"], "overlay", MS_NOSUID | MS_NODEV, options)
            return ""
        attach(overlay_of(user, plan["path"], options), plan["path"], there=True)
    except Refused as error:
        return str(error)
    return ""


def overlay_of(user: tuple[int, int], path: str, options: str) -> int:
    """An overlay, nowhere yet, that uses what lies below it with the rights of that user alone.

    Who mounts it is root of a user namespace that has no other user: only in one can a process have the few more rights
    on the user's own files that an overlay needs. The kernel refuses trees in which other file systems are mounted
    there: an overlay would show what those cover.
    """
    ours, theirs = _socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            call("make a user namespace", libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
            answer(theirs, '"made": true')
            receive(theirs, 1)
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            mount("overlay", path, "overlay", MS_NOSUID | MS_NODEV, options)
            answer(theirs, '"errno": 0', [clone(path)])
        except Refused as error:
            answer(theirs, f'"errno": {error.errno}')
        except OSError as error:
            answer(theirs, f'"errno": {error.errno or 0}')
        finally:
            os._exit(0)
    theirs.close()
    try:
        if b"made" in ours.recv(100):
            process = number_of(child)
            for name, number in (("uid_map", user[0]), ("gid_map", user[1])):
                write(f"/proc/{process}/{name}", f"0 {number} 1".encode())
            ours.send(b".")
        said, ancillary, _, _ = ours.recvmsg(100, _socket.CMSG_SPACE(4))
    finally:
        ours.close()
        os.waitpid(child, 0)
    for _, _, rights in ancillary:
        return int.from_bytes(rights[:4], sys.byteorder)
    raise Refused(f"mount overlay on {path}", int(b"0" + said.partition(b": ")[2].rstrip(b"}\n")))
