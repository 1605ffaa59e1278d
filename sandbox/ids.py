"""Names of things: twelve lower-case letters and digits, never used twice."""

import secrets
import string

from warmcell.sandbox.models import SandboxId, SnapshotId

_ALPHABET = string.ascii_lowercase + string.digits
LENGTH = 12


def new_sandbox_id() -> SandboxId:
    """For a new sandbox."""
    return SandboxId(_new())


def known_sandbox_id(text: str) -> SandboxId | None:
    """A sandbox's id that was read somewhere; None where it is of another form."""
    return SandboxId(text) if len(text) == LENGTH and set(text) <= {*_ALPHABET} else None


def new_snapshot_id() -> SnapshotId:
    """For a new snapshot."""
    return SnapshotId(_new())


def _new() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(LENGTH))
