"""`exit()` and `quit()` in a rank: it serves a notebook that goes on, so it does not end with a cell."""

from __future__ import annotations

import os
from typing import Any

OF_RANKS = ("ROLE_RANK", "NCCL_HOSTID")
"""Variables that ranks have, and a notebook's kernel has not; a clone becomes one later."""


class NoExitError(Exception):
    """A rank was asked to end."""


def stay(shell: Any) -> None:
    """Have `exit()` say in a rank what to do instead; elsewhere it does what it did."""
    ask = shell.ask_exit

    def ask_exit() -> None:
        if all(os.environ.get(name) for name in OF_RANKS):
            raise NoExitError(
                "A rank does not end with its cell. Raise an exception to leave the cell; `%remote close`, in the "
                "notebook, removes its ranks."
            )
        ask()

    shell.ask_exit = ask_exit
