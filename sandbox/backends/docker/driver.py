"""The `docker` backend: containers of an engine on this machine, whatever its runtime is."""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

from warmcell.sandbox.backends import layers
from warmcell.sandbox.backends.docker import changes, inside, numbers, volumes
from warmcell.sandbox.backends.docker.about import EngineInfo
from warmcell.sandbox.backends.docker.engine import Container, Engine
from warmcell.sandbox.backends.docker.image import Images
from warmcell.sandbox.backends.docker.instance import DockerInstance, Remains
from warmcell.sandbox.backends.docker.labels import KEEPER, SANDBOX, container_name, ours
from warmcell.sandbox.backends.docker.orphans import remember
from warmcell.sandbox.backends.docker.plan import Prepared, prepare
from warmcell.sandbox.backends.docker.probe import probe
from warmcell.sandbox.backends.places import RUN
from warmcell.sandbox.backends.threads import ENGINE, in_thread
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    SandboxStartError,
    SnapshotCorruptError,
    WarmcellError,
)
from warmcell.sandbox.models import GpuDevice, LimitStatus, SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import BackendReport, Capabilities

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
_NO_LIMIT = "the engine does not limit it here: its `docker info` says why"
_NO_OVERLAY = "read-only, since this kernel refuses an overlay on it ({}). Choose mode rw or ro."
_NOT_SEEN = (
    "The files of the container cannot be seen from here: its runtime {runtime} or the engine keeps them apart ({why})"
)


class DockerBackend:
    """Implements `SandboxBackend`."""

    name = "docker"

    def __init__(self, *, paths: Paths, host: str = "", runtime: str = "", image: str = "") -> None:
        """Configure it.

        Args:
            paths: The keeper's directories; persistent homes are below `state`, and no sandbox sees any of them.
            host: The engine's socket, as in DOCKER_HOST.
            runtime: What the engine calls a runtime (`runc`, `nvidia`); empty: its default.
            image: Of sandboxes whose spec names none.
        """
        self._paths = paths
        self._runtime = runtime
        self._image = image
        self.engine = Engine(host)
        self.images = Images(self.engine, ours(SandboxId("")))
        self._left: set[str] = set()
        """Containers that are still to be removed, since the engine was away when they ended."""
        self._clearing: asyncio.Task[None] | None = None

    @property
    def capabilities(self) -> Capabilities:
        """The same everywhere where it is ready."""
        return Capabilities(
            isolated=True,
            gpus=True,
            networks=("none", "host"),
            snapshot_engines=("template", "criu"),
            layers=True,
        )

    async def probe(self) -> BackendReport:
        """Ask the engine, and bring up a small sandbox of the configured image if there is one."""
        return await probe(self, self.engine, self._image, check=self.checked_runtime)

    def fingerprint(self, spec: SandboxSpec) -> str:
        """The id of its image, which a name can be given anew."""
        image, python = self._image_of(spec)
        return f"{self.images.id_of(image)} {python}"

    async def create(
        self,
        spec: SandboxSpec,
        *,
        sandbox_id: SandboxId,
        directory: Path,
        gpus: Sequence[GpuDevice] = (),
        layer: Path | None = None,
        named: SandboxId | None = None,
        later: bool = False,
        progress: Callable[[str], None] = lambda detail: None,
    ) -> DockerInstance:
        """Bring up a container; see the port."""
        progress("asking the container engine")
        info = await ENGINE.run(self._meet)
        if self._left and (self._clearing is None or self._clearing.done()):
            self._clearing = asyncio.create_task(ENGINE.run(self._clear_up))
        runtime = self.checked_runtime(info)
        image, python = self._image_of(spec)
        found = await ENGINE.run(self.images.look_at, image, python, progress)
        labels = ours(sandbox_id)
        began_with = -1 if layer is None else await in_thread(_opened, layer)
        try:
            prepared = await in_thread(
                prepare,
                spec,
                sandbox_id=sandbox_id,
                directory=directory,
                gpus=gpus,
                paths=self._paths,
                info=info,
                image=found,
                runtime=runtime,
                labels=labels,
                layer=layer,
                named=named,
            )
        except BaseException:
            if began_with >= 0:
                os.close(began_with)
            raise
        remains = Remains(self.engine, directory, container_name(sandbox_id), labels, self._left)
        remains.layer_fd = began_with
        try:
            progress("making a container")
            await ENGINE.run(_make, remains, prepared)
            progress("starting the container")
            container, note = await ENGINE.run(_bring_up, remains, prepared, self._runtime or info.default_runtime)
            return await _instance(remains, prepared, container, spec, info, note=note)
        except BaseException:
            await asyncio.shield(asyncio.create_task(remains.release(timeout=STOP_TIMEOUT_S)))
            raise

    def _meet(self) -> EngineInfo:
        """See that the engine answers. Blocks."""
        info = self.engine.info()
        remember(self._paths, self.engine.address)
        return info

    def _clear_up(self) -> None:
        """Have the engine remove what it did not earlier. No start waits for that: it may never do. Blocks."""
        for name in list(self._left):
            try:
                self.engine.remove(name)
            except WarmcellError as error:
                log.warning("the container %s is still left: %s", name, error)
            else:
                self._left.discard(name)

    def _image_of(self, spec: SandboxSpec) -> tuple[str, str]:
        """The image, and the interpreter in it (empty: the first that it has)."""
        if spec.image:
            return spec.image, spec.python
        if self._image:
            return self._image, ""
        raise InvalidRequestError(
            "A container needs an image, and none is named",
            hint="Name one in the kernelspec, or for all in c.Warmcell.docker_image.",
        )

    def checked_runtime(self, info: EngineInfo) -> str:
        """What the engine is asked for: the configured runtime, empty for its default.

        Raises:
            BackendUnavailableError: It has no such runtime, or one that keeps what is in a container to itself.
        """
        if self._runtime and info.runtimes and self._runtime not in info.runtimes:
            raise BackendUnavailableError(
                f"The container engine has no runtime {self._runtime!r}",
                hint=f"c.Warmcell.docker_runtime may be one of {', '.join(sorted(info.runtimes))}.",
            )
        used = self._runtime or info.default_runtime
        if used in info.own_kernels:
            raise BackendUnavailableError(
                f"The container engine's runtime {used!r} gives containers a kernel of their own, whose files and "
                "processes the host does not see",
                hint="Set c.Warmcell.docker_runtime = 'runc'. For a kernel of its own there is the gvisor backend.",
            )
        return self._runtime


