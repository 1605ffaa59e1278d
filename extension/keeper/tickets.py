"""Tickets: one request of one sandbox, for whoever has the URL that they are in, until their time is over.

A ticket says in plain what it opens, and is signed with a key of the user's, so nothing is stored. It is good for one
method, one path and one file, for the sandbox of one principal; it ends with the token that it was made with.
"""

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from warmcell.extension.keeper.principals import Principal, Principals
from warmcell.extension.keeper.secret import load_key
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    ForbiddenError,
    InvalidRequestError,
    UnauthenticatedError,
)
from warmcell.sandbox.wire import Wire

HEADER: Final = "Warmcell-Ticket"
"""How a server shows a ticket to the keeper."""

ARGUMENT: Final = "ticket"
"""The parameter of a URL's query that a ticket is in."""

USUAL_S: Final = 3600.0
LONGEST_S: Final = 7 * 86400.0
SKEW_S: Final = 60.0
"""The clock that a ticket was made by may have been this far ahead of the one that it is checked by."""

AGAIN: Final = "Have the URL made again."
SIZE_MAX: Final = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket(Wire):
    """What one opens."""

    method: str
    path: str
    """Of the API, below its prefix; it names the sandbox."""
    file: str = ""
    """The one parameter of the query, `path`. Empty: there is none."""
    principal: str | None = None
    """For whom it is asked. None: for the user."""
    token_id: str | None = None
    """The token it was made with. None: by a process of the user's own."""
    made_at: float
    expires_at: float

    def check(self, method: str, path: str, query: Mapping[str, Sequence[str]]) -> None:
        """Raises ForbiddenError for another request than that for which it was made."""
        asked = {name: list(values) for name, values in query.items() if name != ARGUMENT}
        if (method, path) != (self.method, self.path) or asked != ({"path": [self.file]} if self.file else {}):
            raise ForbiddenError(
                "This URL was made for something else", hint="Use it as it was given, or have another made."
            )


class Tickets:
    """Makes and checks them."""

    def __init__(self, key: Path, principals: Principals, *, now: Callable[[], float] = time.time) -> None:
        """The file of the key is read, or made, when it is first needed."""
        self._path = key
        self._key: bytes | None = None
        self._principals = principals
        self._now = now

    def make(
        self, principal: Principal | None, method: str, path: str, *, file: str = "", expires_in_s: float = USUAL_S
    ) -> tuple[str, Ticket]:
        """A ticket as it is in a URL, and what it says.

        Args:
            principal: Who asks for it, and for whom it is good from then on.
            method: Of the request that it opens.
            path: Of the API, below its prefix.
            file: The file in a sandbox, for requests that name one.
            expires_in_s: Seconds that it is good for.

        Raises:
            InvalidRequestError: That is too long, or not at all.
            BackendUnavailableError: There is no key to sign with.
        """
        if not 0 < expires_in_s <= LONGEST_S:
            raise InvalidRequestError(
                "A URL is good for a week at most", hint=f"Give expires_in_s above 0 and up to {LONGEST_S:g}."
            )
        now = self._now()
        ticket = Ticket(
            method=method,
            path=path,
            file=file,
            principal=None if principal is None else principal.name,
            token_id=None if principal is None else principal.token_id,
            made_at=now,
            expires_at=now + expires_in_s,
        )
        said = json.dumps(ticket.to_json(), separators=(",", ":")).encode()
        return f"{_text(said)}.{_text(self._proof(said))}", ticket

    def read(self, text: str, *, over: bool = False) -> Ticket:
        """What a ticket says that holds.

        Args:
            text: As it is in a URL.
            over: Its own time may be over; its token's may not.

        Raises:
            UnauthenticatedError: It is none of ours, its time is over or has not come, or its token was revoked.
        """
        said, _, proof = text.partition(".")
        try:
            if len(text) > SIZE_MAX or not hmac.compare_digest(self._proof(_bytes(said)), _bytes(proof)):
                raise ValueError
            ticket = Ticket.from_json(json.loads(_bytes(said)))
        except (ValueError, InvalidRequestError) as error:
            raise UnauthenticatedError("This URL is not signed by this machine", hint=AGAIN) from error
        now = self._now()
        if now >= ticket.expires_at and not over:
            raise UnauthenticatedError("The time of this URL is over", hint=AGAIN)
        if now < ticket.made_at - SKEW_S:
            raise UnauthenticatedError("This URL is from the future: the clock was set back", hint=AGAIN)
        if ticket.principal is not None and not self._principals.holds(ticket.principal, ticket.token_id):
            raise UnauthenticatedError("The token that this URL was made with is not valid any more", hint=AGAIN)
        return ticket

    def _proof(self, said: bytes) -> bytes:
        if self._key is None:
            try:
                self._key = load_key(self._path)
            except OSError as error:
                raise BackendUnavailableError(
                    f"URLs cannot be signed: {error}", hint=f"Have {self._path} be a file of yours, or remove it."
                ) from error
        return hmac.digest(self._key, said, hashlib.sha256)


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    """Raises ValueError where that is not the one way in which bytes are written."""
    try:
        data = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError(str(error)) from error
    if _text(data) != text:
        raise ValueError("not as it was written")
    return data
