"""What Linux says of a process, whatever that calls itself."""

import ctypes
import os
import signal

from warmcell.sandbox.helper import places

FORGED = b"\xff\r\x0b\x85\nState:\tZ"
"""No text, and with all that may end a line somewhere."""


def test_a_process_that_calls_itself_what_is_no_text() -> None:
    """Its name is a guest's own choice, and says nothing about its other fields."""
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(15, FORGED)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    try:
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        found = places.status(child)
        assert found["PPid"] == places.field(child, "PPid") == str(os.getpid())
        assert places.guest_pid_of(child) == int(found["NSpid"].split()[-1]) > 0
        assert found["State"].startswith("T")
        assert places.field(child, "State") == found["State"]
        assert places.field(child, "Nothing") == ""
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert places.status(child) == {}
    assert places.field(child, "State") == ""
    assert places.guest_pid_of(child) == 0
