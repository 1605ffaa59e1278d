"""Clones of one image, restored by one process: it checks the image and reads it once for all that are under way.

Every other request has a process of its own, so that none can harm another. Clones of one image are all of one user,
who asks for them on one connection, so there is nobody else whom this process could harm. What a guest could have made
it does not look at: each sandbox is entered by a process of its own, as ever, and what it says is read by steps, so
that one which says nothing holds up nobody.

Each clone is asked for by a request like the first, with two descriptors: of the sandbox's first process, and of a
socket, on which that clone is answered and on which hanging up gives it up.
"""

from __future__ import annotations

import select
import time

from warmcell.sandbox.helper.enter import Cancelled
from warmcell.sandbox.helper.outcome import audit, tell
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.restore import Restoring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from warmcell.sandbox.helper.places import Place
    from warmcell.sandbox.helper.restore import Source
    from warmcell.sandbox.helper.wire import Conversation

AT_ONCE = 8
"""Clones of one process. Who has processors for more asks another process as well."""
IDLE_S = 30.0
"""Whoever asks for no other clone for so long has forgotten to hang up."""


def serve(conversation: Conversation, source: Source, place_of: Callable[[Conversation], Place], *, base: str) -> None:
    """Restore what is asked for until the caller has hung up and all of it is done.

    Args:
        conversation: On which clones are asked for; the first is already.
        source: What they are clones of.
        place_of: Finds the sandbox that a request names, if it is the caller's.
        base: Directory of all images.
    """
    first = _Clone(conversation, source, place_of, base=base)
    under_way = [] if first.over else [first]
    asks = True
    try:
        while asks or under_way:
            waiting = select.poll()
            if asks and len(under_way) < AT_ONCE:
                waiting.register(conversation, select.POLLIN | select.POLLRDHUP)
            for clone in under_way:
                clone.register(waiting)
            until = min((clone.deadline for clone in under_way), default=time.monotonic() + IDLE_S)
            ready = dict(waiting.poll(1e3 * max(0.0, until - time.monotonic())))
            if not ready and not under_way:
                return
            for clone in under_way:
                clone.go_on(ready)
            if conversation.fileno() in ready:
                asks = conversation.again()
                if asks:
                    under_way.append(_Clone(conversation, source, place_of, base=base))
            under_way = [clone for clone in under_way if not clone.over]
    finally:
        for clone in under_way:
            clone.give_up()


class _Clone:
    """One that was asked for."""

    def __init__(
        self, conversation: Conversation, source: Source, place_of: Callable[[Conversation], Place], *, base: str
    ) -> None:
        """Begin. What goes wrong is told to who has asked."""
        self._began = time.perf_counter()
        self._base = base
        self._about = f"uid={conversation.uid} op='restore' image={source.image!r}"
        self._answers = conversation.answers()
        self._restoring: Restoring | None = None
        self.over = False
        try:
            conversation.text("op", choices=("restore",))
            conversation.text("image", choices=(source.image,))
            self._restoring = Restoring(source, place_of(conversation), told=self._told)
        except (HelperError, OSError) as error:
            self._end(error)

    @property
    def deadline(self) -> float:
        """When it has taken too long, on the clock of `time.monotonic`."""
        return time.monotonic() if self._restoring is None else self._restoring.deadline

    def register(self, waiting: select.poll) -> None:
        """Have it waited for."""
        assert self._restoring is not None
        waiting.register(self._restoring.waits, select.POLLIN)
        waiting.register(self._answers, select.POLLRDHUP)

    def go_on(self, ready: Mapping[int, int]) -> None:
        """Do its next step, if that can be done without waiting."""
        assert self._restoring is not None
        try:
            if self._answers.fileno() in ready:  # First of all: on a busy machine there is always a step to be done.
                raise Cancelled
            if self._restoring.waits in ready:
                answer = self._restoring.step()
                if answer is not None:
                    self._answers.say({"ok": True, **answer})
                    self._end(None)
            elif time.monotonic() >= self._restoring.deadline:
                raise self._restoring.late()
        except (Cancelled, HelperError, OSError) as error:
            self._end(error)

    def give_up(self) -> None:
        """Leave nothing of it, if it is under way."""
        if not self.over:
            self._end(Cancelled())

    def _told(self, done: int, of: int) -> None:
        self._answers.say({"ok": True, "done": done, "of": of})

    def _end(self, error: Exception | None) -> None:
        self.over = True
        if self._restoring is not None:
            self._restoring.end()
        outcome = tell(self._answers, error, base=self._base)
        audit(f"{self._about} ms={1e3 * (time.perf_counter() - self._began):.0f} {outcome}")
        self._answers.close()
