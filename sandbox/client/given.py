"""What callers of the SDK give, looked at before anything is sent: nothing is taken for what it was not meant to be."""

import os
from collections.abc import Iterable

from warmcell.sandbox.errors import InvalidRequestError


def as_bytes(data: object) -> bytes:
    """Bytes, or text in UTF-8.

    Raises:
        InvalidRequestError: It is neither: `bytes(5)` would be five zeros.
    """
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    if not isinstance(data, str):
        raise InvalidRequestError(
            f"Content must be bytes or text, not {type(data).__name__}", hint="Encode it first, as json.dumps does."
        )
    try:
        return data.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"The content is no text that can be sent: {error}", hint="Give bytes, or Unicode without lone surrogates."
        ) from error


def texts(name: str, value: object) -> list[str]:
    """Several texts, one by one.

    Raises:
        InvalidRequestError: It is one text, whose letters would be taken for them, or it has something else in it.
    """
    found = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else [None]
    if not all(isinstance(one, str) for one in found):
        raise InvalidRequestError(
            f"`{name}` must be a list of texts, not {str(value)[:80]!r}", hint=f'As in {name}=["…"].'
        )
    return [str(one) for one in found]


def arguments(argv: Iterable[object]) -> list[str]:
    """Those of a command, each by itself; paths and numbers are written out.

    Raises:
        InvalidRequestError: There are none, or one is a list or the like.
    """
    hint = 'Each argument by itself, as in box.exec("ls", "-l"); box.exec(*argv) for a list.'
    found: list[str] = []
    for one in argv:
        if isinstance(one, bool) or not isinstance(one, (str, int, float, os.PathLike)):
            raise InvalidRequestError(f"{one!r:.80} is no argument of a command", hint=hint)
        written = os.fspath(one) if isinstance(one, os.PathLike) else str(one)
        if not isinstance(written, str):
            raise InvalidRequestError(f"{one!r:.80} is no argument of a command", hint=hint)
        found.append(written)
    if not found:
        raise InvalidRequestError("There is no command", hint=hint)
    return found
