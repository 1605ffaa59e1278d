"""Where drivers are chosen and put together; the only place outside `sandbox/` that imports one."""

import asyncio
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from warmcell.extension import doctor
from warmcell.extension.config import Warmcell
from warmcell.extension.keeper import pressure
from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
from warmcell.sandbox.backends.docker import DockerBackend
from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.backends.gvisor import GvisorBackend
from warmcell.sandbox.backends.leftovers import clean_leftovers
from warmcell.sandbox.backends.nursery import Nursery
from warmcell.sandbox.backends.process import ProcessBackend
from warmcell.sandbox.choosing import AUTO
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.gpus.base import GpuInventory
from warmcell.sandbox.gpus.cuda_parking import CudaParking
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.nvml import NvmlInventory
from warmcell.sandbox.gpus.parking import ParkEngine, ParkingPlace, SimulatedParking
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.images.base import ImageBuilder, PackageIndex
from warmcell.sandbox.images.cache import ImageCache
from warmcell.sandbox.images.containers import ContainerImageBuilder
from warmcell.sandbox.images.environments import EnvironmentBuilder, build_paths
from warmcell.sandbox.models import GIB, USUAL_UMASK
from warmcell.sandbox.network.egress import Egress, EgressBounds
from warmcell.sandbox.network.index import Index
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import EngineReport
from warmcell.sandbox.saved import NO_ENGINE
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.snapshots.agent import AgentHelper, FirstOf
from warmcell.sandbox.snapshots.archive import ImagePort
from warmcell.sandbox.snapshots.base import SnapshotEngine
from warmcell.sandbox.snapshots.carrying import CriuImages
from warmcell.sandbox.snapshots.compressing import Compressor
from warmcell.sandbox.snapshots.criu import CriuEngine, OwnHelper, SystemHelper
from warmcell.sandbox.snapshots.gvisor import GvisorEngine
from warmcell.sandbox.snapshots.store import SnapshotStore
from warmcell.sandbox.snapshots.upkeep import Upkeep
from warmcell.sandbox.snapshots.verifying import Verifier

log = logging.getLogger(__name__)

DAY_S = 86400.0


