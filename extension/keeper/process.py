"""The keeper's life: alone by a lock, ready, idle, gone; nothing of it is left."""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import resource
import select
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

from warmcell.extension import config
from warmcell.extension.keeper import logs
from warmcell.extension.keeper.agents.agents import Agents
from warmcell.extension.keeper.api import KeeperApi
from warmcell.extension.keeper.gpu_watch import GpuWatch
from warmcell.extension.keeper.guest_sockets import GuestSockets
from warmcell.extension.keeper.http import UnixServer
from warmcell.extension.keeper.kernel_memory import KernelMemory
from warmcell.extension.keeper.kernels import Kernels
from warmcell.extension.keeper.principals import Principals
from warmcell.extension.keeper.quotas import PrincipalQuotas
from warmcell.extension.keeper.rank_parking import park_ranks
from warmcell.extension.keeper.rank_release import release_ranks
from warmcell.extension.keeper.relief import Relief
from warmcell.extension.keeper.runs import Runs
from warmcell.extension.keeper.standing import begin_again
from warmcell.extension.keeper.tickets import Tickets
from warmcell.extension.keeper.usage import Meter
from warmcell.extension.keeper.wiring import Wiring
from warmcell.extension.keeper.wishes import Wishes
from warmcell.sandbox.errors import BackendUnavailableError, WarmcellError
from warmcell.sandbox.lifecycle import TERMINAL
from warmcell.sandbox.live import LiveSandbox
from warmcell.sandbox.models import SandboxId, SandboxInfo
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.usage import UsageStore

log = logging.getLogger("warmcell.keeper")

PREDECESSOR_TIMEOUT_S = 60.0
"""A keeper that listens no more is about to end; the next one waits for that."""

SAVING_TIMEOUT_S = 300.0
"""As above, of one that says that it is saving kernels: as many GB as they have must reach the disk."""

SAID_BYTES = 64
"""Of the lock file, which names the keeper."""

DESCRIPTORS = 65536

DAY_S = 86400.0

CLOSE_TIMEOUT_S = 60.0
"""For each part of the keeper to end."""


async def run(*, ready_fd: int | None = None, paths: Paths | None = None) -> int:
    """Be the keeper until a signal comes or nothing runs and nobody is connected.

    Args:
        ready_fd: Gets one JSON object, `{"ready": true}` or the error, and is closed.
    """
    paths = paths or Paths.default()
    umask = os.umask(0o077)
    _allow_descriptors()
    try:
        paths.make()
        logs.begin(paths.keeper_log if ready_fd is not None else None)
        with _alone(paths.keeper_lock) as say:
            await _serve(paths, ready_fd, say, umask=umask)
    except WarmcellError as error:
        _tell(ready_fd, error.to_json())
        log.error("%s", error)
        return 1
    return 0


async def _serve(
    paths: Paths, ready_fd: int | None, say: Callable[[Mapping[str, object]], None], *, umask: int
) -> None:
    settings = config.settings()
    wiring = Wiring(settings, paths, umask=umask)
    await asyncio.to_thread(wiring.remove_leftovers)
    service = wiring.service()
    images = service.admission.choosing.images = wiring.image_cache()
    images.in_use = service.images_in_use
    kernels = Kernels(service, paths)
    runs = Runs(service, values_bytes=settings.remote_values_bytes)
    memory = KernelMemory(service, kernels, paths)
    memory.wakes_early = settings.wake_on_typing
    runs.clone_of = memory.clone_of
    principals = Principals(paths.principals)
    principals.open()

    async def take_gpus(sandbox_id: SandboxId) -> None:
        try:
            await (
                agents.suspend(sandbox_id) if agents.owns(sandbox_id) else memory.suspend(sandbox_id, even_busy=True)
            )
        except WarmcellError as error:  # Code that prevents it must not keep them for that.
            log.warning("sandbox %s ends, since it cannot be suspended: %s", sandbox_id, error)
            await api.stop(sandbox_id)

    ttls = [None if ttl is None else ttl * DAY_S for ttl in (settings.snapshot_ttl, settings.frozen_ttl)]
    agents = Agents(
        service, kernels, memory, asleep_s=ttls[0], frozen_s=min((s for s in ttls if s is not None), default=None)
    )
    memory.in_use = agents.busy
    quotas = service.admission.quotas = PrincipalQuotas(service, principals, exhausted=take_gpus)
    meter = Meter(
        service,
        kernels,
        UsageStore(paths.usage),
        busy=lambda sandbox_id: runs.busy(sandbox_id) or agents.busy(sandbox_id),
    )
    api = KeeperApi(
        service=service,
        kernels=kernels,
        memory=memory,
        wishes=Wishes(service, kernels, memory),
        runs=runs,
        images=images,
        wiring=wiring,
        principals=principals,
        quotas=quotas,
        agents=agents,
        tickets=Tickets(paths.ticket_key, principals),
        started_at=time.time(),
        meter=meter,
    )
    sockets = GuestSockets(api.guest_application)
    kernels.sandbox_in_use = sockets.open
    kernels.sandbox_renewed = sockets.open_again

    def ranks_in_use(box: LiveSandbox) -> None:
        parents = [info for info in service.infos() if info.id == box.info.parent]
        sockets.open_for_ranks(box, parents[0] if parents else None)

    runs.sandbox_in_use = ranks_in_use
    await service.memory.open()
    await images.open()
    kernels.ledger.open()
    await memory.revive()
    kernels.ledger.lose_rest()
    activity = asyncio.Event()
    server = UnixServer(api.application(), paths.keeper_socket, activity)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    _listen(server)
    _tell(ready_fd, {"ready": True})
    log.info("ready on %s", paths.keeper_socket)
    metering = asyncio.create_task(begin_again(meter.run))
    watch = asyncio.create_task(begin_again(lambda: _watch_changes(service, sockets, api, activity)))
    relief = Relief(
        service,
        kernels,
        memory,
        pressure_idle_s=settings.suspend_below_after,
        parks=settings.park_after > 0,
        commands_idle_s=agents.idle_s,
    )
    standing: list[Callable[[], Awaitable[None]]] = [
        lambda: relief.park_idle(settings.park_after),
        lambda: relief.suspend_idle(settings.suspend_after),
        lambda: relief.heed_pressure(settings.suspend_below),
        lambda: relief.heed_queue(settings.gpu_yield_after),
        lambda: park_ranks(service, runs, after_s=settings.park_after, asked_after_s=settings.gpu_yield_after),
        lambda: release_ranks(service, idle_s=runs.idle_s, stop=api.stop, after_s=settings.remote_idle_s),
        wiring.upkeep(service).run,
        quotas.run,
        agents.end_in_time,
        GpuWatch(service).run,
    ]
    looks = [asyncio.create_task(begin_again(one)) for one in standing]
    try:
        await _until_idle(server, service, kernels, activity, stop, settings.keeper_idle_s)
    finally:
        server.serve_no_others()
        say({"saving": True})
        paths.keeper_socket.unlink(missing_ok=True)
        for look in looks:
            look.cancel()
        await _end(agents.kernels.complete())
        kernels.start_no_more()
        await _end(agents.close())
        service.leases.cancel_all()
        await memory.suspend_all()
        parts = (images.close(), server.close(), kernels.close(), service.close(), watch, metering, runs.close())
        for part in (*parts, sockets.close(), wiring.nursery.close()):
            await _end(part)
        log.info("gone")


