"""What runs in a sandbox besides its kernel, as its guest tells it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from warmcell.sandbox.errors import ProtocolError
from warmcell.sandbox.guest_wire import RESTART, whole_number

COMMANDS_MAX = 10
COMMAND_MAX = 100
"""Characters of a command line that are passed on."""

MORE_MAX = 9999
CPU_MAX_S = 1e12
"""What a machine can have used; a guest may say any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """Servers, daemons and terminals. A kernel's own children are part of it, and not named here."""

    told: tuple[str, ...] = ()
    """Their command lines, the longest running first; where there are too many the last one says how many more."""
    listens: bool = False
    """Whether one of them waits for connections at a TCP port."""
    cpu_s: float = 0.0
    """Processor time that they have used so far, in seconds."""

    @classmethod
    def read(cls, answer: Mapping[str, Any]) -> Self:
        """Cut down to what can be: pages show it, and it may come from anybody.

        Raises:
            ProtocolError: The guest says something else.
        """
        commands, cpu_s = answer.get("commands"), answer.get("cpu_s")
        if not isinstance(commands, list) or not all(isinstance(command, str) for command in commands):
            raise ProtocolError("The guest said no commands", hint=RESTART)
        if not isinstance(cpu_s, (int, float)):
            raise ProtocolError("The guest said no processor time", hint=RESTART)
        more = whole_number(answer, "more") + len(commands[COMMANDS_MAX:])
        told = [_shown(command) for command in commands[:COMMANDS_MAX]]
        return cls(
            told=(*told, *([f"{min(more, MORE_MAX)} more"] if more > 0 else [])),
            listens=answer.get("listens") is True,
            cpu_s=float(min(max(0, cpu_s), CPU_MAX_S)),
        )


def _shown(command: str) -> str:
    """On one line, of bounded length."""
    line = "".join(letter if letter.isprintable() else " " for letter in command[: COMMAND_MAX + 1])
    return line if len(line) <= COMMAND_MAX else f"{line[: COMMAND_MAX - 1]}…"