def _opened(layer: Path) -> int:
    try:
        return os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SnapshotCorruptError(
            f"The saved files in {layer} are gone: {error.strerror}",
            hint="Remove this snapshot, and start the kernel anew.",
        ) from error


def _make(remains: Remains, prepared: Prepared) -> None:
    """Write what is bound into the container, and have it made. Blocks."""
    for name, (content, mode) in prepared.files.items():
        path = remains.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)
    try:
        remains.engine.create(remains.name, prepared.config)
    except ConflictError:
        there = remains.engine.look(remains.name)
        # An answer that was lost, and asked for again, is a conflict with ourselves.
        if there is None or any(there.labels.get(name) != remains.labels[name] for name in (KEEPER, SANDBOX)):
            remains.foreign = True
            raise
    except NotFoundError as error:
        raise SandboxStartError(error.message, hint=error.hint) from None


def _bring_up(remains: Remains, prepared: Prepared, runtime: str) -> tuple[Container, str]:
    """Start it with all that it begins with; with it comes why its workspace is not as it was planned. Blocks."""
    with contextlib.ExitStack() as held:
        contents = {
            name: held.enter_context(
                volumes.taken(remains.engine, remains.name, path, most_bytes=prepared.parts.parts[name].most_bytes)
            )
            for name, path in prepared.contents.items()
        }
        container = _start_apart(remains, () if prepared.saved is None else prepared.saved.devices)
        note = _look_inside(remains, prepared, container, runtime)
        for name, archive in contents.items():
            _fill(remains, prepared, name, archive)
    return container, note


