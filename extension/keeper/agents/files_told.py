"""What a guest says of a sandbox's files: believed as far as it is of the form that it should have."""

import base64
from collections.abc import Mapping
from typing import Any

from warmcell.sandbox import errors
from warmcell.sandbox.guest_wire import RESTART, WORDS_MAX, shown, whole_number

MODE_MAX = 0o7777
ERRNO_MAX = 32
"""Characters of the name of an errno."""

STATUS: Mapping[str, type[errors.WarmcellError]] = {
    "ENOENT": errors.SandboxFileNotFoundError,
    "ENOSPC": errors.StorageFullError,
    "EDQUOT": errors.StorageFullError,
    "EMFILE": errors.CapacityError,
    "ENOMEM": errors.CapacityError,
    "EFBIG": errors.StorageFullError,
    "ENAMETOOLONG": errors.InvalidRequestError,
    "ELOOP": errors.InvalidRequestError,
    "EINVAL": errors.InvalidRequestError,
    "ENOTSUP": errors.UnsupportedOperationError,
    "EOPNOTSUPP": errors.UnsupportedOperationError,
}
HINTS: Mapping[type[errors.WarmcellError], str] = {
    errors.SandboxFileNotFoundError: "List its directory to see what is there.",
    errors.StorageFullError: "Remove something, or ask for a larger sandbox (limits.layer_bytes).",
    errors.CapacityError: "Try again, with less at a time.",
    errors.InvalidRequestError: "Give another path.",
    errors.ConflictError: "Look what is there with files.stat.",
    errors.UnsupportedOperationError: "The sandbox's file system keeps no metadata: leave it out.",
}

FILE: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("path", "name", "type", "owner", "group"), (str,)),
    **dict.fromkeys(("size_bytes", "mode"), (int,)),
    **{"modified_at": (int, float), "target": (str, type(None)), "metadata": (dict,)},
}
"""What is told of a file, as `FileInfo` has it; checked by hand, since there may be thousands of them."""

TYPES = ("file", "directory", "symlink", "other")


def told(op: str, head: Mapping[str, Any]) -> dict[str, Any]:
    """What the guest says that it has done; raises ProtocolError where a field is not what it should be."""
    match op:
        case "list":
            files = head.get("files")
            if not isinstance(files, list):
                raise _no_file(files)
            found = [_file(one) for one in files]
            return {
                "files": found,
                "next": cursor(found[-1]["path"]) if found and head.get("truncated") is True else None,
            }
        case "unpack":
            return {"files": whole_number(head, "files")}
        case "room":
            return {"used_bytes": whole_number(head, "used_bytes")}
        case "remove" | "pack":
            return {}
        case "mkdir":
            return {"file": _file(head.get("file")), "created": head.get("created") is True}
    return {"file": _file(head.get("file"))}


def cursor(path: str) -> str:
    """Where the next page of a listing begins: a path may have bytes that are no text, which no query could say."""
    return base64.urlsafe_b64encode(path.encode(errors="surrogatepass")).decode().rstrip("=")


def place(after: str) -> str:
    """The path that a cursor was made of; raises InvalidRequestError."""
    try:
        return base64.urlsafe_b64decode(after + "=" * (-len(after) % 4)).decode(errors="surrogatepass")
    except ValueError as error:
        raise errors.InvalidRequestError("`after` is no cursor", hint="Give the `next` of the page before.") from error


def _file(told: object) -> dict[str, Any]:
    if (
        not isinstance(told, dict)
        or not all(type(told.get(name)) in kinds for name, kinds in FILE.items())
        or told["type"] not in TYPES
        or not 0 <= told["mode"] <= MODE_MAX
        or not 0 <= told["size_bytes"] < 2**63
        or not all(type(one) is str for pair in told["metadata"].items() for one in pair)
    ):
        raise _no_file(told)
    return {name: told.get(name) for name in FILE}


def _no_file(told: object) -> errors.ProtocolError:
    return errors.ProtocolError(f"The sandbox told of a file {shown(told)}", hint=RESTART)


def refused(head: Mapping[str, Any]) -> errors.WarmcellError:
    """The error that a guest's refusal stands for, by the name of its errno."""
    name = str(head.get("errno", ""))[:ERRNO_MAX]
    kind = STATUS.get(name, errors.ConflictError)
    message = str(head.get("message") or "It cannot be done")[:WORDS_MAX]
    return kind(message, hint=HINTS[kind], details={"errno": name})
