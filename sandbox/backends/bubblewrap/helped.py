"""Sandboxes that the system's helper makes for an ordinary user: without a user namespace, so that their memory can be
saved. What is shown of the host goes to the helper as descriptors, opened with the user's own rights.
"""

import asyncio
import contextlib
import json
import os
import select
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.bubblewrap import rootfs
from warmcell.sandbox.backends.bubblewrap.plan import Prepared
from warmcell.sandbox.backends.child import Tail
from warmcell.sandbox.backends.control import Control
from warmcell.sandbox.backends.layers import SHARED
from warmcell.sandbox.backends.processes import descendants
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    SandboxStartError,
    TransportError,
    UnsupportedOperationError,
    WarmcellError,
    from_json,
)
from warmcell.sandbox.models import LimitStatus, SandboxId, SandboxSpec

Connect = Callable[[], Awaitable[socket.socket]]
"""A connection to the helper, not blocking; raises `BackendUnavailableError` where there is none."""
TIMEOUT_S = 90.0
GIVE_UP_S = 30.0
FDS_MAX = 64
GONE = "The helper that had made the sandbox has ended"
REFUSALS = ("invalid_request", "unsupported", "backend_unavailable", "protocol")
"""What the helper does not make; the sandbox is then one in a user namespace, whose memory cannot be saved."""


