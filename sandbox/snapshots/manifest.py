"""What a snapshot's `manifest.json` says: all that a restore must know, with its own checksum.

The file is the point of truth: a directory or an image without one is no snapshot. It holds keys and environment
variables, so it is its owner's alone (0600, in a directory of 0700), and one that belongs to anybody else is refused.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmcell.sandbox.errors import (
    InvalidRequestError,
    SnapshotCorruptError,
    SnapshotIncompatibleError,
    WarmcellError,
)
from warmcell.sandbox.models import Mount, Parked, SandboxSpec, SnapshotInfo
from warmcell.sandbox.wire import Wire

FORMAT = 1
"""Written by this version, and the oldest that it reads."""

MANIFEST = "manifest.json"
MAX_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestIdentity(Wire):
    """What the kernel in the image is to its guest and its proxy."""

    socket_prefix: str = ""
    """Basename in the run directory of the sockets that the kernel has bound."""
    pid: int = 0
    """As the guest sees it."""
    generation: int = 0
    token: str = ""
    """The sentinel that the kernel must give back after a restore."""
    named: str = ""
    """The id from which its sandbox has its name as a host; empty in snapshots of earlier versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSummary(Wire):
    """What the writable layer was when it was saved."""

    entries: int = 0
    sha256: str = ""
    """Of the listing: names, kinds, owners, modes, sizes, times and link targets, not contents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(Wire):
    """One snapshot. What `commit` fills in (`uid`, `layer`, the layer's size) need not be given."""

    info: SnapshotInfo
    spec: SandboxSpec
    uid: int = -1
    """Its owner on this machine."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What a restore needs to be equal, as the engine said at the dump."""
    mounts: tuple[Mount, ...] = ()
    """What was mounted from the host, the workspace included."""
    gpus: tuple[str, ...] = ()
    """UUIDs of the GPUs that it held."""
    gpu_driver: str = ""
    parked: Parked | None = None
    """What of its memory was on GPUs, and has to go back there before its kernel goes on."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Identity of the Python environment that it ran from."""
    kernel: Mapping[str, Any] = field(default_factory=dict)
    """What the keeper needs to bring the kernel back to its clients, its connection's key included."""
    guest: GuestIdentity = field(default_factory=GuestIdentity)
    layer: LayerSummary = field(default_factory=LayerSummary)


def encode(manifest: Manifest) -> bytes:
    """The file's bytes."""
    body = manifest.to_json()
    envelope = {"format": FORMAT, "sha256": _digest(body), "manifest": body}
    return json.dumps(envelope, indent=1).encode("ascii") + b"\n"


def decode(data: bytes, *, where: str) -> Manifest:
    """Read the file's bytes; `where` names it in errors.

    Raises:
        SnapshotIncompatibleError: Another version of Warmcell wrote it.
        SnapshotCorruptError: It is not what was written.
    """
    try:
        envelope = json.loads(data)
        found, body, digest = envelope["format"], envelope["manifest"], envelope["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise corrupt(f"{where} cannot be read: {type(error).__name__}") from error
    if not isinstance(found, int) or isinstance(found, bool):
        raise corrupt(f"{where} has no format version")
    if found != FORMAT:
        raise SnapshotIncompatibleError(
            f"{where} has format {found}, this version of Warmcell reads {FORMAT}",
            hint="Use the version of Warmcell that made the snapshot, or remove it with `warmcell snapshots rm`.",
            details={"what": "format", "expected": FORMAT, "found": found},
        )
    if digest != _digest(body):
        raise corrupt(f"The checksum of {where} does not match")
    try:
        return Manifest.from_json(body)
    except InvalidRequestError as error:
        raise SnapshotIncompatibleError(
            f"{where} was written by another version of Warmcell: {error.message}",
            hint="Use the version of Warmcell that made the snapshot, or remove it with `warmcell snapshots rm`.",
            details={"what": "fields", "expected": "", "found": error.message},
        ) from error


def read(directory: Path) -> Manifest:
    """The manifest of the snapshot in `directory`. Blocks.

    Raises:
        SnapshotIncompatibleError: Another version, or another user, made it.
        SnapshotCorruptError: It is missing, or not what was written.
    """
    path = directory / MANIFEST
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise corrupt(f"{path} cannot be opened: {error.strerror}") from error
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise corrupt(f"{path} is not a file of ours")
        check_owner(found.st_uid, where=str(path))
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise corrupt(f"{path} may be read or written by others")
        try:
            data = file.read(MAX_BYTES)
        except OSError as error:
            raise corrupt(f"{path} cannot be read: {error.strerror}") from error
    manifest = decode(data, where=str(path))
    check_owner(manifest.uid, where=str(path))
    if manifest.info.id != directory.name:
        raise corrupt(f"{path} is of another snapshot, {manifest.info.id}")
    return manifest


def write(directory: Path, manifest: Manifest, *, durable: bool = True) -> None:
    """Put the manifest into `directory`, whole or not at all, and on the disk if `durable`. Blocks.

    Raises:
        OSError: It could not be written; the one before is as it was.
    """
    new = directory / f".{MANIFEST}"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(encode(manifest))
            file.flush()
            if durable:
                os.fsync(descriptor)
        os.rename(new, directory / MANIFEST)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Put a directory's entries on the disk. Blocks."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_owner(uid: int, *, where: str) -> None:
    """Refuse what is not this user's.

    Raises:
        SnapshotIncompatibleError: It belongs to somebody else.
    """
    if uid != os.getuid():
        raise SnapshotIncompatibleError(
            f"{where} belongs to user {uid}, not to {os.getuid()}",
            hint="A snapshot is used only by whom it was made for; remove it if it should not be there.",
            details={"what": "owner", "expected": os.getuid(), "found": uid},
        )


def corrupt(message: str) -> WarmcellError:
    """The error for a snapshot that is not what was written."""
    return SnapshotCorruptError(
        message, hint="Remove it with `warmcell snapshots rm`, and restore another snapshot or start afresh."
    )


def _digest(body: object) -> str:
    """Of the JSON in its one canonical form, so that white space does not count."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()
