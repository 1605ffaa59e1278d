"""Files that say what root wrote, and checksums of others: nobody without the key can make or change either."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets

from warmcell.sandbox.helper.problems import corrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

READ_BYTES = 1 << 20


class Seals:
    """Made with a secret that is in a file of root's alone."""

    def __init__(self, path: str) -> None:
        self._key = _key(path)

    def read(self, path: str) -> dict[str, Any]:
        """What a sealed file says.

        Raises:
            HelperError: Its seal is not ours.
            FileNotFoundError: There is none.
        """
        said = unsealed(path)
        about = said.get("about")
        if not isinstance(about, dict) or not hmac.compare_digest(self._seal(about), str(said.get("seal"))):
            raise corrupt(f"{os.path.basename(path)} is not what was written")
        return about

    def write(self, path: str, about: Mapping[str, Any], *, durable: bool = True) -> None:
        """Write and seal, at once or not at all."""
        made = f"{path}.{secrets.token_hex(4)}"
        try:
            with open(made, "x") as file:
                file.write(json.dumps({"about": about, "seal": self._seal(about)}))  # `dump` takes far longer.
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.rename(made, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(made)
            raise

    def sign(self, said: Mapping[str, Any]) -> str:
        """What only this helper can write of something."""
        return self._seal(said)

    def is_signed(self, said: Mapping[str, Any], seal: object) -> bool:
        """Whether it was this helper that signed it."""
        return isinstance(seal, str) and hmac.compare_digest(self._seal(said).encode(), seal.encode())

    def _seal(self, about: Mapping[str, Any]) -> str:
        said = json.dumps(about, sort_keys=True, separators=(",", ":")).encode()
        return hmac.new(self._key, said, hashlib.sha256).hexdigest()


def unsealed(path: str) -> dict[str, Any]:
    """What a file says, whoever wrote it.

    Raises:
        HelperError: It is not even JSON.
    """
    try:
        with open(path, "rb") as file:
            said = json.load(file)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise corrupt(f"{os.path.basename(path)} cannot be read")
    return said


def checksum(path: str, *, length_bytes: int | None = None) -> str:
    """SHA-256 of a file, or of its first bytes."""
    found = hashlib.sha256()
    left = os.stat(path).st_size if length_bytes is None else length_bytes
    with open(path, "rb", buffering=0) as file:
        while left > 0 and (data := file.read(min(READ_BYTES, left))):
            found.update(data)
            left -= len(data)
    return found.hexdigest()


def identity(found: os.stat_result) -> list[int]:
    """What changes when a file does, or when another comes into its place."""
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def synced(path: str) -> None:
    """Put a file or a directory on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _key(path: str) -> bytes:
    """The secret, made once."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    made = f"{path}.{secrets.token_hex(4)}"
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, secrets.token_bytes(32))
        os.fsync(fd)
    finally:
        os.close(fd)
    with contextlib.suppress(FileExistsError):
        os.link(made, path)
    os.unlink(made)
    with open(path, "rb") as file:
        return file.read()
