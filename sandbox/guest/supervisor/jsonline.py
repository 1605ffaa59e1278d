"""JSON lines without the `json` package, whose import of `re` and `enum` is dear here."""

from __future__ import annotations

import _json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Context:
    """What the C scanner wants to be told."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int

    def __init__(self) -> None:
        self.memo: dict[str, str] = {}

    @staticmethod
    def parse_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")


def decode(line: bytes) -> dict[str, Any]:
    """The object on one line.

    Raises:
        ValueError: It is not UTF-8, not JSON, or not an object.
    """
    text = line.decode("utf-8").strip()
    try:
        value, end = _json.make_scanner(_Context())(text, 0)  # type: ignore[arg-type]
    except (StopIteration, SystemError):
        # Python 3.11's scanner cannot raise JSONDecodeError while `json` is not imported.
        raise ValueError("not JSON") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if end != len(text) or not isinstance(value, dict):
        raise ValueError("not one JSON object")
    return value


def encode(value: Any) -> bytes:
    """`value` as one line, newline included."""
    return (_text(value) + "\n").encode("ascii")


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, str):
        return _json.encode_basestring_ascii(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(str(k))}: {_text(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(_text, value)) + "]"
