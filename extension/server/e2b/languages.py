"""Languages of E2B's code interpreter: Python is the kernels' own, others have an interpreter in a context. Pure."""

import base64
import re
import uuid
from collections.abc import Mapping
from typing import Final

from warmcell.sandbox.errors import UnsupportedOperationError

PYTHON: Final = "python"
OTHERS: Final = ("bash", "java", "javascript", "r", "typescript")
"""As `sandbox/guest/languages` has them."""

NAMES: Final[Mapping[str, str]] = {
    **{"": PYTHON, PYTHON: PYTHON, "python3": PYTHON},
    **{name: name for name in OTHERS},
    **{"sh": "bash", "js": "javascript", "ts": "typescript"},
}
LISTED: Final = "javascript"
"""Clients expect its context to be there from the beginning, as that of Python. It begins with its first code."""

_CONTEXT: Final = re.compile(rf"({'|'.join(OTHERS)})(-[0-9a-f]{{32}})?")


def known(asked: str) -> str:
    """The language of that name.

    Raises:
        UnsupportedOperationError: It is none that can be run.
    """
    language = NAMES.get(asked.lower())
    if language is None:
        raise UnsupportedOperationError(
            f"{asked} is not supported: sandboxes run {', '.join((PYTHON, *OTHERS))}",
            hint="Run a command: its program is in the sandbox where its image has it.",
        )
    return language


def new_context(language: str) -> str:
    """An id for a context of it, by which its language is known later."""
    name = uuid.uuid4().hex
    return name if language == PYTHON else f"{language}-{name}"


def of_context(context: str) -> str:
    """The language of the context with that id."""
    match = _CONTEXT.fullmatch(context)
    return PYTHON if match is None else match[1]


def is_usual(context: str) -> bool:
    """Whether it is the one of its language in which code runs where none is named."""
    return context in OTHERS


def as_python(code: str, language: str) -> str:
    """What a context is to run for code in a language."""
    if language == PYTHON:
        return code
    told = base64.b64encode(code.encode()).decode()  # Its literal could be four times as long.
    text = f"__import__('base64').b64decode({told!r}).decode()"
    return f"__import__('warmcell_guest.languages', fromlist=['run']).run({language!r}, {text})"
