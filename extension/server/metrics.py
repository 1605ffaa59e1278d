"""Warmcell's part of the server's own `/metrics`: what sandboxes and GPUs do, in labels that are few and known."""

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jupyter_server.auth.decorator import allow_unauthenticated
from jupyter_server.base.handlers import PrometheusMetricsHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.client.start import is_listening
from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.paths import Paths

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
OWNERS = ("notebook", "remote", "fork", "client", "other")
"""Whoever else there may be is one of "other": labels are never names that users choose."""

SECONDS = {
    "warmcell_gpu_seconds": ("GPU time that sandboxes had, by whether they worked.", "gpu_{}_s"),
    "warmcell_cpu_seconds": ("Processor time of sandboxes, by whether they worked.", "cpu_{}_s"),
    "warmcell_memory_gib_seconds": ("Memory of sandboxes over time, in GiB seconds.", "memory_{}_gib_s"),
    "warmcell_sandbox_seconds": ("Time for which sandboxes were there, by whether they worked.", "wall_{}_s"),
}


class KeeperMetrics:
    """What the keeper said last. Where none runs there is nothing to say, and none is started for it."""

    def __init__(self) -> None:
        self._gpus: Mapping[str, Any] = {"gpus": [], "queue": []}
        self._usage: Sequence[Mapping[str, Any]] = ()
        self._sandboxes: Sequence[Mapping[str, Any]] = ()
        self._up = False

    async def refresh(self) -> None:
        """Ask the keeper, if one runs; at most for a few seconds."""
        paths = Paths.default()
        self._up = False
        if not await asyncio.to_thread(is_listening, paths):
            self._gpus, self._sandboxes = {"gpus": [], "queue": []}, ()
            return
        try:
            connecting = KeeperClient.connect(paths=paths, start=False, looks=True)
            async with asyncio.timeout(PATIENCE_S), await connecting as keeper:
                self._sandboxes = (await keeper.get("/sandboxes"))["sandboxes"]
                self._usage = (await keeper.get("/usage?by=owner&days=0"))["rows"]
                self._gpus = await keeper.get("/gpus")
                self._up = True
        except (WarmcellError, TimeoutError) as error:
            log.warning("Warmcell: what the keeper says is missing from /metrics: %s", error)

    def collect(self) -> Iterator[Metric]:
        """What it said, as Prometheus wants it (the client library's hook)."""
        yield GaugeMetricFamily("warmcell_keeper_up", "Whether a keeper runs and answers.", value=float(self._up))
        yield self._count_sandboxes()
        yield self._count_gpus()
        parked = [box["parked"]["vram_bytes"] for box in self._sandboxes if box.get("parked")]
        yield GaugeMetricFamily(
            "warmcell_parked_sandboxes", "Sandboxes that run and have given their GPU back.", value=float(len(parked))
        )
        yield GaugeMetricFamily(
            "warmcell_parked_bytes", "What they had on GPUs, in the host's memory.", value=float(sum(parked))
        )
        queue = self._gpus["queue"]
        yield GaugeMetricFamily("warmcell_gpu_queue_length", "How many wait for a GPU here.", value=float(len(queue)))
        yield from self._sums()

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked to register it (the client library's hook)."""
        return ()

    def _count_sandboxes(self) -> Metric:
        family = GaugeMetricFamily("warmcell_sandboxes", "Sandboxes of this user.", labels=("state", "owner"))
        counts = {(state.value, owner): 0 for state in State for owner in OWNERS}
        for box in self._sandboxes:
            counts[box["state"], _owner(box["owner"])] += 1
        for labels, count in counts.items():
            family.add_metric(labels, count)
        return family

    def _count_gpus(self) -> Metric:
        family = GaugeMetricFamily("warmcell_gpus", "GPUs of the machine.", labels=("state", "simulated"))
        counts = {(state, kind): 0 for state in ("free", "mine", "others", "lost") for kind in ("true", "false")}
        for gpu in self._gpus["gpus"]:
            leases = gpu["leases"]
            state = "lost" if gpu["lost"] else "free" if not leases else "others"
            if state == "others" and any(lease["mine"] for lease in leases):
                state = "mine"
            counts[state, str(gpu["simulated"]).lower()] += 1
        for labels, count in counts.items():
            family.add_metric(labels, count)
        return family

    def _sums(self) -> Iterator[Metric]:
        used: dict[str, dict[str, float]] = {owner: {} for owner in OWNERS}
        for row in self._usage:
            sums = used[_owner(row["owner"])]
            for name, value in row["usage"].items():
                sums[name] = sums.get(name, 0.0) + value
        for name, (about, field) in SECONDS.items():
            family = CounterMetricFamily(name, about, labels=("owner", "activity"))
            for owner, sums in used.items():
                for activity in ("active", "idle"):
                    family.add_metric((owner, activity), sums.get(field.format(activity), 0.0))
            yield family
        given = CounterMetricFamily(
            "warmcell_gpu_given_back_seconds",
            "GPU time that parked and suspended kernels would have held idle.",
            labels=("owner",),
        )
        for owner, sums in used.items():
            given.add_metric((owner,), sums.get("gpu_given_back_s", 0.0))
        yield given


class MetricsHandler(PrometheusMetricsHandler):
    """The server's own metrics, ours fresh among them. Who may see them is Jupyter's to say."""

    @allow_unauthenticated
    async def get(self) -> None:  # type: ignore[override] # tornado takes either
        """All of them, as text."""
        if self.logged_in or not self.settings["authenticate_prometheus"]:
            metrics: KeeperMetrics = self.settings["warmcell_metrics"]
            await metrics.refresh()
        super().get()


def _owner(name: object) -> str:
    return name if isinstance(name, str) and name in OWNERS else "other"
