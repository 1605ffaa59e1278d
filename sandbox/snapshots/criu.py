"""The `criu` engine as the keeper has it: requests to the helper, which alone has the privileges.

A keeper of root's starts a helper of its own when it first needs one. Ordinary users' keepers talk with the system's.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    OperationTimeoutError,
    ProtocolError,
    SandboxNotFoundError,
    SnapshotError,
    TransportError,
    WarmcellError,
    from_json,
)
from warmcell.sandbox.helper.program import IMPORTS_VARIABLE, PLAIN_VARIABLE, VARIABLE
from warmcell.sandbox.helper.start import command
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.paths import Paths, private_directory
from warmcell.sandbox.reports import EngineReport
from warmcell.sandbox.snapshots.base import Dumped, ImageInfo, Place, Restored, Then
from warmcell.sandbox.snapshots.restorers import Restorers

log = logging.getLogger(__name__)

SYSTEM_SOCKET = Path("/run/warmcell-helper/helper.sock")
SOCKET_VARIABLE = "WARMCELL_HELPER_SOCKET"
QUICK_TIMEOUT_S, DUMP_TIMEOUT_S, RESTORE_TIMEOUT_S = 60.0, 900.0, 330.0
CLOSE_TIMEOUT_S = 150.0
SETTLE_TIMEOUT_S = 660.0
LINE_MAX_BYTES = 1 << 20
BACKLOG = 128
INSTALL = "Let root run `warmcell helper install`, once for the machine."


class Helper(Protocol):
    """Where requests go."""

    async def connect(self) -> socket.socket:
        """A connection to a helper that runs, not blocking.

        Raises:
            BackendUnavailableError: There is none and none can be started.
        """

    async def close(self) -> None:
        """End it, if it is ours."""


class SystemHelper:
    """The one of the machine."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or Path(os.environ.get(SOCKET_VARIABLE) or SYSTEM_SOCKET)

    async def connect(self) -> socket.socket:
        """See `Helper`."""
        try:
            return await connected(self._path)
        except OSError as error:
            raise BackendUnavailableError(
                f"Memory snapshots of ordinary users need the helper, which does not answer ({error.strerror})",
                hint=INSTALL,
            ) from error

    async def close(self) -> None:
        """It is not ours."""


