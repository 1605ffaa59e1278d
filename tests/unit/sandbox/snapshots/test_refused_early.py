"""A helper that refuses somebody before the request has come: its reason is told all the same."""

import json
import socket
from pathlib import Path

import pytest

from warmcell.sandbox.errors import CapacityError
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.snapshots.criu import CriuEngine


class Refusing:
    """Says why not and hangs up, as the helper does to a user with too many requests under way."""

    async def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        theirs.sendall(
            json.dumps({"ok": False, "code": "capacity", "message": "full", "hint": "Wait."}).encode() + b"\n"
        )
        theirs.close()
        return ours

    async def close(self) -> None:
        """There is nothing to end."""


async def test_a_refusal_is_told_though_the_request_could_not_be_sent(tmp_path: Path) -> None:
    """The reason, not that a pipe is broken."""
    engine = CriuEngine(paths=Paths(runtime=tmp_path, state=tmp_path, leases=tmp_path), helper=Refusing())
    with pytest.raises(CapacityError, match="full"):
        await engine.ask_itself()
    await engine.close()
