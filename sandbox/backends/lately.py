"""What was looked up a moment ago and is not looked up again for each of many sandboxes that are made at once."""

import functools
import threading
import time
from collections.abc import Callable, Hashable
from typing import Final, ParamSpec, TypeVar

LATELY_S: Final = 1.0
KEPT_MAX: Final = 64

P = ParamSpec("P")
R = TypeVar("R")


def lately(look: Callable[P, R]) -> Callable[P, R]:
    """The same, whose answer counts for a second; its arguments can be hashed, and nobody changes what it answers.

    What it raises is raised, and looked up again.
    """
    known: dict[Hashable, tuple[float, R]] = {}
    lock = threading.Lock()

    @functools.wraps(look)
    def looked(*args: P.args, **kwargs: P.kwargs) -> R:
        key = args, tuple(kwargs.items())
        now = time.monotonic()
        with lock:
            at, found = known.get(key, (0.0, None))
            if found is not None and now - at < LATELY_S:
                return found
        found = look(*args, **kwargs)
        with lock:
            if len(known) >= KEPT_MAX:
                known.clear()
            known[key] = now, found
        return found

    return looked
