"""The helper in a container that is root: for the keeper of one ordinary user who may use the engine, and for no other.

It takes from its keeper, as descriptors, the socket that it listens on and the pipe that ends it, and sees from then on
what its keeper sees: nothing of the container is left but its name and its rights.
"""

from __future__ import annotations

import os
import socket
import sys

from warmcell.sandbox.backends.processes import start_time
from warmcell.sandbox.helper import linux
from warmcell.sandbox.helper.operations import Helper
from warmcell.sandbox.helper.server import serve

KIND = "an agent container"
LOG = 2


def main(arguments: list[str]) -> None:
    """As a program: `agent.main([PID, BEGAN, LISTENING, LIFELINE, TOLD, LOG, UID, BASE])`.

    The keeper by its number and when it began, then what is open there: a listening socket, a pipe that closes with it,
    one that is told once both are here, one for the log. Then whom it serves, and the directory of all images.
    """
    pid, began, listening, lifeline, told, log, uid = map(int, arguments[:7])
    linux.name_process("warmcell-agent")
    os.umask(0o077)
    keeper = os.pidfd_open(pid)
    if start_time(pid) != began:
        sys.exit("The keeper is no process here, or has ended: engine and keeper must have the same process numbers")
    listening, lifeline, told, log = (linux.descriptor_of(keeper, fd) for fd in (listening, lifeline, told, log))
    seen = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    if start_time(pid) != began:
        sys.exit("The keeper has ended")
    linux.setns(seen)
    os.chdir("/")
    os.dup2(log, LOG)
    for fd in (keeper, seen, log):
        os.close(fd)
    with socket.socket(fileno=listening) as opened:
        helper = Helper(arguments[7], os.environ, only=uid, kind=KIND)
        os.write(told, b".")
        os.close(told)
        serve(opened, helper, lifeline=lifeline)
    sys.exit(0)
