"""The keeper's life: alone by a lock, ready, idle, gone; nothing of it is left."""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator

from warmcell.extension import config
from warmcell.extension.keeper.api import KeeperApi
from warmcell.extension.keeper.guest_sockets import GuestSockets
from warmcell.extension.keeper.http import UnixServer
from warmcell.extension.keeper.kernels import Kernels
from warmcell.extension.keeper.runs import Runs
from warmcell.extension.keeper.wiring import Wiring
from warmcell.sandbox.errors import BackendUnavailableError, WarmcellError
from warmcell.sandbox.models import SandboxInfo
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.service import SandboxService

log = logging.getLogger("warmcell.keeper")


async def run(*, ready_fd: int | None = None, paths: Paths | None = None) -> int:
    """Be the keeper until a signal comes or nothing runs and nobody is connected.

    Args:
        ready_fd: Gets one JSON object, `{"ready": true}` or the error, and is closed.
    """
    paths = paths or Paths.default()
    os.umask(0o077)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        paths.make()
        with _alone(paths):
            await _serve(paths, ready_fd)
    except WarmcellError as error:
        _tell(ready_fd, error.to_json())
        log.error("%s", error)
        return 1
    return 0


async def _serve(paths: Paths, ready_fd: int | None) -> None:
    settings = config.Warmcell(config=config.load())
    wiring = Wiring(settings, paths)
    await asyncio.to_thread(wiring.remove_leftovers)
    service = wiring.service()
    kernels = Kernels(service, paths)
    runs = Runs(service)
    api = KeeperApi(service=service, kernels=kernels, runs=runs, wiring=wiring, started_at=time.time())
    sockets = GuestSockets(api.guest_application)
    kernels.sandbox_in_use = sockets.open
    activity = asyncio.Event()
    server = UnixServer(api.application(), paths.keeper_socket, activity)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    server.listen_unix()
    _tell(ready_fd, {"ready": True})
    log.info("ready on %s", paths.keeper_socket)
    watch = asyncio.create_task(_watch_changes(service, sockets, activity))
    try:
        await _until_idle(server, service, activity, stop, settings.keeper_idle_s)
    finally:
        await server.close()
        await runs.close()
        await kernels.close()
        await service.close()
        await sockets.close()
        await watch
        log.info("gone")


async def _watch_changes(service: SandboxService, sockets: GuestSockets, activity: asyncio.Event) -> None:
    changes = service.subscribe()
    while not changes.ended:
        change = await changes.next()
        if isinstance(change, SandboxInfo):
            activity.set()
            await sockets.on_change(change)


async def _until_idle(
    server: UnixServer, service: SandboxService, activity: asyncio.Event, stop: asyncio.Event, idle_s: float
) -> None:
    """Return when `stop` is set, or nothing has run and nobody has been connected for `idle_s` seconds."""
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
            if idle and not done:
                log.info("idle for %.0f s", idle_s)
                return
    finally:
        stopped.cancel()


@contextlib.contextmanager
def _alone(paths: Paths) -> Iterator[None]:
    """Held for the keeper's life; the operating system releases it with the process."""
    with open(paths.keeper_lock, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BackendUnavailableError(
                "A keeper of this user runs already, but does not listen", hint="End it with `warmcell clean`."
            ) from error
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid()}))
        lock.flush()
        yield


def _tell(ready_fd: int | None, what: dict[str, object]) -> None:
    if ready_fd is not None:
        with contextlib.suppress(OSError):  # whoever started us is gone, or was told before
            os.write(ready_fd, json.dumps(what).encode())
            os.close(ready_fd)
