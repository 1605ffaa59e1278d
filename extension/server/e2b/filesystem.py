"""E2B's `filesystem.Filesystem`: what is there, directories, other names, and what changes."""

import contextlib
import datetime
import posixpath
import stat as modes
from collections.abc import Mapping, Sequence
from typing import Any, Final

from warmcell.extension.server.e2b.calls import unary
from warmcell.extension.server.e2b.fields import Fields
from warmcell.extension.server.e2b.framing import Code, ConnectError
from warmcell.extension.server.e2b.handler import E2bHandler, Verb
from warmcell.extension.server.e2b.processes import check_user
from warmcell.sandbox.errors import (
    ConflictError,
    InvalidRequestError,
    SandboxFileNotFoundError,
    UnsupportedOperationError,
)

LINKS_MAX: Final = 64
"""Where a directory has more links, they are told as links, not as what they lead to."""

DEPTH_MAX: Final = 100
EPOCH: Final = datetime.datetime.fromtimestamp(0, datetime.UTC)
TIME_MAX_S: Final = 60e9
"""A file may be of any time; E2B's clients read years of four digits."""

PATH_MAX: Final = 4096
TYPES: Final[Mapping[str, str]] = {
    "file": "FILE_TYPE_FILE",
    "directory": "FILE_TYPE_DIRECTORY",
    "symlink": "FILE_TYPE_SYMLINK",
}
FORMATS: Final[Mapping[str, int]] = {"file": modes.S_IFREG, "directory": modes.S_IFDIR, "symlink": modes.S_IFLNK}


async def stat(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """What is at a path."""
    info = await request.keeper.ask("GET", _at(request, "stat"), params={"path": path_of(message)})
    return {"entry": await _resolved(request, info)}


async def list_dir(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """What is in a directory, and below it."""
    depth = message.whole("depth", most=DEPTH_MAX) or 1
    params = {"path": path_of(message), "depth": str(depth)}
    found = await request.keeper.ask("GET", _at(request, "list"), params=params)
    if found["next"] is not None:
        raise UnsupportedOperationError(
            f"There are more files than {len(found['files'])}", hint="List with a smaller depth, or its directories."
        )
    links = {one["path"] for one in found["files"] if one["type"] == "symlink"}
    if len(links) > LINKS_MAX:
        links = set()
    entries = [await _resolved(request, one) if one["path"] in links else entry(one) for one in found["files"]]
    return {"entries": entries}


async def make_dir(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """A directory, and those above it."""
    check_user(request)
    path = path_of(message)
    made = await request.keeper.ask("POST", _at(request, "mkdir"), {"path": path, "parents": True})
    if not made["created"]:
        raise ConnectError(Code.ALREADY_EXISTS, f"{path} is there already")
    return {"entry": entry(made)}


async def move(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """Another name."""
    check_user(request)
    names = {"source": path_of(message, "source"), "target": path_of(message, "destination")}
    return {"entry": entry(await request.keeper.ask("POST", _at(request, "move"), names))}


async def remove(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """A file, or a directory and all below it. What is not there is gone already."""
    check_user(request)
    params = {"path": path_of(message), "recursive": "1"}
    try:
        await request.keeper.ask("DELETE", f"/sandboxes/{request.sandbox_id}/files", params=params)
    except SandboxFileNotFoundError:
        return {}
    return {}


def entry(info: Mapping[str, Any]) -> dict[str, Any]:
    """A file as E2B shows it."""
    kind = info["type"]
    at = EPOCH + datetime.timedelta(seconds=min(max(info["modified_at"], -TIME_MAX_S), TIME_MAX_S))
    return {
        "name": info["name"],
        "type": TYPES.get(kind, "FILE_TYPE_UNSPECIFIED"),
        "path": info["path"],
        "size": str(info["size_bytes"]),
        "mode": modes.S_IMODE(info["mode"]),
        "permissions": modes.filemode(FORMATS.get(kind, 0) | modes.S_IMODE(info["mode"])),
        "owner": str(info["owner"]),
        "group": str(info["group"]),
        "modifiedTime": at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        **({"symlinkTarget": info["target"], "isSymlink": True} if info["target"] is not None else {}),
        **({"metadata": info["metadata"]} if info["metadata"] else {}),
    }


async def _resolved(request: E2bHandler, info: Mapping[str, Any]) -> dict[str, Any]:
    """A file as E2B shows it; a link has the type of what it leads to, if that is there."""
    told = entry(info)
    if info["type"] == "symlink":
        params = {"path": info["path"], "follow": "1"}
        with contextlib.suppress(SandboxFileNotFoundError, InvalidRequestError, ConflictError):
            told["type"] = entry(await request.keeper.ask("GET", _at(request, "stat"), params=params))["type"]
        told["symlinkTarget"] = posixpath.join(posixpath.dirname(info["path"]), info["target"])
    return told


def path_of(message: Fields, name: str = "path") -> str:
    """A path in a message; raises InvalidRequestError."""
    path = message.text(name, most=PATH_MAX)
    if not path or "\0" in path:
        raise InvalidRequestError(f"{name} is missing, or none", hint="Give a path in the sandbox.")
    return path


def _at(request: E2bHandler, verb: str) -> str:
    return f"/sandboxes/{request.sandbox_id}/files/{verb}"


def _verb(name: str, serve: Any) -> Verb:
    return Verb("envd", "POST", rf"/filesystem\.Filesystem/{name}", serve)


VERBS: Final[Sequence[Verb]] = (
    _verb("Stat", unary(stat)),
    _verb("ListDir", unary(list_dir)),
    _verb("MakeDir", unary(make_dir)),
    _verb("Move", unary(move)),
    _verb("Remove", unary(remove)),
)
