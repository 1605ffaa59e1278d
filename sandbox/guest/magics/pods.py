"""Sandboxes that are kept warm for remote cells: one for each kind that was asked for, with all its ranks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .api import ANSWER_TIMEOUT_S, Api, KeeperError
from .arguments import RANKS_MAX, Arguments
from .run import Inbox, Run
from .store import Store

EXIT_TIMEOUT_S = 2.0

GONE = ("sandbox_not_found", "not_found", "conflict")
"""Codes that say that a kept sandbox is no more."""


class Kind(NamedTuple):
    """What tells one kept sandbox from another."""

    gpu: str | None
    n: int
    session: str
    image: str | None
    memory_bytes: int | None


class BusyError(Exception):
    """A sandbox runs another cell."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class Pod:
    """A sandbox whose kernels are the ranks of a fan-out: they share its network, shared memory and devices."""

    replaced = True

    def __init__(self, api: Api, info: Mapping[str, Any], ranks: int, limit: int) -> None:
        self.api = api
        self.id = str(info["id"])
        self.info = info
        self.ranks = ranks
        self.store = Store(api, self.id, limit)
        self.busy_with = ""
        """What runs in it; empty while nothing does."""
        self.lost = False
        """Nobody knows what it is doing, so nothing runs there any more."""

    @property
    def place(self) -> str:
        """Where it is, in a few words."""
        what = _device(self.gpus)
        open_ = "" if self.info.get("isolated", True) else ", not isolated"
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        return f"sandbox {self.id} on {what}{ranks}{open_}"

    @property
    def gpus(self) -> list[Mapping[str, Any]]:
        """Those that all its ranks share out among them, in their order."""
        return list(self.info.get("gpus") or [])

    @property
    def devices(self) -> list[str]:
        """What each rank computes on, in a few words."""
        each = self.gpus_each
        return [_device(self.gpus[rank * each : (rank + 1) * each]) for rank in range(self.ranks)]

    @property
    def gpus_each(self) -> int:
        """GPUs that each rank has."""
        return len(self.gpus) // self.ranks

    def lose(self) -> None:
        """No cell goes there any more."""
        self.lost = True

    def keep(self, assigned: Mapping[str, object]) -> None:
        """A cell has run that may have assigned these, which are this here."""
        for rank in range(self.ranks):
            self.store.theirs.setdefault(rank, {}).update(assigned)

    def run(self, head: Mapping[str, Any], body: bytes, inbox: Inbox) -> Run:
        """A cell that is to run on the rank that `head` names; what comes of it goes into `inbox`."""
        return self.api.run(self.id, head, body, inbox)

    def interrupt(self, rank: int) -> None:
        """Interrupt what runs on that rank."""
        self.api.interrupt(self.id, rank)


