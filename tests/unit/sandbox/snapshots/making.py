"""Snapshots to test with."""

import os
from pathlib import Path
from typing import Any

from warmcell.sandbox.models import SandboxId, SandboxSpec, SnapshotId, SnapshotInfo
from warmcell.sandbox.snapshots.manifest import Manifest
from warmcell.sandbox.snapshots.store import SnapshotStore, new_id

NOW = 1_800_000_000.0


class Clock:
    """A time of day that only the test moves."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def manifest(name: str = "", **info: Any) -> Manifest:
    """Of a kernel `k1` in a sandbox; a draft gives it its id."""
    known = {"id": SnapshotId(""), "name": name, "sandbox_id": SandboxId("a" * 12), "kernel_id": "k1"}
    told = SnapshotInfo(**{**known, "created_at": NOW, **info})
    return Manifest(info=told, spec=SandboxSpec(python="/usr/bin/python3"), kernel={"key": "secret"})


async def add(store: SnapshotStore, name: str = "", *, content: bytes = b"", **info: Any) -> SnapshotId:
    """Commit one with a file in its layer."""
    async with store.draft(new_id()) as draft:
        (draft.layer / "file").write_bytes(content or name.encode())
        await draft.commit(manifest(name, **info), durable=False)
    return draft.id


def hostile(layer: Path) -> None:
    """What a guest might leave: odd names, links to elsewhere, holes, pipes, what nobody may read."""
    top = os.fsencode(layer)
    os.mkdir(top + b"/\xff\n\x1b[31m")
    (layer / "deep").mkdir()
    (layer / "deep" / "data").write_bytes(os.urandom(200_000))
    os.symlink("/etc/passwd", layer / "link")
    os.symlink("..", layer / "deep" / "up")
    os.mkfifo(layer / "pipe")
    with open(layer / "hole", "wb") as file:
        file.seek(10**12)
        file.write(b"end")
    (layer / "locked").write_text("secret")
    (layer / "locked").chmod(0)
    (layer / "closed").mkdir()
    (layer / "closed" / "inside").write_text("here")
    os.setxattr(layer / "deep", "user.note", b"\0\xff")
    os.utime(layer / "deep" / "data", ns=(1, 1_234_567_890_123_456_789))