class OwnHelper:
    """A helper of this keeper's, which ends with it. For root only."""

    def __init__(self, paths: Paths, *, quiet: bool = False) -> None:
        """Nothing is started yet. With `quiet` it logs nothing; else to our standard error."""
        self._paths = paths
        self._quiet = quiet
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline = -1
        self._starting = asyncio.Lock()

    async def connect(self) -> socket.socket:
        """See `Helper`."""
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                await self._start()
        try:
            return await connected(self._paths.helper_socket)
        except OSError as error:
            raise TransportError(f"The helper does not answer ({error.strerror})", hint="Try again.") from error

    async def close(self) -> None:
        """Let it finish what it does, and wait for its end."""
        process, self._process = self._process, None
        self._cut()
        if process is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        self._paths.helper_socket.unlink(missing_ok=True)

    async def _start(self) -> None:
        self._cut()
        path = self._paths.helper_socket
        private_directory(self._paths.images)
        with contextlib.ExitStack() as undo:
            opened = undo.enter_context(listening(path))
            reading, self._lifeline = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, reading)
            argv = command(sys.executable, listening=opened.fileno(), lifeline=reading, base=str(self._paths.images))
            self._process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL if self._quiet else None,
                pass_fds=[opened.fileno(), reading],
                env=helper_environment(),
                start_new_session=True,
            )

    def _cut(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket that listens there, for this user alone; closed in the end, with its file left."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        path.unlink(missing_ok=True)
        made.bind(str(path))
        path.chmod(0o600)
        made.listen(BACKLOG)
        yield made


@dataclass(frozen=True, slots=True)
class Talk:
    """A request under way."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    last_words: Callable[[], bytes] = bytes
    """What the helper has said elsewhere, should it say nothing here."""

    async def answer(self) -> Mapping[str, Any]:
        """The next answer.

        Raises:
            WarmcellError: It is an error.
        """
        said = await self.said()
        self.check(said)
        return said

    async def said(self) -> Mapping[str, Any]:
        """The next object that the helper sends.

        Raises:
            WarmcellError: There is none.
        """
        line = b""
        try:
            with contextlib.suppress(ConnectionError):
                line = await self.reader.readline()
            line = line or self.last_words()
            said = json.loads(line) if line else None
        except ValueError as error:
            raise ProtocolError(f"The helper answered what cannot be read: {error}") from error
        if said is None:
            raise SnapshotError("The helper ended in the middle of its work", hint="Try again; its log says more.")
        if not isinstance(said, dict):
            raise ProtocolError("The helper answered what is no object")
        return said

    @staticmethod
    def check(said: Mapping[str, Any]) -> None:
        """Raise what an answer stands for, if it is an error."""
        if said.get("ok") is not True:
            raise from_json(said)


class CriuEngine:
    """Implements `SnapshotEngine`."""

    name = "criu"
    whole = False

    def __init__(
        self,
        *,
        paths: Paths,
        helper: Helper | None = None,
        populate: bool = False,
        backends: tuple[str, ...] = (),
    ) -> None:
        """Configure it; nothing is started yet.

        Args:
            paths: The keeper's directories.
            helper: Where requests go; as root a helper of its own, else the system's, if None.
            populate: Begin to read all memory of what was restored from disk, see the port.
            backends: See the port. Their sandboxes need not be the helper's.
        """
        self.backends = backends
        self._populate = populate
        self._helper = helper or (OwnHelper(paths) if os.getuid() == 0 else SystemHelper())
        # A user may have several state directories, and the machine's helper has the images of all of them.
        self.store = hashlib.sha256(bytes(paths.state)).hexdigest()[:12]
        self._restorers = Restorers(self._helper.connect)

    async def probe(self) -> EngineReport:
        """Ask the helper, which tries once for each boot and version."""
        try:
            said = await self.ask_itself()
        except WarmcellError as error:
            return self._report(ready=False, why_not=error.message, hint=error.hint)
        if os.getuid() != 0 and not self.backends and said["ready"] and not said.get("makes"):
            why = str(said.get("makes_why_not") or "this helper makes no sandboxes for ordinary users")
            return self._report(ready=False, why_not=why, hint=INSTALL)
        details = {"criu": str(said["criu"]), "linux": str(said["kernel"]), "helper": str(said["version"])}
        return self._report(
            ready=bool(said["ready"]),
            why_not=str(said["why_not"]),
            hint=str(said["hint"]),
            details=details,
            by=str(said.get("by", "")),
        )

    def _report(self, *, ready: bool, **told: Any) -> EngineReport:
        return EngineReport(name=self.name, ready=ready, backends=self.backends, **told)

    async def ask_itself(self) -> Mapping[str, Any]:
        """What the helper says of itself.

        Raises:
            WarmcellError: It does not run.
        """
        return await self._ask({"op": "hello"})

    def maker(self, backend: SandboxBackend, image: SnapshotId | None) -> SandboxBackend:
        """The backend: a kernel comes back in any fresh sandbox."""
        return backend

    async def enroll(self, place: Place, *, template: bool = False) -> None:
        """See the port."""
        await self._ask({"op": "enroll", "template": template}, place=place)

    async def dump(
        self,
        place: Place,
        *,
        pid: int,
        image: SnapshotId,
        then: Then,
        while_frozen: Callable[[], Awaitable[None]],
        when_stopped: Callable[[], Awaitable[None]] | None = None,
        passing: bool = False,
    ) -> Dumped:
        """See the port."""
        request: dict[str, object] = {"op": "dump", "image": image, "pid": pid, "then": then, "store": self.store}
        if when_stopped is not None:
            request["early"] = True
        if passing:
            request["passing"] = True
        async with deadline("dump", DUMP_TIMEOUT_S), self.talk(request, place=place) as talk:
            said = await talk.answer()
            if when_stopped is not None and "stopped" in said:
                await when_stopped()
                said = await talk.answer()
                if said.get("renamed"):
                    await when_stopped()
            await while_frozen()
            talk.writer.write(b'{"thaw": true}\n')
            said = await talk.answer()
            if then == "stop":  # Ended only now that this is known here, and before the helper hangs up.
                with contextlib.suppress(ConnectionError):
                    await talk.reader.read()
        return Dumped(
            image_bytes=said["image_bytes"],
            memory_bytes=said["memory_bytes"],
            pids=tuple(said["pids"]),
            versions=said.get("versions", {}),
            ms=said["ms"],
        )

    async def restore(
        self, place: Place, *, image: SnapshotId, told: Callable[[int, int], None] | None = None
    ) -> Restored:
        """See the port."""
        with _pidfd(place.pid) as pidfd:
            async with (
                self._restorers.asked(image, pidfd) as (connection, restorer),
                _talking(connection, restorer.last_words) as talk,
            ):
                said = await follow(talk, "restore", told, timeout_s=RESTORE_TIMEOUT_S)
        if self._populate:
            try:
                await self.populate(image)
            except WarmcellError as error:  # It goes on without.
                log.warning("the memory of snapshot %s is not read in advance: %s", image, error.message)
        return Restored(pid=said["pid"], host_pid=said.get("host_pid", 0), ms=said["ms"])

    async def populate(self, image: SnapshotId) -> int:
        """See the port."""
        said = await self._ask({"op": "populate", "image": image})
        return int(said["bytes"])

    async def settle(self, image: SnapshotId) -> None:
        """See the port."""
        await self._ask({"op": "settle", "image": image}, timeout_s=SETTLE_TIMEOUT_S)

    async def images(self) -> list[ImageInfo]:
        """See the port."""
        said = await self._ask({"op": "images", "store": self.store})
        return [
            ImageInfo(
                id=SnapshotId(one["id"]),
                image_bytes=one["bytes"],
                created_at=one["created_at"],
                shared_bytes=one.get("shared", 0),
                compressed=one.get("packed", False),
            )
            for one in said["images"]
        ]

    async def drop(self, image: SnapshotId) -> None:
        """See the port."""
        self._restorers.close(image)
        await self._ask({"op": "drop", "image": image})

    async def close(self) -> None:
        """See the port."""
        self._restorers.close()
        await self._helper.close()

    async def _ask(
        self, request: Mapping[str, Any], *, place: Place | None = None, timeout_s: float = QUICK_TIMEOUT_S
    ) -> Mapping[str, Any]:
        async with deadline(request["op"], timeout_s), self.talk(request, place=place) as talk:
            return await talk.answer()

    @contextlib.asynccontextmanager
    async def talk(self, request: Mapping[str, Any], *, place: Place | None = None) -> AsyncIterator[Talk]:
        with contextlib.ExitStack() as held:
            fds = [] if place is None else [held.enter_context(_pidfd(place.pid))]
            connection = await self._helper.connect()
            try:
                with contextlib.suppress(BrokenPipeError):  # It has refused already: what it said can still be read.
                    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], fds)
            except OSError as error:
                connection.close()
                raise TransportError(f"The helper does not listen ({error.strerror})", hint="Try again.") from error
            async with _talking(connection) as talk:
                yield talk


@contextlib.asynccontextmanager
async def _talking(connection: socket.socket, last_words: Callable[[], bytes] = bytes) -> AsyncIterator[Talk]:
    """Read what is answered there; the connection is closed in the end."""
    try:
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=LINE_MAX_BYTES)
    except BaseException:
        connection.close()
        raise
    try:
        yield Talk(reader, writer, last_words)
    finally:
        writer.close()


async def hello(helper: Helper) -> Mapping[str, Any]:
    """What a helper says of itself.

    Raises:
        WarmcellError: It does not run.
    """
    return await CriuEngine(paths=Paths.default(), helper=helper).ask_itself()


def helper_environment() -> dict[str, str]:
    """What a helper of ours is given: where to look for CRIU. One in this virtual environment comes first."""
    names = ("PATH", VARIABLE, PLAIN_VARIABLE, IMPORTS_VARIABLE)
    kept = {name: os.environ[name] for name in names if os.environ.get(name)}
    carried = Path(sys.prefix) / "criu"
    if (carried / "sbin" / "criu").is_file():
        kept.setdefault(VARIABLE, str(carried))
    return kept


async def connected(path: Path) -> socket.socket:
    """A connection to who listens there, not blocking.

    Raises:
        OSError: Nobody does.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, str(path))
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise SandboxNotFoundError("The sandbox has ended", hint="Start the kernel anew.") from error
    try:
        yield pidfd
    finally:
        os.close(pidfd)


async def follow(
    talk: Talk, operation: str, told: Callable[[int, int], None] | None, *, timeout_s: float
) -> Mapping[str, Any]:
    """The last answer; `told` how many bytes are done, of how many, as long as there is another before it."""
    while True:
        async with deadline(operation, timeout_s):
            said = await talk.answer()
        if "done" not in said:
            return said
        if told is not None:
            told(int(said["done"]), int(said["of"]))


@contextlib.asynccontextmanager
async def deadline(operation: str, timeout_s: float) -> AsyncIterator[None]:
    """The block may take so long; then it is an `OperationTimeoutError`."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        if isinstance(error, WarmcellError):
            raise
        raise OperationTimeoutError(
            f"The snapshot helper did not finish {operation} in {timeout_s:.0f} s",
            hint="Its log says what it waits for.",
            details={"operation": operation, "timeout": timeout_s},
        ) from error
