"""What sandboxes without a network reach: the operator's side of it, and each sandbox's door to the proxy."""

import asyncio
import ipaddress
import json
import logging
import os
import secrets
import ssl
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from warmcell.sandbox import guest_files
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import InvalidRequestError, WarmcellError
from warmcell.sandbox.models import NetworkPolicy
from warmcell.sandbox.network import addresses, names, socks
from warmcell.sandbox.network.connecting import Connector, Resolver, SystemResolver
from warmcell.sandbox.network.exchange import Exchange
from warmcell.sandbox.network.index import Index
from warmcell.sandbox.network.rules import Pattern, Rules, patterns
from warmcell.sandbox.network.socks import Through
from warmcell.sandbox.network.streams import Plain, Tally

if TYPE_CHECKING:
    from warmcell.sandbox.network.authority import Authority

log = logging.getLogger(__name__)
decisions = logging.getLogger("warmcell.egress")
"""One line of JSON for each decision."""

PORT: Final = 43128
"""Of the sandbox's loopback interface. It is the same for all, since copies have it in their environment."""
CONNECTIONS_MAX: Final = 64
"""Of one sandbox at a time; more wait."""
NAME_SERVERS_MAX: Final = 10
LOOKUPS_MAX: Final = 4
"""Names of one sandbox that are looked up at a time."""
LINES_PER_S: Final = 20
"""Of one sandbox in the log, so that none fills the disk."""
CERTIFICATES: Final = "authorities.pem"
"""In the run directory: what its programs trust."""

_TRUST = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "PIP_CERT",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
    "AWS_CA_BUNDLE",
)
_PROXY = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressBounds:
    """What the operator lets be asked for."""

    allowed: tuple[str, ...] = ("*",)
    principals: tuple[str, ...] = ()
    """The same for those who have tokens. Empty: their sandboxes reach nothing."""
    index: Index = field(default_factory=Index)