class Pods:
    """All of one notebook."""

    def __init__(self, connect: Callable[[], Api]) -> None:
        """Ask whoever `connect` finds when the first is needed."""
        self._connect = connect
        self._api: Api | None = None
        self._settings: Mapping[str, Any] | None = None
        self._warm: dict[Kind, Pod] = {}
        self._lock = threading.Lock()

    @property
    def api(self) -> Api:
        """Whom to ask; found when that is first needed."""
        if self._api is None:
            self._api = self._connect()
        return self._api

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the operator has set: `defaults` and `values_bytes`."""
        if self._settings is None:
            self._settings = self.api.remote()
        return self._settings

    def take(self, arguments: Arguments, who: str, say: Callable[[str], None]) -> Pod:
        """The sandbox for such a cell, which nobody else gets until `give_back`.

        Args:
            arguments: The cell's.
            who: What is about to run, for whoever wants it too.
            say: Told where the cell runs.

        Raises:
            BusyError: Another cell runs there.
            KeeperError: There is none.
        """
        kind = Kind(arguments.gpu, arguments.n, arguments.session, arguments.image, arguments.memory_bytes)
        with self._lock:
            pod = self._warm.get(kind)
            if pod is not None and pod.busy_with:
                raise BusyError(
                    f"{pod.busy_with} runs in this sandbox. Wait for it or stop it with %remote, "
                    "or give this cell a sandbox of its own with session=NAME."
                )
            if pod is not None and self._lives(pod):
                say(f"{pod.place}, warm")
                pod.busy_with = who
                return pod
            if pod is not None:
                say("it is gone, with its variables; another one takes its place")
                del self._warm[kind]
            pod = self._warm[kind] = self._create(arguments)
            pod.busy_with = who
        try:
            say(f"{pod.place}, {_started(pod)}")
        except BaseException:
            pod.lose()
            self.give_back(pod)
            raise
        return pod

    def give_back(self, pod: Pod) -> None:
        """Nothing runs there any more; one that is lost is removed."""
        pod.busy_with = ""
        if pod.lost:
            self._remove(pod, timeout=ANSWER_TIMEOUT_S)

    def close(self, session: str | None = None) -> int:
        """Remove those in which nothing runs, of one session or all; how many there were."""
        with self._lock:
            idle = [pod for kind, pod in self._warm.items() if not pod.busy_with and session in (None, kind.session)]
        for pod in idle:
            self._remove(pod, timeout=ANSWER_TIMEOUT_S)
        return len(idle)

    def end(self) -> None:
        """Remove all, as the notebook ends."""
        for pod in list(self._warm.values()):
            self._remove(pod, timeout=EXIT_TIMEOUT_S)

    def _remove(self, pod: Pod, *, timeout: float) -> None:
        for kind in [kind for kind, one in self._warm.items() if one is pod]:
            self._warm.pop(kind, None)
        with contextlib.suppress(KeeperError):
            self.api.delete(pod.id, timeout=timeout)

    def _lives(self, pod: Pod) -> bool:
        if pod.lost:
            return False
        try:
            return self.api.is_connected(pod.id) or bool(self.api.info(pod.id)["state"] == "running")
        except KeeperError as error:
            if error.code not in GONE:
                raise
            return False

    def _create(self, arguments: Arguments) -> Pod:
        if arguments.n:
            return self._pod(arguments, arguments.n)
        free = sum(1 for gpu in self.api.gpus() if gpu.get("lease") is None)
        each = _per_rank(arguments.gpu)[1]
        for ranks in range(min(free // each, RANKS_MAX), 1, -1):
            with contextlib.suppress(KeeperError):
                return self._pod(arguments, ranks)
        return self._pod(arguments, 1)

    def _pod(self, arguments: Arguments, ranks: int) -> Pod:
        limit = int(self.settings["values_bytes"])
        limits: dict[str, Any] = {"shm_bytes": max(limit, 1)}
        if arguments.memory_bytes is not None:
            limits["memory_bytes"] = ranks * arguments.memory_bytes
        wanted: dict[str, Any] = {"limits": limits}
        if arguments.gpu is not None:
            name, each = _per_rank(arguments.gpu)
            wanted["gpu"] = f"{name}:{ranks * each}" if ranks * each > 1 else arguments.gpu
        if arguments.image is not None:
            wanted["image"] = arguments.image
        return Pod(self.api, self.api.create(wanted), ranks, limit)


def _device(gpus: Sequence[Mapping[str, Any]]) -> str:
    """What is computed on with these."""
    names: dict[str, int] = {}
    for gpu in gpus:
        name = str(gpu.get("name")) + (" (simulated)" if gpu.get("simulated") else "")
        names[name] = names.get(name, 0) + 1
    return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in names.items()) or "CPU"


def _per_rank(gpu: str | None) -> tuple[str, int]:
    """A request without its count, and that count."""
    name, colon, count = (gpu or "").rpartition(":")
    return (name, int(count)) if colon and count.isascii() and count.isdigit() and int(count) else (gpu or "", 1)


def _started(pod: Pod) -> str:
    """Start all its ranks; how that was done."""
    inbox = Inbox()
    runs = [pod.run({"code": "", "rank": rank, "ranks": pod.ranks}, b"", inbox) for rank in range(pod.ranks)]
    first: Mapping[str, Any] = {}
    try:
        for run in runs:
            run.begin()
        for _ in runs:
            event = inbox.get()
            while event is not None and event.message is not None:
                event = inbox.get()
            if event is None or event.error is not None:
                raise event.error if event is not None and event.error is not None else KeeperError("It said nothing")
            if event.run.rank == 0:
                first = event.done or {}
    finally:
        inbox.close()
        for run in runs:
            run.close()
    how = {"template": "from a template", "snapshot": "from a snapshot"}.get(str(first.get("started_from")), "cold")
    took = first.get("started_ms")
    return f"started {how}" + (f" in {took:.0f} ms" if took else "")
