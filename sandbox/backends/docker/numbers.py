"""Device numbers that the file systems of a container must not get: they are held while it starts.

Linux gives a file system in memory the first number that is free, and that may be one by which a process that comes
back knows files of earlier. Among an engine's mounts nobody can choose, so what they must not get is taken beforehand,
by a process of its own: `python -I -S numbers.py NUMBER…` says which it has got, and ends with its standard input.
"""

import contextlib
import ctypes
import os
import select
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator

TIMEOUT_S = 10.0
DONE = b"done"
MOST = 4096
"""File systems that are made at most to come to the highest of the numbers."""
SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
FLAG_CLOEXEC, FSCONFIG_CMD_CREATE = 1, 6


_one_at_a_time = threading.Lock()
_holding: "list[_Holder]" = []
"""Those that are there, for all of this process."""


class _Holder:
    """A process that has some of these numbers, for as many as start meanwhile. Blocks, while a Python starts."""

    def __init__(self, numbers: Collection[int]) -> None:
        self.users = 0
        self.numbers: frozenset[int] = frozenset()
        self.why_not = ""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *map(str, sorted(numbers))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={},
            cwd="/",
        )
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], TIMEOUT_S)[0]:
            self._process.kill()
        said = self._process.stdout.readline()
        if said.startswith(DONE):
            self.numbers = frozenset(map(int, said.split()[1:]))
        else:
            said = (said + self._process.stdout.read()).strip()[-200:]
            self.why_not = said.decode(errors="replace") or f"it took more than {TIMEOUT_S:.0f} s"

    def end(self) -> None:
        """Give them back. Blocks until they are free."""
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()


@contextlib.contextmanager
def held(numbers: Collection[int]) -> Iterator[str]:
    """Hold those of these numbers that nobody has, meanwhile. Blocks, while a Python starts, where there are any.

    What is held for another start already is held on for this one: clones have the same numbers, and start at once.

    Yields:
        Why they are not held, else nothing.
    """
    wanted = frozenset(numbers)
    with _one_at_a_time:
        mine = [one for one in _holding if wanted & one.numbers]
        missing = wanted.difference(*(one.numbers for one in mine))
        if missing:
            mine.append(_Holder(missing))
            _holding.append(mine[-1])
        for one in mine:
            one.users += 1
    try:
        yield "".join(one.why_not for one in mine)
    finally:
        with _one_at_a_time:  # Until they are free nobody else finds them taken.
            for one in mine:
                one.users -= 1
                if one.users == 0:
                    _holding.remove(one)
                    one.end()


def main() -> None:
    """Take them, say so, and wait."""
    wanted = set(map(int, sys.argv[1:]))
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> int:
        if result < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return result

    if os.getuid() != 0:
        check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    others, taken, highest = [], [], max(map(os.minor, wanted))
    for _ in range(MOST):
        made = check(libc.syscall(SYS_FSOPEN, b"tmpfs", FLAG_CLOEXEC))
        check(libc.syscall(SYS_FSCONFIG, made, FSCONFIG_CMD_CREATE, None, None, 0))
        tree = check(libc.syscall(SYS_FSMOUNT, made, FLAG_CLOEXEC, 0))
        os.close(made)
        number = os.fstat(tree).st_dev
        if number in wanted:
            taken.append(number)
        else:
            others.append(tree)  # As long as it is there the next one gets a higher number.
        if os.minor(number) >= highest:
            break
    for tree in others:
        os.close(tree)
    os.write(1, b" ".join((DONE, *(b"%d" % number for number in taken))) + b"\n")
    os.read(0, 1)


if __name__ == "__main__":
    main()
