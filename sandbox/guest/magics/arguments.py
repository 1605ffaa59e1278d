"""The line of `%%remote`: `key=value` words, read without evaluating anything."""

from __future__ import annotations

import difflib
import itertools
import keyword
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

RANKS_MAX = 32
"""Kernels of one fan-out."""

ITEMS_MAX = 1_000_000
"""Of one work queue: what a generator without an end gives is refused rather than waited for."""

KEYS: Mapping[str, str] = {
    "gpu": "a GPU for each rank, as in gpu=A100, gpu=H100:2, gpu=24GiB, gpu=any; gpu=none where there is a default",
    "n": f"how many ranks run the cell, as in n=4; with gpu= also n=max; at most {RANKS_MAX}",
    "send": "variables to send besides those that the cell reads, as in send=data,model",
    "get": "variables to bring back, as in get=loss; from several ranks, lists",
    "as": "a name for the value of the cell's last line, as in as=result",
    "session": "a name for sandboxes with variables of their own, as in session=train",
    "fork": "each rank is a clone of this very kernel, as it is; nothing is sent, and they go with the cell",
    "each": "a variable whose items are worked through, each as `item`, as in each=files",
    "timeout": "after how long the cell is stopped, as in timeout=90, timeout=15m, timeout=2h",
    "detach": "go on here while it runs; %remote says what can be done with it",
    "image": "an image that the sandbox is made of, as in image=train",
    "memory": "most memory of each rank, as in memory=8GiB",
}
"""What can be said, each with its meaning and an example."""

FLAGS = ("detach", "fork")

UNSET = ("gpu", "timeout", "image", "memory")
"""Keys for which `none` says that there is none, whatever is usual."""

WITH_FORK: Mapping[str, str] = {
    "gpu": "clones have what this kernel has; without fork each rank has a GPU",
    "send": "clones have all variables already",
    "session": "clones go with their cell",
    "image": "clones are in what this kernel is in",
    "memory": "clones have the cap that this kernel has",
}
"""What cannot be said together with `fork`, and why."""

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)?")
_SECONDS = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?", re.IGNORECASE)
_FACTOR = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SESSION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class ArgumentError(ValueError):
    """The line cannot be understood; the message says what can be written instead."""


class Arguments(NamedTuple):
    """What a `%%remote` line says."""

    gpu: str | None = None
    n: int = 1
    """0: as many as there are GPUs free."""
    send: tuple[str, ...] = ()
    get: tuple[str, ...] = ()
    result: str = ""
    session: str = ""
    fork: bool = False
    each: str = ""
    timeout_s: float | None = None
    detach: bool = False
    image: str | None = None
    memory_bytes: int | None = None


def parse(line: str, defaults: Mapping[str, object] | None = None) -> Arguments:
    """Read the line.

    Args:
        line: What stands behind `%%remote`.
        defaults: Values, as they would be written, of keys that it does not have.

    Raises:
        ArgumentError: It is malformed, or has an unknown or repeated key.
    """
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        raise ArgumentError(f"{error}: {line.strip()}") from None
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and key not in FLAGS:
            raise ArgumentError(f"{word!r} is no key=value.{near(word, KEYS)} {usage()}")
        if key not in KEYS:
            raise ArgumentError(f"{key}= is no key.{near(key, KEYS)} {usage()}")
        if key in given:
            raise ArgumentError(f"{key}{equals} is given twice")
        if equals and key in FLAGS:
            raise ArgumentError(f"{key} has no value: {KEYS[key]}")
        if equals and not value:
            raise ArgumentError(f"{key}= has no value: {KEYS[key]}")
        given[key] = value
    return read(given, defaults)


def read(given: Mapping[str, str], defaults: Mapping[str, object] | None = None) -> Arguments:
    """Understand what is said, each key as it would be written; raises as `parse`, which has the defaults."""
    given = dict(given)
    try:
        usual = strings(defaults or {})
        for key in [key for key in UNSET if given.get(key) == "none"]:
            del given[key]
            usual.pop(key, None)
        if "fork" in given:  # What is usual for other ranks does not hold for clones.
            usual = {key: value for key, value in usual.items() if key not in WITH_FORK}
            for key in given:
                if key in WITH_FORK:
                    raise ArgumentError(f"{key}= cannot be said with fork: {WITH_FORK[key]}")
            if given.get("n") == "max":
                raise ArgumentError("n=max is for GPUs; say how many clones, as in fork n=4")
        elif "fork" in usual and any(key in WITH_FORK for key in given):
            del usual["fork"]
        return _arguments({**usual, **given})
    except ArgumentError as error:
        blamed = str(error).partition("=")[0]
        where = "" if blamed in given else f" (from {_SOURCE})"
        raise ArgumentError(f"{error}{where}") from None


