"""Principals: who may use this keeper with a token, with which scopes and within which quota.

A token is shown once, when it is made; what is kept of it is its hash. It holds for this API alone.
"""

import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from warmcell.sandbox.errors import (
    BackendUnavailableError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    UnauthenticatedError,
)
from warmcell.sandbox.wire import Wire

log = logging.getLogger(__name__)

TOKEN_PREFIX = "wct_"  # noqa: S105 - how tokens begin, so that they are known where they leak
SECRET_BYTES = 32
FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")

SCOPES = {
    "read": "look at its own sandboxes and snapshots",
    "run": "make sandboxes, run code in them, end them",
    "snapshot": "snapshot, restore and fork them",
    "gpu": "ask for GPUs",
}
USUAL_SCOPES = ("read", "run", "snapshot", "gpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota(Wire):
    """What a principal may have at a time, or altogether. None: no cap of its own."""

    sandboxes: int | None = None
    cpus: float | None = None
    memory_bytes: int | None = None
    gpu_seconds: float | None = None
    """Altogether, of all its GPUs, since it was first known."""
    snapshot_bytes: int | None = None
    """Of what it has saved, on disk; who has as much takes no snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenInfo(Wire):
    """What is told about a token."""

    id: str
    principal: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None = None

    def is_expired(self, now: float) -> bool:
        """Whether its time is over."""
        return self.expires_at is not None and now >= self.expires_at


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept(Wire):
    """A token as it is on disk."""

    info: TokenInfo
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known(Wire):
    """A principal as it is on disk."""

    name: str
    quota: Quota = Quota()
    gpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _File(Wire):
    format: int
    principals: tuple[_Known, ...] = ()
    tokens: tuple[_Kept, ...] = ()


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever has shown a token, for one request."""

    name: str
    scopes: frozenset[str] = field(default_factory=frozenset)
    token_id: str | None = None
    """Of the token. None: a process of the user's own has named it."""

    def check(self, scope: str, what: str) -> None:
        """Raises ForbiddenError unless its token has this scope."""
        if scope not in self.scopes:
            raise ForbiddenError(
                f"This token may not {what}",
                hint=f"Use one that was made with `--scope {scope}`.",
                details={"scope": scope},
            )


class Principals:
    """All principals and tokens of one keeper, in one file that only its user can read."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        """Nothing is read yet; see `open`."""
        self._path = path
        self._now = now
        self._known: dict[str, _Known] = {}
        self._tokens: dict[str, _Kept] = {}
        self._broken: str | None = None
        self._spent: dict[str, float] = {}
        """GPU seconds of each, counted on without a lock."""
        self.unsaved = False
        """Whether something was charged that is not on disk."""
        self._changing = threading.Lock()
        """Held by whoever changes the file; in a thread where a loop must not wait for a disk."""

    def open(self) -> None:
        """Read the file. One that cannot be read lets nobody in, and is not written over."""
        try:
            kept = _File.from_json(json.loads(self._path.read_bytes()))
            if kept.format != FORMAT:
                raise ValueError(f"its format is {kept.format}, not {FORMAT}")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self._broken = f"{self._path} cannot be read: {error}"
            log.error("%s; no token is taken", self._broken)
            return
        self._known = {one.name: one for one in kept.principals}
        self._tokens = {one.info.id: one for one in kept.tokens}
        self._spent = {one.name: one.gpu_seconds for one in kept.principals}

    def create(
        self,
        name: str,
        *,
        scopes: Sequence[str] = USUAL_SCOPES,
        expires_in_s: float | None = None,
        quota: Quota | None = None,
    ) -> tuple[TokenInfo, str]:
        """Make a token, and its principal if that is new. Blocks for the disk, as do `revoke`, `remove` and `save`.

        Args:
            name: The principal's.
            scopes: What the token lets it do.
            expires_in_s: Seconds until the token is of no use. None: until it is revoked.
            quota: The principal's from now on, whatever token it uses. None: as it was; without any if it is new.

        Returns:
            What is told about the token, and the token itself, which is told nowhere else.

        Raises:
            InvalidRequestError: The name, a scope, the time or a quota is none.
            BackendUnavailableError: It cannot be kept.
        """
        self._check_whole()
        _check(name, scopes, expires_in_s, quota)
        with self._changing:
            return self._create(name, scopes, expires_in_s, quota)

    def _create(
        self, name: str, scopes: Sequence[str], expires_in_s: float | None, quota: Quota | None
    ) -> tuple[TokenInfo, str]:
        now, token_id, secret = self._now(), secrets.token_hex(4), secrets.token_urlsafe(SECRET_BYTES)
        while token_id in self._tokens:
            token_id = secrets.token_hex(4)
        token = f"{TOKEN_PREFIX}{token_id}_{secret}"
        info = TokenInfo(
            id=token_id,
            principal=name,
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            created_at=now,
            expires_at=None if expires_in_s is None else now + expires_in_s,
        )
        known = self._known.get(name, _Known(name=name))
        self._write(
            {**self._known, name: known if quota is None else replace(known, quota=quota)},
            {**self._tokens, token_id: _Kept(info=info, sha256=_hash(token))},
        )
        return info, token

    def find(self, token: str) -> Principal:
        """Whose token that is.

        Raises:
            UnauthenticatedError: Nobody's, or its time is over, or it was revoked.
        """
        kept = self._tokens.get(token_id(token))
        known = hmac.compare_digest(_hash(token), kept.sha256 if kept is not None else _hash(""))
        if kept is None or not known or kept.info.is_expired(self._now()):
            raise UnauthenticatedError(
                "This token is not valid",
                hint="`warmcell token create` makes one; it may have expired or been revoked.",
            )
        return Principal(kept.info.principal, frozenset(kept.info.scopes), kept.info.id)

    def holds(self, name: str, token_id: str | None) -> bool:
        """Whether what was made for that principal, with that token if with any, is still good."""
        if token_id is None:
            return name in self._known
        kept = self._tokens.get(token_id)
        return kept is not None and kept.info.principal == name and not kept.info.is_expired(self._now())

    def tokens(self) -> list[TokenInfo]:
        """All that were not revoked, also those whose time is over; the oldest first."""
        return sorted((one.info for one in self._tokens.values()), key=lambda info: (info.created_at, info.id))

    def names(self) -> list[str]:
        """Everybody who has or had a token, and was not removed."""
        return sorted(self._known)

    def quota(self, name: str) -> Quota:
        """What it may have; without any cap if nobody knows it."""
        known = self._known.get(name)
        return Quota() if known is None else known.quota

    def gpu_seconds(self, name: str) -> float:
        """What was charged to it so far."""
        return self._spent.get(name, 0.0)

    def charge(self, gpu_seconds: Mapping[str, float]) -> None:
        """Add to what each has had of GPUs; of nobody's when it was removed meanwhile. See `save`."""
        for name, more in gpu_seconds.items():
            if name in self._known and more > 0:
                self._spent[name] = self._spent.get(name, 0.0) + more
                self.unsaved = True

    def save(self) -> None:
        """Have on disk what was charged."""
        with self._changing:
            if not self.unsaved:
                return
            self.unsaved = False
            try:
                self._write(self._known, self._tokens)
            except BackendUnavailableError as error:
                self.unsaved = True
                log.error("what principals had of GPUs is not kept: %s", error)

    def revoke(self, token_id: str) -> TokenInfo:
        """That token is of no use from now on.

        Raises:
            NotFoundError: There is none of that id.
        """
        self._check_whole()
        with self._changing:
            kept = self._tokens.get(token_id)
            if kept is None:
                raise NotFoundError(f"There is no token {token_id}", hint="`warmcell token ls` lists them.")
            self._write(self._known, {one: token for one, token in self._tokens.items() if one != token_id})
        return kept.info

    def remove(self, name: str) -> list[str]:
        """Forget a principal with its quota, and revoke its tokens, whose ids are given. Idempotent."""
        self._check_whole()
        with self._changing:
            gone = [one.id for one in self.tokens() if one.principal == name]
            if gone or name in self._known:
                self._write(
                    {one: known for one, known in self._known.items() if one != name},
                    {one: token for one, token in self._tokens.items() if one not in gone},
                )
            self._spent.pop(name, None)
        return gone

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise BackendUnavailableError(
                self._broken, hint=f"Mend or remove {self._path}, then run `warmcell clean`: a keeper reads it once."
            )

    def _write(self, known: dict[str, _Known], tokens: dict[str, _Kept]) -> None:
        """On disk first: a token that was revoked stays so, whatever happens next."""
        principals = tuple(replace(one, gpu_seconds=self.gpu_seconds(one.name)) for one in known.values())
        kept = _File(format=FORMAT, principals=principals, tokens=tuple(tokens.values()))
        draft = self._path.with_name(f"{self._path.name}.new")
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(kept.to_json(), file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError as error:
            raise BackendUnavailableError(
                f"{self._path} cannot be written: {error.strerror}", hint="Make room on its disk."
            ) from error
        self._known, self._tokens = known, tokens


def bearer(headers: Mapping[str, str]) -> str | None:
    """The token of a principal that a request shows, if it shows one."""
    kind, _, token = headers.get("Authorization", "").partition(" ")
    token = token.strip()
    return token if kind.lower() in ("bearer", "token") and token.startswith(TOKEN_PREFIX) else None


def token_id(token: str) -> str:
    """The id of a token, which is a part of it."""
    return token.removeprefix(TOKEN_PREFIX).partition("_")[0]


def _hash(token: str) -> str:
    """A token is 256 random bits, so that one round of a plain hash tells nothing of it."""
    return hashlib.sha256(token.encode()).hexdigest()


def _check(name: str, scopes: Sequence[str], expires_in_s: float | None, quota: Quota | None) -> None:
    if not NAME.fullmatch(name) or name == "self":
        raise InvalidRequestError(
            f"{name!r} cannot be the name of a principal",
            hint="Up to 64 letters, digits and any of . _ @ -, beginning with a letter or digit; not `self`.",
        )
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise InvalidRequestError(
            f"{unknown[0]!r} is no scope" if unknown else "A token without any scope is of no use",
            hint=f"Scopes are {', '.join(SCOPES)}.",
        )
    if expires_in_s is not None and not 0 < expires_in_s < math.inf:
        raise InvalidRequestError("A token that has expired is of no use", hint="Give a time to come, in seconds.")
    caps = () if quota is None else quota.to_json().values()
    if any(cap is not None and not 0 <= cap < math.inf for cap in caps):
        raise InvalidRequestError("A quota is a number that is not negative", hint="Leave it out for no cap.")
