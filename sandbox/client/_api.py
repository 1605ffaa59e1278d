"""What both clients share: addresses, and how an answer is read. No I/O here."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from warmcell.sandbox import errors
from warmcell.sandbox.wire import Wire

BASE_URL = "http://keeper/warmcell/api/v1"
"""The host part is never looked up: the connection is a Unix socket."""

CONNECT_TIMEOUT_S = 30.0
READ_TIMEOUT_S = 120.0
TIMEOUT = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=None)
"""A kept connection is how the keeper knows that somebody still needs it."""


Told = TypeVar("Told", bound=Wire)
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Who:
    """The other side, as errors name it, and what helps when it does not answer as it should."""

    name: str
    gone: str
    odd: str
    slow: str
    refused: str


KEEPER = Who(
    "The keeper",
    gone="It is started on demand: try again; keeper.log in the state directory says why it ended.",
    odd="keeper.log in the state directory says more; `warmcell clean` ends a keeper of another version.",
    slow="`warmcell ps` says what it does.",
    refused="It serves its own user alone.",
)


def server(url: str) -> Who:
    """One that a caller has named."""
    right = "See that this is the URL of `warmcell serve`, or of JupyterLab's server with its base URL"
    return Who(
        f"The server at {url}",
        gone=f"{right}, and that it runs.",
        odd=f"{right}, and that nothing before it answers in its place.",
        slow="Try again; `warmcell ps` says there what it does.",
        refused="Give the one that it printed as it started, or one of `warmcell token create`.",
    )


def no_certificates() -> ssl.SSLContext:
    """An empty context: there is no TLS on a Unix socket, and httpx's own one reads all the machine's certificates."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def timeout(seconds: float | None) -> httpx.Timeout:
    """The timeouts of one request: `seconds` for the answer, None for as long as it takes."""
    return httpx.Timeout(seconds, connect=CONNECT_TIMEOUT_S)


def read(response: httpx.Response, who: Who = KEEPER) -> Any:
    """The JSON of an answer, None for an empty one.

    Raises:
        WarmcellError: The one that the answer stands for.
        ProtocolError: The answer is not of the keeper's form.
    """
    if response.is_success:
        try:
            return response.json() if response.content else None
        except (ValueError, RecursionError) as error:
            raise errors.ProtocolError(f"{who.name} answered something that is not JSON", hint=who.odd) from error
    raise failure(response.status_code, response.content, who)


def told(kind: type[Told], said: object, who: Who = KEEPER) -> Told:
    """What an answer tells of.

    Raises:
        ProtocolError: It is not of that form.
    """
    try:
        return kind.from_json(said)  # type: ignore[arg-type] # which it looks at
    except errors.InvalidRequestError as error:
        raise odd(who, error.message) from error


def field(said: object, name: str, kind: type[Value], who: Who = KEEPER) -> Value:
    """One field of an answer; raises ProtocolError where it is not there, or of another kind."""
    value = said.get(name) if isinstance(said, Mapping) else None
    if not isinstance(value, kind):
        raise odd(who, f"no {name!r} is in it")
    return value


def odd(who: Who, why: str) -> errors.ProtocolError:
    """The error for an answer that is none."""
    return errors.ProtocolError(f"{who.name} answered something of another form: {why}", hint=who.odd)


def failure(status: int, body: bytes, who: Who = KEEPER) -> errors.WarmcellError:
    """The error that an unsuccessful answer stands for."""
    try:
        data = httpx.Response(status, content=body).json()
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, Mapping) and "code" in data:
        return errors.from_json(data)
    if status in (401, 403):  # Jupyter's own words, which say no more.
        return errors.UnauthenticatedError(f"{who.name} does not take this token", hint=who.refused)
    return errors.ProtocolError(f"{who.name} answered with status {status}", hint=who.odd)


def too_slow(method: str, path: str, seconds: float | None, who: Who = KEEPER) -> errors.OperationTimeoutError:
    """No answer in time as one of ours."""
    return errors.OperationTimeoutError(f"{who.name} did not answer {method} {path} within {seconds} s", hint=who.slow)


def unreachable(error: httpx.RequestError, who: Who = KEEPER) -> errors.TransportError:
    """A failed connection as one of ours."""
    why = str(error) or "the connection broke"
    return errors.TransportError(f"{who.name} cannot be reached ({why})", hint=who.gone)
