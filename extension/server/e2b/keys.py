"""Tokens that open one sandbox alone, and signatures of URLs: made from one key of the user's, so nothing is stored."""

import base64
import binascii
import hashlib
import hmac
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from warmcell.extension.keeper.gate import HEADER, TOKEN_HEADER
from warmcell.extension.keeper.secret import load_key
from warmcell.sandbox.errors import UnauthenticatedError

SIGNATURE = re.compile(r"v1_[A-Za-z0-9+/]{43}")
PATH_MAX = 4096
DIGESTS_MAX = 10_000
"""Of which one may be the signature that is shown; a tenth of a second."""

Purpose = Literal["envd", "traffic"]
Operation = Literal["read", "write"]


@dataclass(frozen=True, slots=True)
class Holder:
    """For whom a token opens a sandbox."""

    principal: str | None
    """None: the user."""
    token_id: str = ""
    """Of the principal's token that it was given out to, with which it ends. Empty: to the user."""

    def headers(self) -> dict[str, str]:
        """What tells the keeper so."""
        if self.principal is None:
            return {}
        return {HEADER: self.principal, **({TOKEN_HEADER: self.token_id} if self.token_id else {})}


@dataclass(frozen=True, slots=True)
class Keys:
    """Makes and checks them. `secret` is as good as every sandbox's token."""

    secret: bytes
    token_id: str = ""
    """Of the principal's token to whose holder they are given out. Empty: to the user."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """The key in that file, which is made if there is none; several processes may do so at once.

        Raises:
            OSError: It cannot be read or made.
        """
        return cls(load_key(path))

    def token(self, sandbox_id: str, principal: str | None, purpose: Purpose = "envd") -> str:
        """What opens that sandbox, for its files and processes or for what listens in it."""
        holder = Holder(principal, self.token_id if principal is not None else "")
        return self._token(sandbox_id, holder, purpose)

    def whose(self, token: str, sandbox_id: str, *purposes: Purpose) -> Holder:
        """For whom it opens that sandbox.

        Raises:
            UnauthenticatedError: It does not open that sandbox.
        """
        holder = _named(token)
        if holder is not None:
            for purpose in purposes:
                if hmac.compare_digest(
                    self._token(sandbox_id, holder, purpose).encode(), token.encode(errors="replace")
                ):
                    return holder
        raise UnauthenticatedError(
            "The token does not open this sandbox", hint="Create the sandbox, or connect to it, to have its token."
        )

    def gateway(self, sandbox_id: str, token_id: str, shown: str) -> str:
        """What is noted of the token that opens a sandbox's MCP gateway to whoever shows it.

        Args:
            sandbox_id: Of the sandbox.
            token_id: Of the principal's token with which the gateway was started, and with which that ends.
            shown: The gateway's own token.
        """
        said = "\0".join(("gateway", sandbox_id, token_id, shown))
        return f"{token_id}:{hmac.digest(self.secret, said.encode(errors='replace'), hashlib.sha256).hex()}"

    def signer(
        self, holders: Iterable[tuple[str, Holder]], signed: "SignedUrl", signature: str
    ) -> tuple[str, Holder] | None:
        """Which sandbox's of these, and who, has signed such a URL; None: nobody. Blocks.

        Raises:
            UnauthenticatedError: They are more than are tried for a caller of whom nothing is known.
        """
        if not SIGNATURE.fullmatch(signature) or len(signed.path) > PATH_MAX:
            return None
        for number, (sandbox_id, holder) in enumerate(holders):
            if number == DIGESTS_MAX:
                raise UnauthenticatedError(
                    "The URL does not say of which sandbox it is, and there are too many here",
                    hint="Send E2b-Sandbox-Id, or use the sandbox's own host.",
                )
            good = replace(self, token_id=holder.token_id).signature(sandbox_id, holder.principal, signed)
            if hmac.compare_digest(good.encode(), signature.encode()):
                return sandbox_id, holder
        return None

    def _token(self, sandbox_id: str, holder: Holder, purpose: Purpose) -> str:
        whose = holder.principal or ""
        said = "\0".join((purpose, sandbox_id, whose, *([holder.token_id] if holder.token_id else [])))
        proof = hmac.digest(self.secret, said.encode(), hashlib.sha256).hex()
        name = base64.urlsafe_b64encode(whose.encode()).decode().rstrip("=")
        return ".".join((f"wcs_{name}", *([holder.token_id] if holder.token_id else []), proof))

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


def _named(token: str) -> Holder | None:
    """For whom a token says it is; None where it is no token at all."""
    head, *rest = token.split(".")
    if len(rest) not in (1, 2) or not head.startswith("wcs_"):
        return None
    bare = head.removeprefix("wcs_")
    try:
        name = base64.urlsafe_b64decode(bare + "=" * (-len(bare) % 4)).decode()
    except (binascii.Error, ValueError):
        return None
    token_id = rest[0] if len(rest) == 2 else ""
    if "\0" in name or not re.fullmatch(r"[0-9a-f]*", token_id):
        return None
    return Holder(name or None, token_id)
