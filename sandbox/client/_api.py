"""What both clients share: addresses, and how an answer is read. No I/O here."""

import ssl
from collections.abc import Mapping
from typing import Any

import httpx

from warmcell.sandbox import errors

BASE_URL = "http://keeper/warmcell/api/v1"
"""The host part is never looked up: the connection is a Unix socket."""

CONNECT_TIMEOUT_S = 30.0
READ_TIMEOUT_S = 120.0
TIMEOUT = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=None)
"""A kept connection is how the keeper knows that somebody still needs it."""


def no_certificates() -> ssl.SSLContext:
    """An empty context: there is no TLS on a Unix socket, and httpx's own one reads all the machine's certificates."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def timeout(seconds: float | None) -> httpx.Timeout:
    """The timeouts of one request: `seconds` for the answer, None for as long as it takes."""
    return httpx.Timeout(seconds, connect=CONNECT_TIMEOUT_S)


def read(response: httpx.Response) -> Any:
    """The JSON of an answer, None for an empty one.

    Raises:
        WarmcellError: The one that the answer stands for.
        ProtocolError: The answer is not of the keeper's form.
    """
    if response.is_success:
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise errors.ProtocolError(
                "The keeper answered something that is not JSON", hint="`warmcell clean` ends it; it starts on demand."
            ) from error
    raise failure(response.status_code, response.content)


def failure(status: int, body: bytes) -> errors.WarmcellError:
    """The error that an unsuccessful answer stands for."""
    try:
        data = httpx.Response(status, content=body).json()
    except ValueError:
        data = None
    if isinstance(data, Mapping) and "code" in data:
        return errors.from_json(data)
    return errors.ProtocolError(
        f"The keeper answered with status {status}",
        hint="keeper.log in the state directory says more; `warmcell clean` ends a keeper of another version.",
    )


def too_slow(method: str, path: str, seconds: float | None) -> errors.OperationTimeoutError:
    """No answer in time as one of ours."""
    return errors.OperationTimeoutError(
        f"The keeper did not answer {method} {path} within {seconds} s", hint="`warmcell ps` says what it does."
    )


def unreachable(error: httpx.TransportError) -> errors.TransportError:
    """A failed connection as one of ours."""
    return errors.TransportError(
        f"The keeper cannot be reached ({str(error) or 'the connection broke'})",
        hint="It is started on demand: try again; keeper.log in the state directory says why it ended.",
    )
