"""The state machine of a sandbox."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmcell.sandbox.errors import InvalidTransitionError
from warmcell.sandbox.lifecycle import ALIVE, TERMINAL, Event, State, transition


@pytest.mark.parametrize(
    ("events", "ends"),
    [
        ([Event.CREATED, Event.STOP, Event.STOP_DONE], State.STOPPED),
        ([Event.DIED], State.FAILED),
        ([Event.CREATED, Event.SUSPEND, Event.SUSPEND_DONE, Event.RESUME, Event.RESUME_DONE], State.RUNNING),
        ([Event.CREATED, Event.SUSPEND, Event.SUSPEND_FAILED], State.RUNNING),
        ([Event.CREATED, Event.SUSPEND, Event.SUSPEND_DONE, Event.RESUME, Event.RESUME_FAILED], State.SUSPENDED),
        ([Event.CREATED, Event.STOP, Event.DIED], State.STOPPED),
    ],
)
def test_lives_end_where_they_should(events: list[Event], ends: State) -> None:
    """Each story of the design leads to its state."""
    state = State.CREATING
    for event in events:
        state = transition(state, event)
    assert state is ends


@given(st.lists(st.sampled_from(list(Event)), max_size=20))
def test_nothing_leaves_a_terminal_state(events: list[Event]) -> None:
    """Whatever happens to a stopped or failed sandbox, it stays so."""
    state = State.CREATING
    for event in events:
        if state in TERMINAL:
            with pytest.raises(InvalidTransitionError, match=f"{state} cannot take the step {event}"):
                transition(state, event)
        else:
            with contextlib.suppress(InvalidTransitionError):
                state = transition(state, event)


@pytest.mark.parametrize("state", sorted(ALIVE))
def test_every_living_state_can_be_stopped_and_can_die(state: State) -> None:
    """No sandbox is beyond ending."""
    assert transition(state, Event.STOP) is State.STOPPING
    assert transition(state, Event.DIED) in TERMINAL
