"""Device numbers that the file systems of a container must not get: they are held while it starts.

Linux gives a file system in memory the first number that is free, and that may be one by which a process that comes
back knows files of earlier. Among an engine's mounts nobody can choose, so what they must not get is taken beforehand,
by a process of its own: `python -I -S numbers.py NUMBER…` says when it has them, and ends with its standard input.
"""

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Collection, Iterator

TIMEOUT_S = 10.0
DONE = b"done"
MOST = 4096
"""File systems that are made at most to come to the highest of the numbers."""
SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
FLAG_CLOEXEC, FSCONFIG_CMD_CREATE = 1, 6


@contextlib.contextmanager
def held(numbers: Collection[int]) -> Iterator[str]:
    """Hold those of these numbers that nobody has, meanwhile. Blocks, while a Python starts, where there are any.

    Yields:
        Why they are not held, else nothing.
    """
    if not numbers:
        yield ""
        return
    argv = [sys.executable, "-I", "-S", __file__, *map(str, numbers)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={}, cwd="/"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            said = process.stdout.read(len(DONE))
            yield "" if said == DONE else (said + process.stdout.read()).decode(errors="replace").strip()[-200:]
        finally:
            process.stdin.close()


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
    others, highest = [], max(map(os.minor, wanted))
    for _ in range(MOST):
        made = check(libc.syscall(SYS_FSOPEN, b"tmpfs", FLAG_CLOEXEC))
        check(libc.syscall(SYS_FSCONFIG, made, FSCONFIG_CMD_CREATE, None, None, 0))
        tree = check(libc.syscall(SYS_FSMOUNT, made, FLAG_CLOEXEC, 0))
        os.close(made)
        number = os.fstat(tree).st_dev
        if number not in wanted:
            others.append(tree)  # As long as it is there the next one gets a higher number.
        if os.minor(number) >= highest:
            break
    for tree in others:
        os.close(tree)
    os.write(1, DONE)
    os.read(0, 1)


if __name__ == "__main__":
    main()
