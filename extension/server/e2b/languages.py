"""Languages of E2B's code interpreter: Python is the kernel's own, of others a program runs what is asked for. Pure."""

import base64
from collections.abc import Mapping
from typing import Final

from warmcell.sandbox.errors import UnsupportedOperationError

PYTHON: Final = "python"
NAMES: Final[Mapping[str, str]] = {"": PYTHON, PYTHON: PYTHON, "python3": PYTHON, "bash": "bash", "sh": "bash"} | {
    "javascript": "javascript",
    "js": "javascript",
}
PROGRAMS: Final[Mapping[str, str]] = {"bash": "bash", "javascript": "node"}
"""What runs it, where the sandbox has that. It reads the code as its input, and begins anew each time."""

PLAINLY: Final = "env -u FORCE_COLOR -u CLICOLOR_FORCE "
"""Kernels ask programs for colours, since pages show them; these clients do not."""


def known(asked: str) -> str:
    """The language of that name.

    Raises:
        UnsupportedOperationError: It is none that can be run.
    """
    language = NAMES.get(asked.lower())
    if language is None:
        others = " and ".join(PROGRAMS)
        raise UnsupportedOperationError(
            f"{asked} is not supported: sandboxes run Python, and {others}",
            hint="Leave language out, or run a command: its programs are in the sandbox where its image has them.",
        )
    return language


def check_context(asked: str) -> None:
    """Raises UnsupportedOperationError for a language that keeps nothing from one run to the next."""
    if known(asked) != PYTHON:
        raise UnsupportedOperationError(
            f"A context of {asked} is not supported: only Python keeps its variables",
            hint=f'Run each piece by itself: run_code(code, language="{asked}").',
        )


def as_python(code: str, language: str) -> str:
    """What the kernel is to run for code in a language."""
    program = PROGRAMS.get(language)
    if program is None:
        return code
    cure = f"{language} needs {program}, which this sandbox has not: take an image with it"
    told = base64.b64encode(code.encode()).decode()  # Its literal could be four times as long.
    text = f"__import__('base64').b64decode({told!r}).decode()"
    return (
        f"if __import__('shutil').which({program!r}) is None:\n"
        f"    raise RuntimeError({cure!r})\n"
        f"get_ipython().run_cell_magic('script', {PLAINLY + program!r}, {text})\n"
    )