class Wiring:
    """The drivers of one keeper, as the operator configured them."""

    def __init__(self, settings: Warmcell, paths: Paths, *, umask: int = USUAL_UMASK) -> None:
        """`umask` is that of who started the keeper."""
        self.settings = settings
        self.paths = paths
        self._umask = umask
        helped = settings.helper == "auto"
        self.nursery = Nursery()
        self._containers = DockerBackend(
            paths=paths,
            host=settings.docker_host,
            runtime=settings.docker_runtime,
            image=settings.docker_image,
        )
        self.backends: Mapping[str, SandboxBackend] = {
            "bubblewrap": BubblewrapBackend(
                paths=paths, helper=SystemHelper().connect if helped else None, nursery=self.nursery
            ),
            "docker": self._containers,
            "gvisor": GvisorBackend(paths=paths, nursery=self.nursery),
            "process": ProcessBackend(),
        }
        if settings.backend not in (AUTO, *self.backends):
            raise InvalidRequestError(
                f"c.Warmcell.backend is {settings.backend!r}, which is no backend",
                hint=f"Use one of {', '.join([AUTO, *sorted(self.backends)])}.",
            )
        self.engine: SnapshotEngine | None = None
        self.images: ImagePort | None = None
        """How memory is taken out and brought in, if it can be saved at all."""
        if settings.snapshots == "auto" and (helped or os.getuid() == 0):
            criu = self.engine = CriuEngine(paths=paths, populate=settings.populate)
            self.images = CriuImages(criu)
        self.engines: list[SnapshotEngine] = []
        """Further ones, each for backends of its own."""
        if settings.snapshots == "auto" and os.getuid() == 0:
            self.engines.append(self._gvisor_engine(paths))
        if settings.snapshots == "auto" and os.getuid() != 0 and settings.docker_agent == "auto":
            containers = self._containers_engine(paths)
            self.engines.append(containers)
            self.images = CriuImages(containers)
        inventory = gpu_inventory(settings)
        self.gpus = gpu_pool(settings, paths, inventory)
        self.parking = parking_place(settings, inventory)
        self.image_builders = self._image_builders()

    def _gvisor_engine(self, paths: Paths) -> SnapshotEngine:
        return GvisorEngine(paths=paths, backend=GvisorBackend(paths=paths, nursery=self.nursery))

    def _containers_engine(self, paths: Paths, *, quiet: bool = False) -> CriuEngine:
        """What saves an ordinary user's containers, with a helper or without."""
        machine = SystemHelper() if self.settings.helper == "auto" else None
        helper = FirstOf(machine, AgentHelper(paths, self._containers, quiet=quiet))
        return CriuEngine(
            paths=paths, helper=helper, populate=self.settings.populate, backends=(self._containers.name,)
        )

    def _package_index(self) -> PackageIndex:
        return PackageIndex.from_environment(
            os.environ,
            url=self.settings.index_url,
            certificate=self.settings.index_certificate,
            channels=self.settings.conda_channel_alias,
        )

    def egress(self) -> Egress:
        """What sandboxes without a network may reach."""
        settings, index = self.settings, self._package_index()
        return Egress(
            EgressBounds(
                allowed=settings.egress_bounds,
                principals=tuple(settings.egress_principals),
                index=Index(
                    urls=tuple(url for url in (index.url, *index.extra_urls) if url),
                    hosts=tuple(settings.egress_index_hosts),
                    certificate=index.certificate,
                    private=settings.egress_private_index,
                ),
            )
        )

    def _image_builders(self) -> Mapping[str, ImageBuilder]:
        """Who builds images for which backend."""
        settings, paths = self.settings, self.paths
        index = self._package_index()
        environments = EnvironmentBuilder(
            paths=paths,
            backend=BubblewrapBackend(paths=build_paths(paths), nursery=self.nursery),
            index=index,
            network="none" if settings.build_network == "none" else "host",
            uv=settings.build_with_uv,
            cache_bytes=None if settings.package_cache is None else int(settings.package_cache * GIB),
        )
        containers = ContainerImageBuilder(
            engine=Engine(settings.docker_host),
            index=index,
            network="none" if settings.build_network == "none" else "host",
            python_image=settings.docker_python_image,
        )
        own_programs = [name for name in ("bubblewrap", "gvisor", "process") if name in self.backends]
        return {**dict.fromkeys(own_programs, environments), "docker": containers}

    def image_cache(self) -> ImageCache:
        """The images of these drivers."""
        quota = self.settings.image_quota
        return ImageCache(
            self.paths.environments / ".known",
            self.image_builders,
            quota_bytes=None if quota is None else int(quota * GIB),
        )

    def service(self) -> SandboxService:
        """The engine with these drivers."""
        return SandboxService(
            backends=self.backends,
            default_backend=self.settings.backend,
            gpus=self.gpus,
            paths=self.paths,
            bounds=dataclasses.replace(self.settings.bounds(), umask=self._umask),
            engine=self.engine,
            engines=self.engines,
            store=SnapshotStore(
                self.paths.snapshots,
                quota_bytes=None if self.settings.snapshot_quota is None else int(self.settings.snapshot_quota * GIB),
                ttl_s=None if self.settings.snapshot_ttl is None else self.settings.snapshot_ttl * DAY_S,
            ),
            prepared_per_template=self.settings.prepared,
            prepared_bytes=int(self.settings.prepared_memory * GIB),
            gpu_wait_s=self.settings.gpu_wait,
            egress=self.egress(),
            parking=self.parking,
        )

    def upkeep(self, service: SandboxService) -> Upkeep:
        """Who looks after this service's snapshots."""
        days = self.settings.compress_after
        return Upkeep(
            service.memory.store,
            compress_after_s=None if days is None else days * DAY_S,
            remeasure=service.memory.remeasure,
            verifier=Verifier(service.memory.store, self.images),
            compressor=self.compressor(service) if self.settings.compress_memory else None,
        )

    def compressor(self, service: SandboxService) -> Compressor:
        """Who compresses this service's snapshots."""
        return Compressor(service.memory.store, self.images, remeasure=service.memory.remeasure)

    def remove_leftovers(self) -> None:
        """Remove what a killed keeper left: everything below our directories is without an owner now."""
        removed = clean_leftovers(self.paths)
        for directory in sorted(self.paths.kernels.glob("*")):
            shutil.rmtree(directory, ignore_errors=True)
            removed.append(f"kernel sockets {directory}")
        if self.paths.helper_socket.exists():  # Its helper ended with the keeper.
            self.paths.helper_socket.unlink()
        for what in removed:
            log.warning("removed a leftover: %s", what)

    async def doctor(self, engines: Sequence[EngineReport] | None = None) -> dict[str, Any]:
        """What this machine can do, for `GET /doctor`.

        Args:
            engines: What was found out about the snapshot engines; they are tried here if None.
        """
        if engines is None:
            engines = await self._try_engines()
        return await doctor.collect(
            self.backends,
            self.gpus,
            paths=self.paths,
            configured=self.settings.backend,
            among=self.settings.bounds().backends,
            engines=engines,
            parking=self.parking,
        )

    async def _try_engines(self) -> Sequence[EngineReport]:
        """Without a keeper: in directories of their own, so that nothing is left where it was only looked."""
        with tempfile.TemporaryDirectory(prefix="wc-") as name:
            place = Path(name)
            paths = Paths(place / "r", place / "s", place / "l").make()
            engines: list[SnapshotEngine] = []
            if self.engine is not None:
                helper = OwnHelper(paths, quiet=True) if os.getuid() == 0 else SystemHelper()
                engines.append(CriuEngine(paths=paths, helper=helper))
            if self.engines:
                again = self._gvisor_engine if os.getuid() == 0 else partial(self._containers_engine, quiet=True)
                engines.append(again(paths))
            try:
                reports = await asyncio.gather(*(engine.probe() for engine in engines))
            finally:
                await asyncio.gather(*(engine.close() for engine in engines))
        return reports if self.engine is not None else [NO_ENGINE, *reports]


def gpu_inventory(settings: Warmcell) -> GpuInventory:
    """Knows the machine's GPUs, or those that are pretended."""
    return SimulatedInventory(settings.simulated_gpus) if settings.simulated_gpus else NvmlInventory()


def parking_place(settings: Warmcell, inventory: GpuInventory) -> ParkingPlace:
    """Who parks kernels on these GPUs, and how much of the host's memory they may take."""
    engine: ParkEngine = SimulatedParking() if settings.simulated_gpus else CudaParking(inventory)
    most = settings.park_memory
    budget = most * pressure.look().total_bytes if most < 1 else most * GIB
    return ParkingPlace(engine, int(budget), lambda: pressure.look().available_bytes, by_torch=settings.park_with_torch)


def gpu_pool(settings: Warmcell, paths: Paths, inventory: GpuInventory | None = None) -> GpuPool:
    """The GPUs of this inventory, or of the machine, as the operator shares them out."""
    inventory = inventory or gpu_inventory(settings)
    return GpuPool(inventory, LeaseDirectory(paths.leases), most_parts=settings.gpu_shares, quotas=settings.gpu_quotas)
