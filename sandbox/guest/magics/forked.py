"""Ranks that are clones of this very kernel: `%%remote fork`.

The clone leaves the cell that has made it, and is then told to run its lines as any rank is: so they may await, are
interrupted and timed alike, and their output has a parent of its own. What they see is this kernel's memory.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..values import INHERITED
from .api import Api, KeeperError
from .run import Inbox, Run
from .sending import Load

REMOVE_TIMEOUT_S = 60.0

OF_RANKS = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS")
"""Variables that a clone may have inherited from a kernel that is a rank itself."""


class InCloneError(BaseException):
    """This is a clone, and its half of the cell ends here; no handler of the cell's is meant."""

    def _render_traceback_(self) -> list[str]:
        return []


class Clones:
    """The ranks of one cell, each in a sandbox of its own that goes with the cell."""

    replaced = False
    """What they were made from waits for the others, and is connected to them."""

    def __init__(self, api: Api, ids: Sequence[str], took_s: float) -> None:
        self.api = api
        self.ids = tuple(ids)
        self.ranks = len(self.ids)
        self.gpus_each = 0
        """Kernels with GPUs are not cloned."""
        self.store = Nothing()
        self.took_s = took_s
        """What it took to make them."""

    @property
    def place(self) -> str:
        """Where they are, in a few words."""
        return f"{self.ranks} clones of this kernel" if self.ranks > 1 else "a clone of this kernel"

    @property
    def devices(self) -> list[str]:
        """What each computes on."""
        return ["CPU"] * self.ranks

    def run(self, head: Mapping[str, Any], body: bytes, inbox: Inbox) -> Run:
        """As of a pod."""
        return self.api.run(self.ids[int(head["rank"])], head, body, inbox)

    def interrupt(self, rank: int) -> None:
        """As of a pod."""
        self.api.interrupt(self.ids[rank])

    def lose(self) -> None:
        """They are not used again in any case."""

    def close(self) -> None:
        """Remove them, all at once. They go also where the one who waits for that is interrupted."""
        work = [
            threading.Thread(target=self._remove, args=(one,), daemon=True, name="warmcell-clone-ends")
            for one in self.ids
        ]
        for one in work:
            one.start()
        deadline = time.monotonic() + REMOVE_TIMEOUT_S
        for one in work:
            one.join(max(0.0, deadline - time.monotonic()))

    def _remove(self, sandbox_id: str) -> None:
        with contextlib.suppress(KeeperError):
            self.api.delete(sandbox_id, timeout=REMOVE_TIMEOUT_S)


class Nothing:
    """What clones are sent."""

    sent = 0

    def lose(self, rank: int) -> None:
        """They have had nothing."""

    def missed(self, rank: int, names: Iterable[str]) -> None:
        """They are told of nothing that they should have."""


class Inheritance:
    """Stands for the parcel of what ranks need; an item of `each` is told by its number."""

    def load(self, rank: int, extra: Mapping[str, Any]) -> Load:
        """What this rank is to have before the cell."""
        if not extra:
            return Load(None, b"", {})
        none: dict[str, Any] = {"stream": None, "buffers": [], "held": {}, "modules": {}, "tags": {}}
        return Load({**none, "item": extra["index"]}, b"", {})

    def loaded(self, rank: int, load: Load) -> None:
        """The rank has it."""


def clones(api: Api, n: int, items: Sequence[Any], names: dict[str, Any]) -> Clones:
    """Fork this kernel, which has these variables, for a cell that is to work through these items, if there are any.

    Raises:
        InCloneError: In the clones.
        ForkError: There are none; it says why, and what to do.
        KeyboardInterrupt: There are none any more.
    """
    from ..kernel import forking, newborn

    if newborn.cuda_initialized():
        raise forking.ForkError(
            "This kernel has memory on a GPU, which clones cannot take along",
            "Leave out fork, so that the ranks have GPUs of their own and are sent what they read.",
            "unsupported",
        )
    began = time.perf_counter()
    if items:
        names[INHERITED] = items
    try:
        answer = forking.divide(n, secrets.token_hex(8), ranks=True)
    except BaseException:
        names.pop(INHERITED, None)
        raise
    if answer.get("rank") is None:
        names.pop(INHERITED, None)
        return Clones(api, answer["clones"], time.perf_counter() - began)
    for name in OF_RANKS:
        os.environ.pop(name, None)
    os.environ.update({str(name): str(value) for name, value in answer["env"].items()})
    raise InCloneError
