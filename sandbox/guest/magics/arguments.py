"""The line of `%%remote`: `key=value` words, read without evaluating anything."""

from __future__ import annotations

import difflib
import keyword
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

KEYS: Mapping[str, str] = {
    "gpu": "a GPU, as in gpu=A100, gpu=H100:2, gpu=24GiB, gpu=any",
    "send": "variables that the cell needs, as in send=data,model",
    "get": "variables to bring back, as in get=loss",
}
"""What can be said, each with its meaning and an example."""


class ArgumentError(ValueError):
    """The line cannot be understood; the message says what can be written instead."""


class Arguments(NamedTuple):
    """What a `%%remote` line says."""

    gpu: str | None = None
    send: tuple[str, ...] = ()
    get: tuple[str, ...] = ()


def parse(line: str) -> Arguments:
    """Read the line.

    Raises:
        ArgumentError: It is malformed, or has an unknown or repeated key.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ArgumentError(f"{error}: {line.strip()}") from None
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ArgumentError(f"{word!r} is no key=value.{_near(word, KEYS)} {usage()}")
        if key not in KEYS:
            raise ArgumentError(f"There is no {key}=.{_near(key, KEYS)} {usage()}")
        if key in given:
            raise ArgumentError(f"{key}= is given twice")
        if not value:
            raise ArgumentError(f"{key}= has no value: {KEYS[key]}")
        given[key] = value
    return Arguments(given.get("gpu"), _names("send", given), _names("get", given))


def usage() -> str:
    """All keys, in a sentence."""
    return "Keys are " + "; ".join(KEYS.values()) + "."


def check_known(names: Sequence[str], namespace: Mapping[str, object]) -> None:
    """Raise ArgumentError for the first of `names` that is no variable in `namespace`."""
    for name in names:
        if name not in namespace:
            known = [other for other in namespace if not other.startswith("_")]
            raise ArgumentError(f"send={name}: there is no variable {name}.{_near(name, known)}")


def _names(key: str, given: Mapping[str, str]) -> tuple[str, ...]:
    if key not in given:
        return ()
    names = [name.strip() for name in given[key].split(",")]
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ArgumentError(f"{key}={given[key]}: {name!r} is no name of a variable; {KEYS[key]}")
    return tuple(dict.fromkeys(names))


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""
