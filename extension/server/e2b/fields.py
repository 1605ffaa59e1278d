"""Strict reading of what clients send: JSON objects, in protobuf's JSON form where they are messages.

Unknown fields are left alone, so that a newer client can say more than is known here. Names may be lowerCamel or as in
the schema; null is as good as absent.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from warmcell.sandbox.errors import InvalidRequestError

UINT32_MAX: Final = 2**32 - 1
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_object(data: bytes, *, max_bytes: int) -> "Fields":
    """The JSON object in a body; an empty body is an empty object.

    Raises:
        InvalidRequestError: It is something else, names a field twice, or is larger than that.
    """
    if len(data) > max_bytes:
        raise InvalidRequestError("The request is too large", hint=f"At most {max_bytes} bytes of JSON.")
    try:
        value = json.loads(data or b"{}", object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except InvalidRequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"The request is not JSON: {error}", hint="Send one JSON object.") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("The request is not a JSON object", hint="Send one JSON object.")
    return Fields(value)


class Fields:
    """One object, read field by field. Each reader raises InvalidRequestError where a value is of another kind."""

    def __init__(self, value: Mapping[str, Any], where: str = "") -> None:
        self._value = value
        self._where = where

    def has(self, name: str) -> bool:
        """Whether it is given."""
        return self._get(name) is not None

    def given(self, name: str) -> bool:
        """Whether it is given, and says something: not empty, 0 or false."""
        return bool(self._get(name))

    def text(self, name: str, *, most: int = 2**20) -> str:
        """Text; empty if it is absent."""
        value = self._get(name, "")
        if not isinstance(value, str):
            raise self._not(name, "text")
        if len(value) > most:
            raise InvalidRequestError(f"{self._place(name)} is longer than {most} characters", hint="Shorten it.")
        return self._unicode(name, value)

    def whole(self, name: str, *, most: int = UINT32_MAX) -> int | None:
        """A whole number, 0 or more; as protobuf has it also in quotes."""
        value = self._get(name)
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self._not(name, f"a whole number from 0 to {most}")
        return value

    def flag(self, name: str) -> bool | None:
        """True, false, or None where it is absent."""
        value = self._get(name)
        if value is not None and not isinstance(value, bool):
            raise self._not(name, "true or false")
        return value

    def data(self, name: str) -> bytes | None:
        """Bytes, base64 of either alphabet, padded or not."""
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self._not(name, "base64")
        text = value.replace("-", "+").replace("_", "/")
        if not _BASE64.fullmatch(text):
            raise self._not(name, "base64")
        bare = text.rstrip("=")
        try:
            return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
        except binascii.Error:
            raise self._not(name, "base64") from None

    def texts(self, name: str) -> Sequence[str]:
        """A list of texts."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._not(name, "a list of texts")
        return [self._unicode(name, item) for item in value]

    def numbers(self, name: str, *, most: int) -> list[int]:
        """A list of whole numbers, 0 or more."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= most for item in value):
            raise self._not(name, f"a list of whole numbers from 0 to {most}")
        return list(value)

    def mapping(self, name: str) -> dict[str, str]:
        """An object of texts."""
        value = self._get(name, {})
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise self._not(name, "an object of texts")
        return {self._unicode(name, key): self._unicode(name, item) for key, item in value.items()}

    def message(self, name: str) -> "Fields | None":
        """An object within this one."""
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._not(name, "an object")
        return Fields(value, self._place(name))

    def lists(self, name: str) -> dict[str, "list[Fields]"]:
        """An object of lists of objects."""
        value = self._get(name, {})
        if not isinstance(value, dict) or not all(
            isinstance(items, list) and all(isinstance(item, dict) for item in items) for items in value.values()
        ):
            raise self._not(name, "an object of lists of objects")
        where = self._place(name)
        return {key: [Fields(item, f"{where}.{key}") for item in items] for key, items in value.items()}

    def one_of(self, *names: str) -> str:
        """Which of these is given.

        Raises:
            InvalidRequestError: None is, or several are.
        """
        given = [name for name in names if self.has(name)]
        if len(given) != 1:
            raise InvalidRequestError(
                f"{self._where or 'The request'} must have one of {', '.join(names)}", hint="Give exactly one."
            )
        return given[0]

    def _get(self, name: str, absent: Any = None) -> Any:
        value = self._value.get(name)
        if value is None:
            value = self._value.get(re.sub("[A-Z]", lambda letter: "_" + letter[0].lower(), name))
        return absent if value is None else value

    def _unicode(self, name: str, value: str) -> str:
        """It, unless it cannot be sent on."""
        if _SURROGATE.search(value):
            raise InvalidRequestError(f"{self._place(name)} is not Unicode text", hint="Send no lone surrogates.")
        return value

    def _place(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def _not(self, name: str, kind: str) -> InvalidRequestError:
        return InvalidRequestError(f"{self._place(name)} must be {kind}", hint=f"Give {kind}.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InvalidRequestError("The request names a field twice", hint="Give each field once.")
    return found


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number")
    return number
