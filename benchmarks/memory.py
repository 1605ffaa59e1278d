"""Memory of processes as the system counts it.

An ordinary user may not look at the processes with which root's helper holds a sandbox; in a run that root has
started, root looks for them.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.server import BenchmarkError

WHOLE, OWN = ("Pss:",), ("Private_Clean:", "Private_Dirty:")
LOOKER = "WARMCELL_BENCHMARK_LOOKER"
"""Variable with the descriptor of a socket, behind which root looks."""


def memory_bytes(pid: int, kinds: Sequence[str]) -> float:
    """The sum of these rows of what the system says of a process's memory.

    Raises:
        BenchmarkError: It may not be looked at.
    """
    try:
        return _look(pid, kinds)
    except PermissionError as error:
        looker = os.environ.get(LOOKER)
        if looker is None:
            raise BenchmarkError(f"the memory of process {pid} may not be looked at: {error.strerror}") from error
    with socket.socket(fileno=os.dup(int(looker))) as asked:
        asked.send(json.dumps([pid, *kinds]).encode())
        return float(json.loads(asked.recv(100)))


@contextlib.contextmanager
def looker() -> Iterator[tuple[int, Mapping[str, str]]]:
    """Look for a child process of ours: a descriptor that it needs, and the variable that names it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(target=_serve, args=(ours,))
    thread.start()
    try:
        yield theirs.fileno(), {LOOKER: str(theirs.fileno())}
    finally:
        theirs.close()
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()
        ours.close()


def _serve(ours: socket.socket) -> None:
    while asked := ours.recv(1000):
        pid, *kinds = json.loads(asked)
        ours.send(json.dumps(_look(pid, kinds)).encode())


def _look(pid: int, kinds: Sequence[str]) -> float:
    try:
        said = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):  # It has ended.
        return 0.0
    return 1024.0 * sum(int(line.split()[1]) for line in said.splitlines() if line.startswith(tuple(kinds)))