def _fill(remains: Remains, prepared: Prepared, name: str, archive: IO[bytes]) -> None:
    part = prepared.parts.parts[name]
    top = inside.place(remains.root_fd, f"/{part.place}")
    try:
        owner = (prepared.identity.uid, prepared.identity.gid) if os.getuid() == 0 else None
        volumes.put(archive, top, owner=owner)
    except OSError as error:
        if volumes.is_full(error):
            raise volumes.too_large(prepared.contents[name], part.most_bytes) from None
        raise
    finally:
        os.close(top)


def _start_apart(remains: Remains, devices: Collection[int]) -> Container:
    """Start it, none of its file systems on one of these devices: see `Saved.devices`. Blocks."""
    with numbers.held(devices) as why:
        if why:
            log.warning("shared memory of %s may be on a device that it knows of earlier: %s", remains.name, why)
        return _start(remains)


def _start(remains: Remains) -> Container:
    """Start it and take hold of its first process. Blocks."""
    try:
        remains.engine.start(remains.name)
        container = remains.engine.look(remains.name)
    except NotFoundError as error:
        raise SandboxStartError(error.message, hint=error.hint) from None
    if container is None:
        raise SandboxStartError("The container was removed while it started", hint="Try again.")
    if container.running and container.pid > 0:
        with contextlib.suppress(ProcessLookupError):
            remains.init_fd = os.pidfd_open(container.pid)
            # By now the number could be somebody else's.
            again = remains.engine.look(remains.name)
            if again is not None and again.running and again.pid == container.pid:
                return container
            os.close(remains.init_fd)
            remains.init_fd = -1
    said = remains.engine.said(remains.name).strip()
    raise SandboxStartError(
        f"The container ended as it began, with exit code {container.exit_code}: {container.error or said}",
        hint="Try its image: `docker run --rm IMAGE python3 --version`.",
    )


def _look_inside(remains: Remains, prepared: Prepared, container: Container, runtime: str) -> str:
    """Open what the host needs of it, and put in what it begins with. Blocks.

    Returns:
        Why its workspace is not as it was planned, else nothing.
    """
    try:
        remains.root_fd = inside.root(container.pid)
        remains.run_fd = inside.place(remains.root_fd, RUN)
    except OSError as error:
        if error.errno == errno.ENOENT and not os.path.exists(f"/proc/{container.pid}"):
            said = remains.engine.said(remains.name).strip()
            raise SandboxStartError(f"The container ended as it began: {said}", hint="Look at its image.") from None
        raise BackendUnavailableError(
            _NOT_SEEN.format(runtime=runtime or "?", why=error.strerror),
            hint="The engine must run on this machine, as root or as this user, with a runtime such as runc. A kernel "
            "of gVisor's has the gvisor backend.",
        ) from None
    owner = (prepared.identity.uid, prepared.identity.gid)
    why = "" if prepared.changes is None else changes.mount(prepared.changes, remains.init_fd, layer=remains.layer_fd)
    if prepared.saved is not None:
        layers.fill(remains.root_fd, prepared.saved, prepared.parts)
    if prepared.user_site:
        inside.directories(remains.root_fd, prepared.home, prepared.user_site, owner)
    return why and _NO_OVERLAY.format(why)


async def _instance(
    remains: Remains, prepared: Prepared, container: Container, spec: SandboxSpec, info: EngineInfo, *, note: str
) -> DockerInstance:
    run = remains.directory / "run"
    await in_thread(run.symlink_to, f"/proc/{os.getpid()}/fd/{remains.run_fd}")
    return DockerInstance(
        remains,
        container,
        run_directory=run,
        limits=_limits(spec, info),
        workspace_note=" ".join(filter(None, (prepared.note, note))),
        parts=prepared.parts,
        events=await in_thread(inside.memory_events, container.pid),
    )


def _limits(spec: SandboxSpec, info: EngineInfo) -> Mapping[str, LimitStatus]:
    asked = {"memory": spec.limits.memory_bytes, "pids": spec.limits.pids, "cpu": spec.limits.cpus}
    told = {
        name: LimitStatus(value=value, enforced=info.can[name], why="" if info.can[name] else _NO_LIMIT)
        for name, value in asked.items()
    }
    return {**told, "layer": LimitStatus(value=spec.limits.layer_bytes, enforced=True)}
