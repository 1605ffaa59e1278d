"""Who the guest is: never root, and whoever the files of the workspace belong to where that can be."""

import os
import pwd
import re
from dataclasses import dataclass, replace
from pathlib import Path

from warmcell.sandbox.errors import InvalidRequestError

UNUSED_UID = 1_897_400_000
"""First of a range that distributions, systemd and usual subordinate ids leave free, for the guests of root."""
GUEST_NAME = "warmcell"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A guest's user."""

    uid: int
    gid: int
    name: str


def choose(workspace: Path | None, name: str = "") -> Identity:
    """An ordinary user's own uid; as root the workspace owner's where that is not root, else one that nobody has.

    Args:
        workspace: The real path of the folder, if there is one.
        name: What the user is called there; empty: as on the host.

    Raises:
        InvalidRequestError: As `checked_name`.
    """
    found = _owner(workspace)
    return replace(found, name=checked_name(name)) if name else found


def checked_name(name: str) -> str:
    """A name that a guest's user may have.

    Raises:
        InvalidRequestError: It is root's, or would be no name in /etc/passwd and no directory in /home.
    """
    if not _NAME.fullmatch(name) or name == "root":
        raise InvalidRequestError(
            f"{name[:50]!r} is no name of a sandbox's user", hint="Take a word of letters and digits that is not root."
        )
    return name


def _owner(workspace: Path | None) -> Identity:
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        return Identity(uid=uid, gid=gid, name=name_of(uid) or GUEST_NAME)
    if workspace is not None:
        found = workspace.stat()
        if found.st_uid != 0:
            return Identity(
                uid=found.st_uid,
                gid=_primary_group(found.st_uid) or found.st_gid or found.st_uid,
                name=name_of(found.st_uid) or GUEST_NAME,
            )
    uid = unused_uid()
    return Identity(uid=uid, gid=uid, name=GUEST_NAME)


def unused_uid() -> int:
    """The same on each call, as long as nobody takes it."""
    uid = UNUSED_UID
    while name_of(uid) is not None:
        uid += 1
    return uid


def name_of(uid: int) -> str | None:
    """What a guest of this uid is called; None where nobody has it."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
    return name if _NAME.fullmatch(name) and name != "root" else GUEST_NAME


def _primary_group(uid: int) -> int | None:
    try:
        return pwd.getpwuid(uid).pw_gid or None
    except KeyError:
        return None
