"""How helpers are started."""

from __future__ import annotations

from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

START = "import sys; sys.path.append({folder!r}); from warmcell.sandbox.helper import {name}; {name}.main(sys.argv[1:])"


def command(python: str, *, listening: int, lifeline: int, base: str, for_all: bool = False) -> list[str]:
    """The command line; the two descriptors have to be passed on.

    Args:
        python: An interpreter of root's.
        listening: A listening Unix stream socket.
        lifeline: The reading end of a pipe, which the keeper keeps the other end of.
        base: Directory of the images.
        for_all: Serve every user, each their own images and sandboxes; else only who starts it.
    """
    folder = str(Path(__file__).parents[3])  # Not resolved: links make the packages.
    return [
        python,
        "-I",
        "-S",
        "-c",
        START.format(folder=folder, name="server"),
        str(listening),
        str(lifeline),
        base,
        str(int(for_all)),
    ]


def agent_command(python: str, *, keeper: tuple[int, int], fds: Sequence[int], uid: int, base: str) -> list[str]:
    """The command line of an agent, see `agent.main`.

    Args:
        python: An interpreter.
        keeper: The number of the keeper, and when it began.
        fds: What is open there for it.
        uid: Whom it serves.
        base: Directory of the images.
    """
    begin = START.format(folder=str(Path(__file__).parents[3]), name="agent")
    # -B: what root writes beside a user's own files, the user could not remove.
    return [python, "-I", "-S", "-B", "-c", begin, *map(str, (*keeper, *fds, uid)), base]


def system_command(python: str, *, socket: str, images: str, most: int, folder: Path | None = None) -> list[str]:
    """The command line of a machine's helper.

    Args:
        python: An interpreter of root's.
        socket: Where it listens.
        images: Directory of all users' images.
        most: Sandboxes of one user at a time.
        folder: Where the package lies; where this one does if None.
    """
    begin = START.format(folder=str(folder or Path(__file__).parents[3]), name="system")
    return [python, "-I", "-S", "-c", begin, socket, images, str(most)]
