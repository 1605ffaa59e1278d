"""A kernel's process in a sandbox, and who speaks with it for its clients."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from warmcell.sandbox.models import StartedFrom


@dataclass
class KernelProcess:
    """One kernel of a sandbox: generation n is the n-th."""

    pid: int
    generation: int
    socket_prefix: Path
    """Host path; its sockets are `{prefix}-1` (shell) to `{prefix}-5` (heartbeat)."""
    started_from: StartedFrom
    token: str = ""
    """It was restored from a template and waits for `warmcell_after_restore_request` with this; empty: it is ready."""
    exit_code: int | None = None
    exited: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def alive(self) -> bool:
        return not self.exited.is_set()


@dataclass(slots=True)
class LeftKernel:
    """How a kernel was left that lives on without its clients, so that they can go on with it."""

    token: str
    record: Mapping[str, Any] = field(default_factory=dict)


class Frontend(Protocol):
    """Whoever speaks with a sandbox's kernel for its clients, who notice nothing of what happens behind it."""

    def record(self) -> Mapping[str, Any]:
        """What `go_on` needs to know of a kernel that was paused, also in another keeper; JSON-ready."""

    async def pause(self, *, token: str, offload: str = "") -> int:
        """Have the kernel get ready for a snapshot and leave it completely; requests wait from now on.

        Args:
            token: What it is to show when it was restored.
            offload: Also have it move what torch has on devices of that kind to the host's memory, until `go_on`.

        Returns:
            How many bytes it has moved.

        Raises:
            UnsupportedOperationError: A hook of its user's is against it, or what it has cannot be moved; the kernel is
                as before.
        """

    async def go_on(
        self,
        kernel: "KernelProcess",
        record: Mapping[str, Any],
        *,
        token: str,
        restored: bool,
        clone: bool,
        undone: bool = False,
    ) -> None:
        """Speak with this kernel from now on, once it has proved to be the one that was left.

        Args:
            kernel: Where its sockets are.
            record: Of when it was paused.
            token: What `pause` was given before its memory was saved.
            restored: It was brought back, so it takes entropy and environment anew.
            clone: It is a copy: the one that was saved may live on.
            undone: It is what it was earlier: nobody waits for what it says of requests of then.

        Raises:
            SnapshotError: It is not, or could not make itself ready.
        """

    async def undone(self) -> None:
        """The kernel goes back to an earlier moment: requests that it still works on are answered here."""

    async def sleep(self, record: Mapping[str, Any]) -> None:
        """There is no kernel for now: answer what needs none, and have it woken for the rest."""
