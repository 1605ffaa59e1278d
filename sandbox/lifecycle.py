"""The states of a sandbox as one pure table: no input, no output, no clock.

creating → running ⇄ suspended, each of them → stopped or failed;
in between suspending, resuming, stopping.
"""

from enum import StrEnum

from warmcell.sandbox.errors import InvalidTransitionError


class State(StrEnum):
    """Where a sandbox is in its life."""

    CREATING = "creating"
    RUNNING = "running"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    RESUMING = "resuming"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Event(StrEnum):
    """What can happen to a sandbox."""

    CREATED = "created"
    SUSPEND = "suspend"
    SUSPEND_DONE = "suspend_done"
    SUSPEND_FAILED = "suspend_failed"
    RESUME = "resume"
    RESUME_DONE = "resume_done"
    RESUME_FAILED = "resume_failed"
    STOP = "stop"
    STOP_DONE = "stop_done"
    DIED = "died"


TERMINAL = frozenset({State.STOPPED, State.FAILED})
ALIVE = frozenset(State) - TERMINAL

_TABLE: dict[tuple[State, Event], State] = {
    (State.CREATING, Event.CREATED): State.RUNNING,
    (State.RUNNING, Event.SUSPEND): State.SUSPENDING,
    (State.SUSPENDING, Event.SUSPEND_DONE): State.SUSPENDED,
    (State.SUSPENDING, Event.SUSPEND_FAILED): State.RUNNING,
    (State.SUSPENDED, Event.RESUME): State.RESUMING,
    (State.RESUMING, Event.RESUME_DONE): State.RUNNING,
    (State.RESUMING, Event.RESUME_FAILED): State.SUSPENDED,
    (State.STOPPING, Event.STOP_DONE): State.STOPPED,
    **{(state, Event.STOP): State.STOPPING for state in ALIVE},
    **{(state, Event.DIED): State.FAILED for state in ALIVE - {State.STOPPING}},
    (State.STOPPING, Event.DIED): State.STOPPED,
}


def transition(state: State, event: Event) -> State:
    """The state after `event`.

    Raises:
        InvalidTransitionError: The event has no meaning in this state.
    """
    after = _TABLE.get((state, event))
    if after is None:
        raise InvalidTransitionError(
            f"A sandbox that is {state} cannot take the step {event}",
            hint="Ask for its state first.",
            details={"state": state, "event": event},
        )
    return after