class Egress:
    """Of one keeper. Nothing is looked up, read or connected to before a sandbox asks."""

    def __init__(
        self,
        bounds: EgressBounds | None = None,
        *,
        resolver: Resolver | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Take the operator's word.

        Args:
            bounds: What may be asked for.
            resolver: Looks up names. None: as the host does.
            tls: To speak with servers whose requests are read. None: with the host's usual authorities.

        Raises:
            InvalidRequestError: A host in the bounds is none.
        """
        self.bounds = bounds or EgressBounds()
        self._allowed = patterns(self.bounds.allowed)
        self._principals = patterns(self.bounds.principals)
        self._index = self.bounds.index.patterns
        own = [(one.host, one.port or 443) for one in self._index if one.host]
        self.index_hosts = frozenset(host for host, _ in own)
        private = frozenset(own)
        self.connector = Connector(
            resolver or SystemResolver(),
            own=self.index_hosts,
            private=private if self.bounds.index.private else frozenset(),
        )
        self._tls = tls
        self._authorities: weakref.WeakValueDictionary[str, Authority] = weakref.WeakValueDictionary()

    @property
    def tls(self) -> ssl.SSLContext:
        """For servers whose requests are read."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
            if self.bounds.index.certificate is not None:
                self._tls.load_verify_locations(self.bounds.index.certificate)
        return self._tls

    def check(self, policy: NetworkPolicy, *, principal: str | None) -> NetworkPolicy:
        """The policy as it will hold.

        Args:
            policy: What is asked for.
            principal: Who asks, of those who have tokens.

        Raises:
            InvalidRequestError: It is not of its form, or more than the operator lets be asked for.
        """
        rules = self.rules(policy)
        within = self._allowed if principal is None else self._principals
        trait = "c.Warmcell.egress_allowed" if principal is None else "c.Warmcell.egress_principals"
        asked = [*patterns(policy.allow), *patterns(policy.headers), *(self._index if policy.packages else ())]
        texts = [*policy.allow, *policy.headers, *(["its package index"] * len(self._index))]
        for pattern, text in zip(asked, texts, strict=False):
            if not any(one.covers(pattern) for one in within):
                raise InvalidRequestError(
                    f"{text} cannot be reached from sandboxes here", hint=f"The operator says what can: {trait}."
                )
        self._check_ways(policy, within, trait)
        if policy.max_bytes is not None and policy.max_bytes < 0:
            raise InvalidRequestError("max_bytes cannot be below 0", hint="Leave it out for no cap.")
        return replace(policy, authority=policy.authority or secrets.token_hex(8)) if rules.reads_tls else policy

    @staticmethod
    def _check_ways(policy: NetworkPolicy, within: Sequence[Pattern], trait: str) -> None:
        """How it reaches what it reaches. Either would lead to other hosts than the operator allows, so it is one.

        Raises:
            InvalidRequestError: It is not of its form, or the operator does not let it be asked for.
        """
        ways = [(f"The name server {text}", _name_server(text)) for text in policy.name_servers]
        if len(ways) > NAME_SERVERS_MAX:
            raise InvalidRequestError(
                f"{len(ways)} name servers are too many", hint=f"Name {NAME_SERVERS_MAX} at most."
            )
        if policy.through is not None:
            Through.read(policy.through)
            ways.append(("The egress proxy", socks.pattern(policy.through)))
        for what, pattern in ways:
            if not any(one.covers(pattern) for one in within):
                raise InvalidRequestError(
                    f"{what} cannot be used from sandboxes here",
                    hint=f"The operator says what can be reached, these with their ports: {trait}.",
                )

    def rules(self, policy: NetworkPolicy) -> Rules:
        """The policy, read, with what the index needs; raises InvalidRequestError."""
        if not policy.packages:
            return Rules(policy)
        return Rules(policy, besides=self._index, secrets=self.bounds.index.headers)

    def authority(self, policy: NetworkPolicy) -> "Authority":
        """Of that policy and its copies. Blocks for some milliseconds the first time."""
        from warmcell.sandbox.network.authority import Authority  # Cryptography is loaded where it is used.

        known = self._authorities.get(policy.authority)
        if known is None:
            known = self._authorities[policy.authority] = Authority(policy.authority)
        return known

    def door(self, sandbox_id: str, policy: NetworkPolicy, tally: Tally) -> "Door":
        """A sandbox's door, which counts there; raises InvalidRequestError."""
        return Door(self, sandbox_id, policy, tally)


def _name_server(text: str) -> Pattern:
    """A name server, as policies name places; raises InvalidRequestError."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidRequestError(f"{text[:80]!r} is no name server", hint="Give its address, as in 1.1.1.1.") from None
    if (why := addresses.why_not(address)) is not None:
        raise InvalidRequestError(f"The name server {text} has {why}", hint="Name one of the public internet.")
    return Pattern.read(f"{address}:{names.PORT}" if address.version == 4 else f"[{address}]:{names.PORT}")


class Door:
    """Through which one sandbox reaches what it may, for as long as `serve` runs."""

    def __init__(self, egress: Egress, sandbox_id: str, policy: NetworkPolicy, tally: Tally) -> None:
        self._egress = egress
        self._sandbox_id = sandbox_id
        self.policy = policy
        self.rules = egress.rules(policy)
        self.tally = tally
        self.connector = egress.connector.of(policy)
        self.opened = asyncio.Event()
        """Set once programs in the sandbox can connect, or it is clear that they cannot."""
        self.authority: Authority | None = egress.authority(policy) if self.rules.reads_tls else None
        self.lookups = asyncio.Semaphore(LOOKUPS_MAX)
        self._room = asyncio.Semaphore(CONNECTIONS_MAX)
        self._second, self._lines, self._left_out = 0, 0, 0

    @property
    def tls(self) -> ssl.SSLContext:
        """To speak with hosts whose requests are read."""
        return self._egress.tls

    @property
    def max_bytes(self) -> int | None:
        """Most that may go through."""
        return self.policy.max_bytes

    def environment(self, run_directory: str) -> dict[str, str]:
        """What tells programs in the sandbox of the proxy.

        Args:
            run_directory: As they see it.
        """
        proxy = f"http://127.0.0.1:{PORT}"
        found = {each: proxy for name in _PROXY for each in (name, name.lower())}
        own = ["localhost", "127.0.0.1", "::1"]
        if self.policy.packages:
            found |= self._egress.bounds.index.variables()
            own = [host for host in own if host not in self._egress.index_hosts]
        found |= dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(own)) | {"NODE_USE_ENV_PROXY": "1"}
        if self._more_trusted:
            found |= dict.fromkeys(_TRUST, f"{run_directory}/{CERTIFICATES}")
        return found

    def trust(self, run_directory: Path) -> None:
        """Put what its programs trust where they find it. Blocks.

        Raises:
            ProtocolError: The guest is in the way.
        """
        if not self._more_trusted:
            return
        from warmcell.sandbox.network.authority import usual_certificates

        _ = self.tls  # Made once, here, since that reads a file.
        content = usual_certificates()
        certificate = self._egress.bounds.index.certificate
        if self.policy.packages and certificate is not None:
            content += b"\n" + certificate.read_bytes()
        if self.authority is not None:
            content += b"\n" + self.authority.pem
        path = run_directory / CERTIFICATES
        if path.is_symlink() or path.is_file():
            os.unlink(path)
        with guest_files.create(path) as file:
            file.write(content)

    async def serve(self, channel: GuestChannel) -> None:
        """Serve the sandbox until this is cancelled, or its guest is gone."""
        try:
            await channel.listen(PORT)
            self.opened.set()
            async with asyncio.TaskGroup() as group:
                while True:
                    await self._room.acquire()
                    taken = asyncio.Event()
                    group.create_task(self._one(channel, taken))
                    await taken.wait()
        except* WarmcellError as gone:
            log.info("sandbox %s reaches nothing now: %s", self._sandbox_id, gone.exceptions[0])
        finally:
            self.opened.clear()

    async def _one(self, channel: GuestChannel, taken: asyncio.Event) -> None:
        try:
            async with channel.accept(PORT) as (reader, writer):
                taken.set()
                try:
                    await Exchange(self, Plain(reader, writer)).serve()
                except Exception:  # One connection's trouble is no other's.
                    log.exception("sandbox %s: a connection failed", self._sandbox_id)
        finally:
            self._room.release()
            taken.set()

    def note(self, method: str, host: str, port: int, path: str, refused: str | None) -> None:
        """Count a decision and write it down."""
        if refused is None:
            self.tally.allowed += 1
        else:
            self.tally.refused += 1
        now = int(time.monotonic())
        if now != self._second:
            self._second, self._lines = now, 0
        self._lines += 1
        if self._lines > LINES_PER_S:
            self._left_out += 1
            return
        line: dict[str, Any] = {
            "sandbox": self._sandbox_id,
            "decision": "allowed" if refused is None else "refused",
            "method": method[:32],
            "host": host[:256],
            "port": port,
            "path": path,
            "why": refused or "",
            "sent_bytes": self.tally.sent_bytes,
            "received_bytes": self.tally.received_bytes,
        }
        if self._left_out:
            line["left_out"], self._left_out = self._left_out, 0
        decisions.info("%s", json.dumps(line))

    @property
    def _more_trusted(self) -> bool:
        return self.rules.reads_tls or (self.policy.packages and self._egress.bounds.index.certificate is not None)
