"""When a kernel has seen that its clients have gone."""

import os
import socket
from pathlib import Path

from warmcell.sandbox.helper import parted


def sees_all(*, timeout_s: float) -> bool:
    """Whether this process has nothing to look at."""
    return parted.wait([os.getpid()], timeout_s=timeout_s)


def test_a_process_has_seen_who_came_and_who_has_gone(tmp_path: Path) -> None:
    """Neither a client that waits to be let in nor one that has left is overlooked; then it takes no time."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "s"))
        door.listen()
        assert sees_all(timeout_s=60)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
            assert not sees_all(timeout_s=0.01)
            served, _ = door.accept()
            assert sees_all(timeout_s=60)
        assert not sees_all(timeout_s=0.01)
        served.close()
        assert sees_all(timeout_s=60)


def test_half_of_a_pair_is_no_client() -> None:
    """Whoever closed the other one knows."""
    one, other = socket.socketpair()
    other.close()
    assert sees_all(timeout_s=60)
    one.close()


def test_a_process_that_has_ended_has_nothing_to_see() -> None:
    """It is gone before one looks."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert parted.wait([child], timeout_s=60)
