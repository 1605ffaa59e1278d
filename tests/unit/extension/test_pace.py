"""How slowly somebody may send, by a clock of the test's."""

import itertools

import pytest

from warmcell.extension.pace import LEAST_BYTES_S, Pace


@pytest.mark.parametrize("pause_s", [1.0, 9.0])
def test_a_byte_now_and_then_is_not_waited_for_without_end(pause_s: float) -> None:
    """All pauses count together; a single one may be as long as all."""
    now = [0.0]
    pace = Pace(10.0, now=lambda: now[0])
    for count in itertools.count():
        left = pace.wait()
        if left <= pause_s:
            break
        now[0] += pause_s
        pace.came(1)
        assert count < 20
    assert now[0] >= 9.0


def test_who_sends_enough_is_waited_for_for_ever() -> None:
    """Pauses are made good by what comes, but none is saved up for: after any amount one of ten seconds is too long."""
    now = [0.0]
    pace = Pace(10.0, now=lambda: now[0])
    for _ in range(1000):
        assert pace.wait() > 5.0
        now[0] += 5.0
        pace.came(int(5 * LEAST_BYTES_S))
    pace.came(2**40)
    assert pace.wait() == 10.0


def test_what_is_done_with_a_piece_is_not_the_senders_time() -> None:
    """A sandbox may take its time to write."""
    now = [0.0]
    pace = Pace(10.0, now=lambda: now[0])
    pace.wait()
    pace.came(1)
    now[0] += 100.0
    assert pace.wait() > 9.9
