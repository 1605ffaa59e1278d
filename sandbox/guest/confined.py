"""Become the first process of a container: `PYTHON -I -S confined.py FILTER ARGUMENT...`, FILTER in hexadecimal digits.

What started the container has its own system call filter and has taken all rights away. Ours is loaded on top of that,
before anything of the user's can run, and there is no way on without it. Then init takes this process over, so that
nothing of this stays in its memory.
"""

import ctypes
import os
import sys

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
_STEP_BYTES = 8
_OF_THE_ENGINE = ("HOSTNAME", "NVIDIA_VISIBLE_DEVICES", "TERM", "container")
"""Variables that engines add, and that what runs here has no use for: a clone has another name."""


class _Program(ctypes.Structure):
    """`struct sock_fprog` of seccomp(2)."""

    _fields_ = [("size", ctypes.c_ushort), ("steps", ctypes.c_void_p)]


def confine(steps: bytes) -> None:
    """Load a filter that this process and all that comes from it can never lose again.

    Raises:
        OSError: The system refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    held = ctypes.create_string_buffer(steps, len(steps))
    program = _Program(len(steps) // _STEP_BYTES, ctypes.addressof(held))
    for step in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*step) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def main(arguments: "list[str]") -> None:
    """Confine this process, then be init."""
    confine(bytes.fromhex(arguments[0]))
    env = {name: value for name, value in os.environ.items() if name not in _OF_THE_ENGINE}
    init = os.path.join(os.path.dirname(os.path.abspath(__file__)), "init.py")
    os.execve(sys.executable, [sys.executable, "-I", "-S", init, *arguments[1:]], env)


if __name__ == "__main__":
    main(sys.argv[1:])
