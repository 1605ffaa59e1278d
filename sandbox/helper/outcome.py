"""What came of a request: told to who has asked, and written down."""

from __future__ import annotations

import contextlib
import os
import time

from warmcell.sandbox.helper.enter import Cancelled
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.shelf import full

TYPE_CHECKING = False
if TYPE_CHECKING:
    from warmcell.sandbox.helper.wire import Answers


def tell(answers: Answers, error: Exception | None, *, base: str) -> str:
    """Answer with what went wrong, if anything did; the words for the audit log.

    Args:
        answers: Of who has asked.
        error: A `HelperError`, an `OSError`, `Cancelled`, or None.
        base: Directory of all images, which may be what is full.
    """
    if error is None:
        return "ok"
    if isinstance(error, Cancelled):
        return "the caller has gone"
    problem = error if isinstance(error, HelperError) else None
    if isinstance(error, OSError):
        problem = full(error, base)
    if problem is None:
        problem = HelperError("snapshot_failed", f"The helper failed: {error}", hint="Its log says more.")
    answers.fail(problem)
    return f"{problem.code}: {problem.message}"


def audit(line: str) -> None:
    """One line for each operation, on stderr: who asked for what and what came of it."""
    clean = "".join(character if character.isprintable() else "?" for character in line)
    with contextlib.suppress(OSError):
        os.write(2, f"{time.strftime('%Y-%m-%dT%H:%M:%S')} warmcell-helper {clean[:2000]}\n".encode())
