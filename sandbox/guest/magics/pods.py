"""Sandboxes that are kept warm for remote cells: one for each kind that was asked for, with all its ranks."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import requests
from .api import ANSWER_TIMEOUT_S, Api, KeeperError
from .arguments import RANKS_MAX, Arguments
from .run import Inbox, Run
from .store import Store

EXIT_TIMEOUT_S = 2.0

NOTEBOOKS = "WARMCELL_REMOTE"
"""Variable of the environment with the defaults that the notebook's metadata have."""

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
        gpus, ranks = self.gpus, self.ranks
        if 0 < len(gpus) < ranks:
            return [
                f"1/{-(-ranks // len(gpus))} of {_device([gpus[rank * len(gpus) // ranks]])}" for rank in range(ranks)
            ]
        each = len(gpus) // ranks
        return [_device(gpus[rank * each : (rank + 1) * each]) for rank in range(ranks)]

    @property
    def gpus_each(self) -> float:
        """GPUs that each rank has; less than one where several share one."""
        return len(self.gpus) / self.ranks

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
        self._lost: set[Kind] = set()
        """Kinds of those that were removed because a cell went wrong there."""
        self._coming: dict[Kind, str] = {}
        """What looks for a sandbox of a kind, or waits for its GPUs; nothing else that wants one may."""
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

    @property
    def defaults(self) -> Mapping[str, object]:
        """What lines do not say: the operator's, then those of the notebook's metadata."""
        own: Mapping[str, object] = json.loads(os.environ.get(NOTEBOOKS) or "{}")
        return {**self.settings["defaults"], **own}

    def take(
        self,
        arguments: Arguments,
        who: str,
        say: Callable[[str], None],
        waits: Callable[[Mapping[str, Any]], None] = lambda place: None,
    ) -> Pod:
        """The sandbox for such a cell, which nobody else gets until `give_back`.

        Args:
            arguments: The cell's.
            who: What is about to run, for whoever wants it too.
            say: Told where the cell runs.
            waits: Told now and then where it stands in the queue for GPUs.

        Raises:
            BusyError: Another cell runs there, or waits for it.
            KeeperError: There is none.
        """
        kind = Kind(arguments.gpu, arguments.n, arguments.session, arguments.image, arguments.memory_bytes)
        with self._lock:
            pod = self._warm.get(kind)
            other = self._coming.get(kind)
            if other is not None or (pod is not None and pod.busy_with):
                does = f"{other} waits for" if other is not None or pod is None else f"{pod.busy_with} runs in"
                raise BusyError(
                    f"{does} this sandbox. Wait for it or stop it with %remote, "
                    "or give this cell a sandbox of its own with session=NAME."
                )
            self._coming[kind] = who
        try:
            return self._taken(kind, pod, arguments, who, say, waits)
        finally:
            del self._coming[kind]

    def _taken(
        self,
        kind: Kind,
        pod: Pod | None,
        arguments: Arguments,
        who: str,
        say: Callable[[str], None],
        waits: Callable[[Mapping[str, Any]], None],
    ) -> Pod:
        if pod is not None and self._lives(pod):
            say(f"{pod.place}, warm")
            pod.busy_with = who
            return pod
        if pod is not None or kind in self._lost:
            self._lost.discard(kind)
            say("it is gone, with its variables; another one takes its place")
            self._warm.pop(kind, None)
        pod = self._create(arguments, waits)
        pod.busy_with = who
        self._warm[kind] = pod
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
            self._lost.update(kind for kind, one in self._warm.items() if one is pod)
            self._remove(pod, timeout=ANSWER_TIMEOUT_S)

    def close(self, session: str | None = None) -> int:
        """Remove those in which nothing runs, of one session or all; how many there were."""
        with self._lock:
            idle = [
                pod
                for kind, pod in self._warm.items()
                if not pod.busy_with and kind not in self._coming and session in (None, kind.session)
            ]
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

    def _create(self, arguments: Arguments, waits: Callable[[Mapping[str, Any]], None]) -> Pod:
        if arguments.n:
            info = self.api.create(
                self._wanted(arguments, arguments.n, requests.of(arguments.gpu, arguments.n)), waits=waits
            )
            return Pod(self.api, info, arguments.n, self._limit)
        free = sum(1 for gpu in self.api.gpus() if gpu.get("lease") is None)
        nothing: KeeperError | None = None
        for one in requests.each(arguments.gpu or ""):
            most = min(one.ranks_on(max(free, 1)), RANKS_MAX)
            try:
                info = self.api.create(self._wanted(arguments, most, one.down_from(most)), waits=None)
            except KeeperError as error:
                if error.code not in ("no_gpu_available", "invalid_request", "unknown_gpu_kind"):
                    raise
                if error.code == "no_gpu_available":
                    cure = "n=max does not wait for GPUs. Say how many, as in n=1, to wait for them."
                    nothing = KeeperError(str(error), cure, error.code)
                nothing = nothing or error
                continue
            return Pod(self.api, info, min(one.ranks_on(len(info["gpus"])), most), self._limit)
        raise nothing or KeeperError("n=max needs a GPU", "Say which, as in gpu=any n=max.")

    @property
    def _limit(self) -> int:
        return int(self.settings["values_bytes"])

    def _wanted(self, arguments: Arguments, ranks: int, gpu: str | Sequence[str] | None) -> dict[str, Any]:
        """The fields of the spec."""
        limits: dict[str, Any] = {"shm_bytes": max(self._limit, 1)}
        if arguments.memory_bytes is not None:
            limits["memory_bytes"] = ranks * arguments.memory_bytes
        wanted: dict[str, Any] = {"limits": limits}
        if gpu is not None:
            wanted["gpu"] = gpu
        if arguments.image is not None:
            wanted["image"] = arguments.image
        return wanted


def _device(gpus: Sequence[Mapping[str, Any]]) -> str:
    """What is computed on with these."""
    names: dict[str, int] = {}
    for gpu in gpus:
        name = str(gpu.get("name")) + (" (simulated)" if gpu.get("simulated") else "")
        names[name] = names.get(name, 0) + 1
    return ", ".join(f"{count} × {name}" if count > 1 else name for name, count in names.items()) or "CPU"


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
        for run in runs:
            run.close()
    how = {"template": "from a template", "snapshot": "from a snapshot"}.get(str(first.get("started_from")), "cold")
    took = first.get("started_ms")
    return f"started {how}" + (f" in {took:.0f} ms" if took else "")
