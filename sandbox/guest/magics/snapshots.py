"""`%snapshot` and `%restore`: this notebook's memory under a name, and back."""

from __future__ import annotations

import re
import secrets
import shlex
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .answers import wait_for_answer
from .api import Api, KeeperError
from .arguments import ArgumentError

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,63}")
RESTORED_TIMEOUT_S = 600.0
"""How long a cell with `%restore` waits for its own end."""


class Snapshots:
    """The magics of one shell."""

    def __init__(self, shell: InteractiveShell, connect: Callable[[], Api]) -> None:
        self._shell = shell
        self._connect = connect
        self._wanted = ""

    def snapshot(self, line: str) -> None:
        """Save this notebook's memory and files under a name; without one, list what there is.

            %snapshot NAME
            %snapshot

        It is taken at the end of this cell. %restore NAME brings it back.
        """
        name = self._name("snapshot", line)
        if not name:
            self._list()
            return
        self._wanted = name
        self._shell.events.register("post_run_cell", self._at_the_end)

    def restore(self, line: str) -> None:
        """Bring back memory and files of a snapshot; what came after it is lost, this cell included.

        %restore NAME
        """
        name = self._name("restore", line)
        if not name:
            from IPython.core.error import UsageError

            raise UsageError("%restore needs the name of a snapshot; %snapshot lists them")
        parent: Mapping[str, Any] = getattr(self._shell, "get_parent", dict)() or {}
        self._connect().restore(name, cell=str(parent.get("header", {}).get("msg_id", "")))
        # The keeper answers this cell's request in the kernel's place; nothing here runs on after that.
        time.sleep(RESTORED_TIMEOUT_S)
        raise TimeoutError(f"The snapshot {name!r} was not restored within {RESTORED_TIMEOUT_S:.0f} s")

    def _at_the_end(self, result: object) -> None:
        """The cell is over but for this: what is restored begins here too, and says nothing."""
        self._shell.events.unregister("post_run_cell", self._at_the_end)
        api, token = self._connect(), secrets.token_hex(8)
        try:
            api.snapshot(self._wanted, token)
        except KeeperError as error:
            _say(f"No snapshot was taken. {error}")
            return
        answer = wait_for_answer(api.run_directory, token)
        if answer.get("ok") is not True:
            _say(f"No snapshot was taken. {answer.get('message')} {answer.get('hint') or ''}".rstrip())
        elif answer.get("snapshot"):
            _say(f"Snapshot {_words(answer['snapshot'])}")

    def _name(self, magic: str, line: str) -> str:
        from IPython.core.error import UsageError

        try:
            return parse(magic, line)
        except ArgumentError as error:
            raise UsageError(f"%{magic}: {error}") from None

    def _list(self) -> None:
        found = self._connect().snapshots()
        if not found:
            _say("There are no snapshots. %snapshot NAME takes one.")
        for each in found:
            _say(_words(each))


def parse(magic: str, line: str) -> str:
    """The name in the line, which may be quoted; empty if there is none.

    Raises:
        ArgumentError: It is malformed.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ArgumentError(f"{error}: {line.strip()}") from None
    if len(words) > 1:
        raise ArgumentError(
            f"one name is needed, not {len(words)}; quote one with spaces: %{magic} {' '.join(words)!r}"
        )
    name = words[0] if words else ""
    if "=" in name:
        raise ArgumentError(f"{name!r} is no name. Write just that, as in %{magic} before-training")
    if name and not NAME.fullmatch(name):
        raise ArgumentError(
            f"{name!r} is no name for a snapshot: letters, digits, spaces, dots, dashes and underscores, at most 64"
        )
    return name


def _words(info: Mapping[str, Any]) -> str:
    """One snapshot on a line."""
    when = info.get("created_at")
    parts = [str(info.get("name") or info.get("id"))]
    if isinstance(when, (int, float)):
        parts.append(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)))
    size = info.get("memory_bytes")
    if isinstance(size, int):
        parts.append(f"{size / 2**20:.0f} MiB")
    if info.get("not_saved"):
        parts.append(f"without {', '.join(map(str, info['not_saved']))}")
    return "  ".join(parts)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - it is the cell's output.
