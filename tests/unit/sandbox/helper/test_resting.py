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


class Full(Telling):
    """On a machine that has no process left for what it does by the clock, for a while."""

    def run_out(self, *, times: int) -> None:
        forked, left = self.busy.forked, [None] * times

        def fork(uid: int) -> int | None:
            if left:
                left.pop()
                raise BlockingIOError("no process can be had")
            return forked(uid)

        self.busy.forked = fork  # type: ignore[method-assign]


def test_a_machine_without_processes_does_not_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has sandboxes of its making would lose them, for what can be done a little later."""
    monkeypatch.setattr(server, "REST_S", 0.1)
    reading, writing = os.pipe()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        child = os.fork()
        if child == 0:
            try:
                helper = Full(str(tmp_path / "images"), {})
                helper.told = writing
                helper.run_out(times=3)  # The beginning, and twice.
                server.serve(listening, helper)
            finally:
                os._exit(0)
        os.close(writing)
        try:
            assert select.select([reading], [], [], TIMEOUT_S)[0]
            assert os.read(reading, 1) == b"."  # It would be the end of the pipe, were it gone.
        finally:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            os.close(reading)