def _allow_descriptors() -> None:
    """Each kernel takes some twenty, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _listen(server: UnixServer) -> None:
    try:
        server.listen_unix()
    except OSError as error:
        raise BackendUnavailableError(
            f"The keeper cannot listen on {server.path}: {error.strerror}", hint=f"Remove {server.path}."
        ) from error


async def _end(part: Awaitable[None]) -> None:
    """Whatever happens there, the other parts are ended too."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await part
    except Exception:
        log.exception("a part of the keeper did not end well")


async def _watch_changes(
    service: SandboxService, sockets: GuestSockets, api: KeeperApi, activity: asyncio.Event
) -> None:
    """Until the service is closed: what hangs on a sandbox goes with it, and idleness is looked at again."""
    with contextlib.closing(service.subscribe(backlog=None)) as changes:
        for info in service.infos():
            await _heed(info, sockets, api, activity)
        while not changes.ended:
            change = await changes.next()
            if isinstance(change, SandboxInfo):
                await _heed(change, sockets, api, activity)


async def _heed(change: SandboxInfo, sockets: GuestSockets, api: KeeperApi, activity: asyncio.Event) -> None:
    activity.set()
    api.agents.changed(change)
    if change.state in TERMINAL:
        await _end(sockets.forget(change.id))
        await _end(api.forget(change.id))


async def _until_idle(
    server: UnixServer,
    service: SandboxService,
    kernels: Kernels,
    activity: asyncio.Event,
    stop: asyncio.Event,
    idle_s: float,
) -> None:
    """Return when `stop` is set, or nothing has run and nobody has been connected for `idle_s` seconds.

    A server whose kernels all sleep needs this keeper, too, though it may have no connection for a while.
    """
    stopped = asyncio.create_task(stop.wait())
    try:
        while not stop.is_set():
            activity.clear()
            idle = not server.connected and not service.busy
            active = asyncio.create_task(activity.wait())
            done, _ = await asyncio.wait(
                {stopped, active}, timeout=idle_s if idle else None, return_when=asyncio.FIRST_COMPLETED
            )
            active.cancel()
            if idle and not done and not server.connected and not service.busy:  # Nor in this very moment.
                if any(kernel.owned and kernel.owner is not None and kernel.owner.pid > 0 for kernel in kernels.all()):
                    continue
                log.info("idle for %.0f s", idle_s)
                return
    finally:
        stopped.cancel()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Held for the keeper's life; the operating system releases it with the process.

    Yields:
        Says more about this keeper to those who find the lock held.

    Raises:
        BackendUnavailableError: Another keeper holds it, and does not end.
    """
    began = time.monotonic()
    with open(path, "a+") as lock:
        while not _locked(lock.fileno()):
            if not _predecessor_ends(path, began):
                raise BackendUnavailableError(
                    "A keeper of this user runs already, but does not listen", hint="End it with `warmcell clean`."
                )

        lock.truncate(0)
        with open(path, "r+b", buffering=0) as place:  # to be written over at once: somebody may be reading

            def say(what: Mapping[str, object]) -> None:
                os.pwrite(place.fileno(), json.dumps({"pid": os.getpid(), **what}).ljust(SAID_BYTES).encode(), 0)

            say({})
            yield say


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _predecessor_ends(path: Path, began: float) -> bool:
    """Wait for the process that the lock file names; False if that is no use, or takes too long since `began`."""
    try:
        said = json.loads(path.read_text())
        timeout = SAVING_TIMEOUT_S if said.get("saving") else PREDECESSOR_TIMEOUT_S
        left = began + timeout - time.monotonic()
        process = os.pidfd_open(int(said["pid"]))
    except ProcessLookupError:  # it ended in this moment
        return left > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    try:
        return bool(select.select([process], [], [], max(left, 0.0))[0])
    finally:
        os.close(process)


def _tell(ready_fd: int | None, what: dict[str, object]) -> None:
    if ready_fd is not None:
        with contextlib.suppress(OSError):  # whoever started us is gone, or was told before
            os.write(ready_fd, json.dumps(what).encode())
            os.close(ready_fd)
