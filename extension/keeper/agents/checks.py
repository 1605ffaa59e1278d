"""Reading what a request says, with an error that names what is wrong with it."""

import hashlib
import json
import math
import re
import uuid
from collections.abc import Mapping
from typing import Any

from warmcell.sandbox.errors import InvalidRequestError

ID = re.compile(r"[a-z0-9]{1,32}")
CONTEXT = re.compile(r"[A-Za-z0-9_-]{1,64}")
SECONDS_MAX = 10 * 365 * 86400.0


def text(body: Mapping[str, Any], name: str, default: str | None = None, *, most: int | None = None) -> str:
    """The string of that name, of `most` characters at most.

    Raises:
        InvalidRequestError: It is none, is too long, or is missing without a default.
    """
    value = body.get(name, default)
    if not isinstance(value, str) or "\0" in value:
        raise InvalidRequestError(f"`{name}` must be text", hint=f"Give {name} as a string without null bytes.")
    if most is not None and len(value) > most:
        raise InvalidRequestError(f"`{name}` has {len(value)} characters", hint=f"At most {most}.")
    return value


def new_id(body: Mapping[str, Any]) -> str:
    """The id that a client has chosen, or a new one; raises as `text`."""
    if body.get("id") is None:
        return uuid.uuid4().hex
    chosen = text(body, "id")
    if not ID.fullmatch(chosen):
        raise InvalidRequestError("`id` must be 1 to 32 of a-z and 0-9", hint="Take a UUID in hexadecimal digits.")
    return chosen


def fingerprint(body: Mapping[str, Any]) -> bytes:
    """What tells a request from others, its id apart; the request itself may be of many megabytes."""
    rest = {name: value for name, value in body.items() if name != "id"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).digest()


def context_id(body: Mapping[str, Any], default: str) -> str:
    """The id of a context; raises as `text`."""
    chosen = text(body, "id", default)
    if not CONTEXT.fullmatch(chosen):
        raise InvalidRequestError(
            "The id of a context must be 1 to 64 of A-Z, a-z, 0-9, _ and -", hint="Take a UUID in hexadecimal digits."
        )
    return chosen


def seconds(body: Mapping[str, Any], name: str, default: float | None = None, *, zero: bool = False) -> float | None:
    """A number of seconds above 0 (or 0 with `zero`), or None; raises as `text`."""
    value = body.get(name, default)
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value <= SECONDS_MAX
        or (value == 0 and not zero)
    ):
        raise InvalidRequestError(
            f"`{name}` must be a number of seconds, not {value!r}", hint="Give a number above 0, ten years at most."
        )
    return float(value)


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A yes or no; raises as `text`."""
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise InvalidRequestError(f"`{name}` must be true or false", hint=f"Leave {name} out, or give true.")
    return value


def whole(body: Mapping[str, Any], name: str, default: int | None = None, *, least: int, most: int) -> int:
    """A whole number within bounds; raises as `text`."""
    value = body.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidRequestError(
            f"`{name}` must be a whole number, not {value!r}", hint=f"Give one from {least} to {most}."
        )
    return value


def strings(body: Mapping[str, Any], name: str) -> dict[str, str]:
    """An object of strings; raises as `text`."""
    value = body.get(name) or {}
    if not isinstance(value, dict) or not all(isinstance(one, str) and "\0" not in one for one in value.values()):
        raise InvalidRequestError(f"`{name}` must be an object of strings", hint='As in {"NAME": "value"}.')
    return value


def number(parameter: str, name: str, *, least: float = 0, most: float) -> float:
    """A number of a query; raises as `text`."""
    try:
        value = float(parameter)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise InvalidRequestError(f"`{name}` must be a number from {least:g} to {most:g}", hint=f"Leave {name} out.")
    return value


def environment(body: Mapping[str, Any]) -> dict[str, str]:
    """`env`, variables that can be set; raises as `text`."""
    env = strings(body, "env")
    if any(not name or "=" in name or "\0" in name + value for name, value in env.items()):
        raise InvalidRequestError(
            "`env` has what is no variable", hint="Names are not empty and have no =, and nothing has a null byte."
        )
    return env
