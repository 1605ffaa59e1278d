"""Jupyter's messages: frames, signatures, and a few messages of our own.

On the wire: `[route …] <IDS|MSG> signature header parent metadata content [buffer …]`.
"""

import collections
import datetime
import hmac
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from warmcell.kernel_provisioner.proxy.zmtp import Part

HISTORY: Final = 16 * 1024
"""How many signatures are remembered, so that none is taken twice."""

_DELIMITER: Final = b"<IDS|MSG>"
_PROTOCOL: Final = "5.4"


class MalformedMessageError(ValueError):
    """Frames that are not a Jupyter message; whoever reads drops them."""


@dataclass(slots=True)
class Message:
    """One message, as it came. Only what must be looked at is ever parsed."""

    route: list[bytes]
    signature: bytes
    header: Part
    parent: Part
    metadata: Part
    content: Part
    buffers: list[Part]
    answers: tuple[str, str] | None = None
    """What `read_parent` has found."""

    @property
    def signed(self) -> tuple[Part, ...]:
        """The frames that a signature covers."""
        return self.header, self.parent, self.metadata, self.content

    @property
    def size_bytes(self) -> int:
        """What its frames hold."""
        return sum(map(len, (*self.signed, *self.buffers)))

    def frames(self, signature: bytes) -> list[Part]:
        """All frames, with this signature."""
        return [*self.route, _DELIMITER, signature, *self.signed, *self.buffers]

    def mentions(self, kind: str) -> bool:
        """Whether its msg_type may be `kind`; so most messages need not be parsed."""
        return isinstance(self.header, bytes) and f'"{kind}"'.encode() in self.header

    def read_header(self) -> tuple[str, str]:
        """`msg_type` and `msg_id`.

        Raises:
            MalformedMessageError: The header has none.
        """
        header = _load(self.header)
        kind, name = header.get("msg_type"), header.get("msg_id")
        if not isinstance(kind, str) or not isinstance(name, str):
            raise MalformedMessageError("a header without msg_type and msg_id")
        return kind, name

    def read_parent(self) -> tuple[str, str]:
        """`msg_type` and `msg_id` of the request that this answers; empty if there is none."""
        if self.answers is None:
            parent = _load(self.parent)
            kind, name = parent.get("msg_type"), parent.get("msg_id")
            self.answers = kind if isinstance(kind, str) else "", name if isinstance(name, str) else ""
        return self.answers

    def read_content(self) -> dict[str, Any]:
        """The content, parsed; raises MalformedMessageError."""
        return _load(self.content)

    def read_metadata(self) -> dict[str, Any]:
        """The metadata, parsed, of which there are mostly none; raises MalformedMessageError."""
        return {} if self.metadata == b"{}" else _load(self.metadata)


class Signer:
    """Signs and checks with a connection's key. An empty key signs nothing and takes everything."""

    def __init__(self, key: bytes, scheme: str) -> None:
        self._mac = hmac.new(key, digestmod=scheme.removeprefix("hmac-")) if key else None
        self._seen: set[bytes] = set()
        self._order: collections.deque[bytes] = collections.deque()

    def sign(self, parts: Iterable[Part]) -> bytes:
        """The signature of these frames. Frames above 2 KiB are hashed with the GIL released."""
        if self._mac is None:
            return b""
        mac = self._mac.copy()
        for part in parts:
            mac.update(part)
        return mac.hexdigest().encode()

    def accepts(self, message: Message) -> bool:
        """Whether the message was signed with this key and has not been seen before."""
        if self._mac is None:
            return True
        if message.signature in self._seen or not hmac.compare_digest(message.signature, self.sign(message.signed)):
            return False
        self._seen.add(message.signature)
        self._order.append(message.signature)
        if len(self._order) > HISTORY:
            self._seen.discard(self._order.popleft())
        return True


class Author:
    """Makes messages that are the proxy's own."""

    def __init__(self) -> None:
        self.route = b"warmcell-" + secrets.token_hex(8).encode()
        """First frame of the route of our own requests, by which their answers are known."""
        self._session = secrets.token_hex(16)
        self._count = 0

    def make(self, kind: str, content: Mapping[str, Any], *, route: list[bytes] | None = None) -> tuple[str, Message]:
        """A message and its id."""
        self._count += 1
        name = f"{self._session}_{self._count}"
        header = {
            "msg_id": name,
            "msg_type": kind,
            "session": self._session,
            "username": "warmcell",
            "date": datetime.datetime.now(datetime.UTC).isoformat(),
            "version": _PROTOCOL,
        }
        head, body = json.dumps(header).encode(), json.dumps(dict(content)).encode()
        return name, Message(route or [], b"", head, b"{}", b"{}", body, [])

    def request(self, kind: str, content: Mapping[str, Any] | None = None) -> tuple[str, Message]:
        """A request of our own and its id; the answer comes back with our route."""
        return self.make(kind, content or {}, route=[self.route])

    def answer(self, kind: str, content: Mapping[str, Any], request: Message, *, to_asker: bool) -> Message:
        """A message in a kernel's place: to who asked, or to everybody."""
        _, made = self.make(kind, content, route=request.route if to_asker else None)
        made.parent = request.header
        return made

    def owns(self, name: str) -> bool:
        """Whether a message id is of one of ours."""
        return name.startswith(self._session)


def parse(parts: Sequence[Part]) -> Message:
    """Frames as a message.

    Raises:
        MalformedMessageError: They are none.
    """
    try:
        at = parts.index(_DELIMITER)
    except ValueError:
        raise MalformedMessageError("no delimiter") from None
    if len(parts) < at + 6:
        raise MalformedMessageError("too few frames")
    signature, header, parent, metadata, content, *buffers = parts[at + 1 :]
    return Message([bytes(each) for each in parts[:at]], bytes(signature), header, parent, metadata, content, buffers)


def cut_short(parts: Sequence[Part]) -> Message:
    """The first frames of a message as one without metadata, content and buffers.

    Raises:
        MalformedMessageError: They do not go as far as its parent.
    """
    if _DELIMITER not in parts or len(parts) < parts.index(_DELIMITER) + 4:
        raise MalformedMessageError("a message that is too large before it says what it is")
    return parse([*parts[: parts.index(_DELIMITER) + 4], b"{}", b"{}"])


def _load(part: Part) -> dict[str, Any]:
    try:
        loaded = json.loads(str(part, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(str(error)) from None
    if not isinstance(loaded, dict):
        raise MalformedMessageError("a frame that is not an object")
    return loaded