_SOURCE = "c.Warmcell.remote, or the notebook's metadata"


def strings(defaults: Mapping[str, object]) -> dict[str, str]:
    """Values as they would be written; those that say nothing are left out.

    Raises:
        ArgumentError: There is no such key.
    """
    found = {}
    for key, value in defaults.items():
        if key not in KEYS:
            raise ArgumentError(f"{key}= is no key.{near(key, KEYS)}")
        if value is not None and value is not False and value != "":
            found[key] = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return found


def _arguments(given: Mapping[str, str]) -> Arguments:
    result = _names("as", given)
    each = _names("each", given)
    for key, names in (("as", result), ("each", each)):
        if len(names) > 1:
            raise ArgumentError(f"{key}={given[key]}: one name is needed; {KEYS[key]}")
    session = given.get("session", "")
    if session and not _SESSION.fullmatch(session):
        raise ArgumentError(f"session={session}: letters, digits, dots, dashes and underscores make a name")
    return Arguments(
        gpu=given.get("gpu"),
        n=_count(given),
        send=_names("send", given),
        get=_names("get", given),
        result=result[0] if result else "",
        session=session,
        fork="fork" in given,
        each=each[0] if each else "",
        timeout_s=_time(given),
        detach="detach" in given,
        image=given.get("image"),
        memory_bytes=_size(given),
    )


def usage() -> str:
    """All keys, in a sentence."""
    known = ", ".join(key if key in FLAGS else f"{key}=" for key in KEYS)
    return f"There is {known}; %%remote? explains them."


def table() -> str:
    """All keys with their meaning, a line each."""
    lines = []
    for key, about in KEYS.items():
        meaning, _, example = about.partition(", as in ")
        lines.append(f"{key:8} {meaning}" + (f"\n{'':8}     {example}" if example else ""))
    return "\n".join(lines)


def check_known(key: str, names: Sequence[str], namespace: Mapping[str, object]) -> None:
    """Raise ArgumentError for the first of `names` that is no variable in `namespace`."""
    for name in names:
        if name not in namespace:
            known = [other for other in namespace if not other.startswith("_")]
            raise ArgumentError(f"{key}={name}: there is no variable {name}.{near(name, known)}")


def items_of(name: str, namespace: Mapping[str, object]) -> list[Any]:
    """What is in the variable `name`, where that is not empty.

    Raises:
        ArgumentError: There is no such variable, it has no items, or more than `ITEMS_MAX`.
    """
    if not name:
        return []
    check_known("each", (name,), namespace)
    value: Any = namespace[name]
    try:
        items = iter(value)
    except TypeError:
        kind = type(value).__name__
        raise ArgumentError(f"each={name}: {name} has no items, it is of type {kind}; {KEYS['each']}") from None
    return bounded(items, f"each={name}: {name}")


def bounded(items: Iterable[Any], who: str) -> list[Any]:
    """All of them; raises ArgumentError where they may have no end."""
    found = list(itertools.islice(items, ITEMS_MAX + 1))
    if len(found) > ITEMS_MAX:
        raise ArgumentError(f"{who} has more than {ITEMS_MAX:,} items. Take them in parts, as with itertools.islice")
    return found


def near(word: str, known: Iterable[str]) -> str:
    """A question whether the nearest of `known` was meant; empty where none is near."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def _count(given: Mapping[str, str]) -> int:
    text = given.get("n", "1")
    if text == "max":
        if "gpu" not in given:
            raise ArgumentError("n=max means all GPUs that are free, so say which: gpu=any n=max")
        return 0
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= RANKS_MAX:
        raise ArgumentError(f"n={text}: ranks are counted from 1 to {RANKS_MAX}; {KEYS['n']}")
    return int(text)


def _time(given: Mapping[str, str]) -> float | None:
    text = given.get("timeout")
    if text is None:
        return None
    found = _TIME.fullmatch(text)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not 0 < seconds < math.inf:
        raise ArgumentError(f"timeout={text} is no time; {KEYS['timeout']}")
    return seconds


def _size(given: Mapping[str, str]) -> int | None:
    text = given.get("memory")
    if text is None:
        return None
    found = _SIZE.fullmatch(text)
    if found is None or float(found[1]) <= 0:
        raise ArgumentError(f"memory={text} is no amount of memory; {KEYS['memory']}")
    return int(float(found[1]) * _FACTOR[found[2].upper()])


def _names(key: str, given: Mapping[str, str]) -> tuple[str, ...]:
    if key not in given:
        return ()
    names = [name.strip() for name in given[key].split(",")]
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ArgumentError(f"{key}={given[key]}: {name!r} is no name of a variable; {KEYS[key]}")
    return tuple(dict.fromkeys(names))