class HelperChild:
    """A sandbox that the helper holds for us, with what `Child` has of one that we started."""

    def __init__(
        self, connection: socket.socket, control: Control, said: Mapping[str, Any], tail: Tail, events: int
    ) -> None:
        self._connection = connection
        self._control = control
        self._tail = tail
        self._events = events
        self._left = ""
        self._killed = 0
        self.pid = int(said["outer"])
        self.first = int(said["pid"])
        self._first_fd = os.pidfd_open(self.first)
        self._ended = asyncio.create_task(self._until_end())

    @property
    def tail(self) -> str:
        """The last words on its stderr; of the helper's end, where that ended it."""
        return self._left or self._tail.text

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._ended.done()

    async def wait(self) -> int:
        """Wait for its end; the exit code as a shell says it. Any number may wait."""
        return await asyncio.shield(self._ended)

    async def kill(self) -> int:
        """Have it ended, wait for that and close everything that belongs to it. Idempotent."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        code = await self.wait()
        self.close()
        return code

    def close(self) -> None:
        """Close what belongs to it on this side. Idempotent."""
        self._tail.close()
        self._control.close()
        for fd in {self._first_fd, self._events} - {-1}:
            os.close(fd)
        self._first_fd = self._events = -1

    def processes(self) -> Sequence[int]:
        """Host pids of bubblewrap and of everything in the sandbox."""
        return () if self.ended else (self.pid, *descendants(self.pid))

    def oom_kills(self) -> int:
        """As far as its memory group tells."""
        with contextlib.suppress(OSError, ValueError):
            words = os.pread(self._events, 4096, 0).decode().split() if self._events >= 0 else []
            if words:
                self._killed = max(self._killed, int(words[words.index("oom_kill") + 1]))
        return self._killed

    async def _until_end(self) -> int:
        said = None
        with contextlib.suppress(WarmcellError):
            said = await self._control.line(None)
        if said is not None and "ended" in said:
            self._killed, self._left = int(said["oom_kills"]), str(said.get("why", ""))
            return int(said["ended"])
        # Its warden has gone, and with it, at once or soon, all of it.
        await _hung_up(self._first_fd)
        self._left = GONE
        return 137


async def start(
    connect: Connect, prepared: Prepared, spec: SandboxSpec, sandbox_id: SandboxId
) -> tuple[HelperChild, list[int], Mapping[str, LimitStatus], Mapping[str, str]]:
    """Have a sandbox made: it, descriptors of its run directory and of the stage's base, its limits, the report.

    Raises:
        UnsupportedOperationError: The helper makes no such sandbox; it is to be made without it.
        WarmcellError: The helper failed.
    """
    request, fds = described(prepared, spec, sandbox_id)
    connection: socket.socket | None = None
    control: Control | None = None
    try:
        try:
            connection = await connect()
        except BackendUnavailableError as error:
            raise UnsupportedOperationError(error.message, hint=error.hint) from error
        control = Control(connection)
        await _send(connection, json.dumps(request).encode() + b"\n", fds)
        said = await control.line(TIMEOUT_S)
        if said is None:
            raise SandboxStartError("The helper ended while it made the sandbox", hint="Its log says more; try again.")
        if said.get("ok") is not True:
            problem = from_json(said)
            if problem.code in REFUSALS:
                raise UnsupportedOperationError(problem.message, hint=problem.hint) from problem
            raise problem
        run_fd, base_fd, stderr, *events = control.take_fds()
        child = HelperChild(connection, control, said, Tail(stderr), *(events or [-1]))
        limits = {name: LimitStatus.from_json(one) for name, one in said["limits"].items()}
        connection = control = None
        return child, [run_fd, base_fd], limits, said["report"]
    finally:
        for fd in fds:
            os.close(fd)
        if connection is not None and control is not None:
            await asyncio.shield(asyncio.create_task(_given_up(connection, control)))


async def _given_up(connection: socket.socket, control: Control) -> None:
    """Hang up, and wait until the helper has removed what it had made."""
    with contextlib.suppress(OSError, WarmcellError):
        connection.shutdown(socket.SHUT_WR)
        while await control.line(GIVE_UP_S) is not None:
            pass
    control.close()


def described(prepared: Prepared, spec: SandboxSpec, sandbox_id: SandboxId) -> tuple[dict[str, Any], list[int]]:
    """What is asked of the helper, and the descriptors that go with it; the caller closes them.

    Raises:
        UnsupportedOperationError: The helper makes no such sandbox.
    """
    view = prepared.view
    if prepared.disk is not None:
        raise UnsupportedOperationError("Layers on disk are not the helper's", hint="Boot Linux 6.6 or newer.")
    fds: list[int] = []

    def opened(path: str | Path) -> int:
        fds.append(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
        return len(fds) - 1

    try:
        shown = _shown(prepared)
        trees = []
        for clone in view.clones:
            place, writable = shown.pop(clone["name"], ("", False))
            trees.append({"name": clone["name"], "fd": opened(clone["source"]), "target": place, "writable": writable})
        private_home = any(made["path"] == "home" for made in view.file_systems)
        if not private_home:
            source = view.entries[prepared.home]["host"]
            trees.append({"name": "own-home", "fd": opened(source), "target": prepared.home, "writable": True})
        overlays = [_overlay(prepared, made, shown) for made in view.overlays]
        request = {
            "op": "create",
            "id": sandbox_id,
            "named": prepared.named,
            "network": spec.network,
            "limits": spec.limits.to_json(),
            "python": str(prepared.python),
            "home": prepared.home,
            "private_home": private_home,
            "user": spec.user,
            "umask": spec.files_umask,
            "devices": [number for made in view.file_systems if made["path"] == SHARED for number in made["devices"]],
            "trees": trees,
            "overlays": overlays,
            "fills": [
                {
                    "fd": opened(made["source"]),
                    **{name: made[name] for name in ("path", "only_top", "most_bytes", "most_entries")},
                }
                for made in view.fills
            ],
            "links": _links(prepared),
            "covered": [target for target, made in view.entries.items() if made.get("own") == "nothing"],
            "skeleton": _skeleton(prepared, "home/"),
            "later": bool(view.pipes),
            "mounts": len(fds),
        }
        fds.append(os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC))
        if len(fds) > FDS_MAX:
            raise UnsupportedOperationError("There are too many mounts for the helper", hint="Give fewer mounts.")
        return request, fds
    except OSError as error:
        _close(fds)
        raise UnsupportedOperationError(f"{error.filename} cannot be opened: {error.strerror}") from error
    except BaseException:
        _close(fds)
        raise


def _shown(prepared: Prepared) -> dict[str, tuple[str, bool]]:
    """Of each thing on the stage that is shown: where, and whether it may be written."""
    found = {}
    for target, made in prepared.view.entries.items():
        made = made.get("ok", made)
        if "own" in made:
            found[made["own"]] = (target, made["mode"] == "rw")
        elif made.get("mode") == "dev" and target not in rootfs.NODES:
            raise UnsupportedOperationError("Sandboxes with GPUs are not the helper's", hint="Nothing has to be done.")
    return found


def _overlay(prepared: Prepared, made: Mapping[str, Any], shown: Mapping[str, tuple[str, bool]]) -> Mapping[str, Any]:
    name = made["name"]
    sizes = [one["options"] for one in prepared.view.file_systems if one["path"] == name]
    (size,) = (int(word.removeprefix("size=")) for word in sizes[0].split(",") if word.startswith("size="))
    (top,) = (one["mode"] for one in prepared.view.directories if one["path"] == made["upper"])
    return {
        "name": name,
        "lowers": made["lower"].split(":"),
        "target": shown[made["path"]][0],
        "size_bytes": size,
        "mode": top,
        "skeleton": _skeleton(prepared, f"{made['upper']}/"),
    }


def _skeleton(prepared: Prepared, below: str) -> list[str]:
    paths = [str(made["path"]) for made in prepared.view.directories]
    return [path.removeprefix(below) for path in paths if path.startswith(below)]


def _links(prepared: Prepared) -> dict[str, str]:
    """Those that lead to what the user asked for; the system's are the helper's own."""
    aliases = {link for alias in prepared.view.aliases for link in _parents(alias)} | {*prepared.view.links}
    return {
        target: made["link"] for target, made in prepared.view.entries.items() if "link" in made and target in aliases
    }


def _parents(path: Path) -> set[str]:
    from warmcell.sandbox.backends.places import links_on

    system = ("/usr", "/bin", "/sbin", "/lib", "/var/run", "/var/tmp")
    return {
        str(link)
        for link, _ in links_on(path)
        if not any(str(link) == own or str(link).startswith(f"{own}/") for own in system)
    }


async def _send(connection: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    try:
        sent = socket.send_fds(connection, [data], fds)
        await asyncio.get_running_loop().sock_sendall(connection, data[sent:])
    except BrokenPipeError:
        return  # It has refused already: what it said can still be read.
    except OSError as error:
        raise TransportError(f"The helper does not listen: {error}", hint="Try again.") from error


async def _hung_up(pidfd: int) -> None:
    """Until the process of a pidfd has ended."""
    loop = asyncio.get_running_loop()
    if select.select([pidfd], [], [], 0)[0]:
        return
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
