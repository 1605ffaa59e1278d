"""What the helper does by the clock, however much it is asked meanwhile."""

import os
import select
import signal
import socket
import time
from pathlib import Path

import pytest

from warmcell.sandbox.helper import server
from warmcell.sandbox.helper.operations import Helper

TIMEOUT_S = 20.0


class Telling(Helper):
    """Writes a byte whenever it lets go of what it has kept."""

    told: int

    def rest(self, *, ending: bool = False) -> None:
        if not ending:
            os.write(self.told, b".")


def test_a_busy_helper_lets_go_of_what_it_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request ends its wait; that must not begin the time anew."""
    monkeypatch.setattr(server, "REST_S", 0.5)
    reading, writing = os.pipe()
    place = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(place)
        listening.listen()
        child = os.fork()
        if child == 0:
            try:
                helper = Telling(str(tmp_path / "images"), {})
                helper.told = writing
                server.serve(listening, helper)
            finally:
                os._exit(0)
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not select.select([reading], [], [], 0)[0]:
                assert time.monotonic() < deadline
                with socket.socket(socket.AF_UNIX) as asking:
                    asking.connect(place)
                    asking.sendall(b"no request\n")
                    assert b'"ok": false' in asking.recv(4096)
        finally:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            os.close(reading)
            os.close(writing)
