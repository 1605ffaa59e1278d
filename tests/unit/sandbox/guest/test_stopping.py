"""The stop button while something is done that must be known to its end."""

import signal
import threading

import pytest

from warmcell.sandbox.guest.magics.stopping import check, held


def test_an_interrupt_is_counted_and_raises_nothing() -> None:
    """What must not be torn apart asks for it; afterwards the button does again what it did before."""
    before = signal.getsignal(signal.SIGINT)
    with held() as presses:
        check()
        assert presses.seconds_ago == 0.0
        for count in (1, 2, 3, 4):
            signal.raise_signal(signal.SIGINT)
            assert presses.count == count
            with pytest.raises(KeyboardInterrupt):
                check()
        assert presses.seconds_ago > 0.0
        assert not presses.given_up
    check()
    assert signal.getsignal(signal.SIGINT) is before


def test_impatience_raises_in_the_end() -> None:
    """Where there is a bound the press that reaches it is an interrupt as ever."""
    with pytest.raises(KeyboardInterrupt), held(most=2) as presses:
        signal.raise_signal(signal.SIGINT)
        assert not presses.given_up
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")
    assert presses.given_up


def test_threads_are_not_interrupted() -> None:
    """In one nothing is held, and the main thread's button stays as it is."""
    before, counts = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with held() as presses:
            counts.append(presses.count)
            assert signal.getsignal(signal.SIGINT) is before
            check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counts == [0]
