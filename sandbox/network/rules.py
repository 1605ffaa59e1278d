"""What a policy says to a host and a port. Pure."""

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import NetworkPolicy
from warmcell.sandbox.network.addresses import Address, Block, meant, meant_block
from warmcell.sandbox.wire import HIDDEN, Secret

USUAL_PORTS: Final = (80, 443)
PATTERNS_MAX: Final = 256
HEADERS_MAX: Final = 16
HEADER_MAX: Final = 8192
"""Characters of a header's value."""

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?")
HOPS: Final = frozenset(
    ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade")
)
"""Headers that are between two neighbours only."""
NOT_THEIRS: Final = HOPS | {"host", "content-length", "expect", "proxy-authorization", "proxy-authenticate"}


def read_host(text: str) -> "str | Address":
    """A host as it is compared: an address, or a name in lower case without a dot at its end.

    Raises:
        ValueError: It is neither; numbers that only some would take for an address are none.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        found = ipaddress.ip_address(bare)
    except ValueError:
        pass
    else:
        if (found.version == 6) != (bare is not text) or getattr(found, "scope_id", None):
            raise ValueError(f"{text[:80]!r} is no host")
        return found
    name = text.removesuffix(".").lower()
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            raise ValueError(f"{text[:80]!r} is no host") from None
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or _NUMBER.fullmatch(labels[-1]):
        raise ValueError(f"{text[:80]!r} is no host")
    return name


@dataclass(frozen=True, slots=True)
class Pattern:
    """One of a policy's hosts."""

    name: str = ""
    """Empty: any, or a block."""
    below: bool = False
    """Whether the names below it are meant, and not itself."""
    block: Block | None = None
    port: int | None = None

    @classmethod
    def read(cls, text: str) -> Self:
        """Raises InvalidRequestError."""
        host, colon, port = text.rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or (":" in host and not host.endswith("]")):
            host, port = text, ""
        if port and not (len(port) <= 5 and 0 < int(port) < 65536):
            raise _no_pattern(text)
        number = int(port) if port else None
        try:
            if host == "*":
                return cls(port=number)
            if "/" in host:
                return cls(block=meant_block(ipaddress.ip_network(host.strip("[]"))), port=number)
            below = host.startswith("*.")
            found = read_host(host[2:] if below else host)
            if isinstance(found, str):
                return cls(name=found, below=below, port=number)
            if below:
                raise ValueError
            return cls(block=meant_block(ipaddress.ip_network(found)), port=number)
        except ValueError:
            raise _no_pattern(text) from None

    def covers(self, other: Self) -> bool:
        """Whether whoever matches that one matches this one."""
        if self.port is not None and self.port != other.port:
            return False
        if self.block is not None:
            return other.block is not None and _subnet(other.block, self.block)
        if not self.name:
            return True
        if other.block is not None or not other.name:
            return False
        return self._has(other.name) or (self.below and other.below and other.name == self.name)

    @property
    def host(self) -> str:
        """The one host that is meant; empty where there are several."""
        if self.block is not None:
            return str(self.block[0]) if self.block.num_addresses == 1 else ""
        return "" if self.below else self.name

    def names(self, host: "str | Address") -> bool:
        """Whether that host is meant, whatever the port."""
        if self.block is not None:
            return not isinstance(host, str) and meant(host) in self.block
        return not self.name or (isinstance(host, str) and self._has(host))

    def _has(self, name: str) -> bool:
        return name.endswith("." + self.name) if self.below else name == self.name


def _subnet(inner: Block, outer: Block) -> bool:
    return inner.version == outer.version and inner[0] in outer and inner[-1] in outer


def patterns(texts: Iterable[str]) -> tuple[Pattern, ...]:
    """Those of a policy; raises InvalidRequestError."""
    found = tuple(Pattern.read(text) for text in texts)
    if len(found) > PATTERNS_MAX:
        raise InvalidRequestError(f"{len(found)} hosts are too many", hint=f"Name {PATTERNS_MAX} at most.")
    return found


class Rules:
    """A policy, read."""

    def __init__(
        self,
        policy: NetworkPolicy,
        *,
        besides: Sequence[Pattern] = (),
        secrets: Mapping[str, Mapping[str, Secret]] | None = None,
    ) -> None:
        """Read one.

        Args:
            policy: What was asked for.
            besides: More that is allowed.
            secrets: More headers that are added, by host.

        Raises:
            InvalidRequestError: It is not of its form.
        """
        self._allow = (*patterns(policy.allow), *besides)
        self._deny = patterns(policy.deny)
        self._headers: dict[tuple[str, int], dict[str, Secret]] = {}
        for text, headers in {**(secrets or {}), **policy.headers}.items():
            pattern = Pattern.read(text)
            if not pattern.name or pattern.below:
                raise InvalidRequestError(
                    f"Headers cannot go to {text!r}", hint="Name one host, as in api.example.com."
                )
            self._headers[pattern.name, pattern.port or 443] = _checked(headers)

    def why_not(self, host: "str | Address", port: int) -> str | None:
        """Why a host may not be reached; None: it may, if its addresses may."""
        if any(one.names(host) and one.port in (None, port) for one in self._deny):
            return "the host is denied"
        if isinstance(host, str) and (host, port) in self._headers:
            return None
        named = [one for one in self._allow if one.names(host)]
        if not named:
            return "the host is not allowed"
        if not any(port == one.port if one.port is not None else port in USUAL_PORTS for one in named):
            return f"port {port} is not allowed"
        return None

    def address_why_not(self, address: Address, port: int) -> str | None:
        """Why one of a host's addresses may not be reached, as blocks are denied by address, too."""
        if any(one.block is not None and one.names(address) and one.port in (None, port) for one in self._deny):
            return "a denied address"
        return None

    def headers(self, host: "str | Address", port: int) -> Mapping[str, Secret] | None:
        """What is to be added to https requests there; None: nothing, so they pass unread."""
        return self._headers.get((host, port)) if isinstance(host, str) else None

    @property
    def reads_tls(self) -> bool:
        """Whether there are hosts whose requests are read."""
        return bool(self._headers)


def known(headers: Mapping[str, Secret]) -> bool:
    """Whether these values are there, and do not merely stand for what was."""
    return HIDDEN not in headers.values()


def _checked(headers: Mapping[str, Secret]) -> dict[str, Secret]:
    if not 0 < len(headers) <= HEADERS_MAX:
        raise InvalidRequestError("A host has no headers, or too many", hint=f"Give it 1 to {HEADERS_MAX}.")
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name) or name.lower() in NOT_THEIRS:
            raise InvalidRequestError(f"{name[:80]!r} cannot be such a header", hint="As in Authorization.")
        if len(value) > HEADER_MAX or not _VALUE.fullmatch(value):
            raise InvalidRequestError(f"The value of {name} cannot be one", hint="Give printable ASCII on one line.")
    return {name.lower(): value for name, value in headers.items()}


def _no_pattern(text: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{text[:80]!r} is no host to allow or deny",
        hint='Write it as "pypi.org", "*.example.com", "example.com:8443" or "192.0.2.0/24".',
    )
