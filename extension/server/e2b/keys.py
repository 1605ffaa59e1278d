"""Tokens that open one sandbox alone, and signatures of URLs: made from one key of the user's, so nothing is stored."""

import base64
import binascii
import hashlib
import hmac
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from warmcell.extension.keeper.secret import load_key
from warmcell.sandbox.errors import UnauthenticatedError

Purpose = Literal["envd", "traffic"]
Operation = Literal["read", "write"]


@dataclass(frozen=True, slots=True)
class Keys:
    """Makes and checks them. `secret` is as good as every sandbox's token."""

    secret: bytes

    @classmethod
    def load(cls, path: Path) -> Self:
        """The key in that file, which is made if there is none; several processes may do so at once.

        Raises:
            OSError: It cannot be read or made.
        """
        return cls(load_key(path))

    def token(self, sandbox_id: str, principal: str | None, purpose: Purpose = "envd") -> str:
        """What opens that sandbox, for its files and processes or for what listens in it."""
        whose = principal or ""
        said = "\0".join((purpose, sandbox_id, whose)).encode()
        proof = hmac.digest(self.secret, said, hashlib.sha256).hex()
        return f"wcs_{base64.urlsafe_b64encode(whose.encode()).decode().rstrip('=')}.{proof}"

    def whose(self, token: str, sandbox_id: str, *purposes: Purpose) -> str | None:
        """The principal whose sandbox it is; None for the user's own.

        Raises:
            UnauthenticatedError: It does not open that sandbox.
        """
        whose = _named(token)
        if whose is not None:
            for purpose in purposes:
                good = self.token(sandbox_id, whose or None, purpose)
                if hmac.compare_digest(good.encode(), token.encode()):
                    return whose or None
        raise UnauthenticatedError(
            "The token does not open this sandbox", hint="Create the sandbox, or connect to it, to have its token."
        )

    def signature(self, sandbox_id: str, principal: str | None, signed: "SignedUrl") -> str:
        """What a client that has the sandbox's token signs such a URL with."""
        parts = [signed.path, signed.operation, signed.user, self.token(sandbox_id, principal)]
        if signed.expires_at is not None:
            parts.append(str(signed.expires_at))
        digest = hashlib.sha256(":".join(parts).encode()).digest()
        return "v1_" + base64.b64encode(digest).decode().rstrip("=")


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedUrl:
    """What a signature is made of, besides the token."""

    path: str
    operation: Operation
    user: str = ""
    expires_at: int | None = None
    """Unix time, in seconds."""

    def check_time(self) -> None:
        """Raises UnauthenticatedError when its time is over."""
        if self.expires_at is not None and self.expires_at < time.time():
            raise UnauthenticatedError("signature is already expired")  # E2B's own words


def _named(token: str) -> str | None:
    """The principal that a token says it is of, empty for the user; None where it is no token at all."""
    head, dot, _ = token.partition(".")
    if not dot or not head.startswith("wcs_"):
        return None
    bare = head.removeprefix("wcs_")
    try:
        return base64.urlsafe_b64decode(bare + "=" * (-len(bare) % 4)).decode()
    except (binascii.Error, ValueError):
        return None
