"""Copies of what a saved layer has."""

from __future__ import annotations

import errno
import os

from .linux import PR_SET_PDEATHSIG, Refused, libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


def fill(plan: Sequence[Mapping[str, Any]], *, owners: bool) -> None:
    """Copy what a saved layer has into the file systems of this sandbox, or only what a directory of it itself is."""
    from .. import trees  # Most sandboxes have no use for it.

    for made in plan:
        source = made["source"]
        if isinstance(source, str):
            source = os.open(source, trees.DIRECTORY)
        else:  # A descriptor that gives no right to read.
            source = os.open(".", trees.DIRECTORY, dir_fd=source)
        target = os.open(made["path"], trees.DIRECTORY)
        copy = trees.Copy(
            source, target, most_bytes=made["most_bytes"], most_entries=made["most_entries"], owners=owners
        )
        try:
            copy.top() if made["only_top"] else copy.run()
        except trees.Refused:
            raise Refused(f"copy saved files to {made['path']}", errno.EFBIG) from None
        except OSError as error:
            raise Refused(f"copy saved files to {made['path']}", error.errno or 0) from None
        os.close(source)
        os.close(target)


def fill_as(user: tuple[int, int], plan: Sequence[Mapping[str, Any]]) -> None:
    """`fill` by a process that is that user and nothing more."""
    from .. import trees  # noqa: F401  # While it can be read.

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "1 copy saved files"
        try:
            os.setgroups([])
            os.setresgid(user[1], user[1], user[1])
            os.setresuid(user[0], user[0], user[0])
            libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
            fill(plan, owners=False)
            said = ""
        except Refused as error:
            said = f"{error.errno} {error.step}"
        finally:
            os.write(writing, said.encode()[:1000])
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 1000).decode(errors="replace")
    os.close(reading)
    os.waitpid(child, 0)
    if said:
        number, _, step = said.partition(" ")
        raise Refused(step, int(number))
