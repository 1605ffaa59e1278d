"""REST of what is in the snapshot store: look, name, remove, take out, bring in. Handlers translate, no more."""

import asyncio
import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import IO, Any

from tornado import web
from tornado.iostream import StreamClosedError

from warmcell.extension.keeper.gate import own_snapshots
from warmcell.extension.keeper.http import JsonHandler
from warmcell.sandbox.errors import ConflictError, InvalidRequestError, UnsupportedOperationError, WarmcellError
from warmcell.sandbox.models import SandboxId, SnapshotId, SnapshotInfo
from warmcell.sandbox.snapshots import disk
from warmcell.sandbox.snapshots.archive import NO_MEMORY, ImagePort, export_snapshot, import_snapshot
from warmcell.sandbox.snapshots.compressing import Compressor
from warmcell.sandbox.snapshots.store import SnapshotStore
from warmcell.sandbox.snapshots.verifying import Verifier

IMPORT_MAX_BYTES = 2**40
ARCHIVE_TYPE = "application/zstd"
LINES_TYPE = "application/x-ndjson"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotsApi:
    """What these handlers work with; the application's setting `snapshots`."""

    store: SnapshotStore
    images: ImagePort | None = None
    """Takes memory out and brings it in. None: archives are of files alone."""
    compressor: Compressor | None = None
    imports: bool = False
    """Whether snapshots from elsewhere may be brought in: c.Warmcell.import_snapshots."""


def routes() -> list[tuple[str, type[JsonHandler]]]:
    """Paths below the API's prefix, for the user's own processes only."""
    return [
        (r"/snapshots", SnapshotsHandler),
        (r"/snapshots/import", ImportHandler),
        (r"/snapshots/([^/]+)", SnapshotHandler),
        (r"/snapshots/([^/]+)/export", ExportHandler),
        (r"/snapshots/([^/]+)/verify", VerifyHandler),
        (r"/snapshots/([^/]+)/compress", CompressHandler),
    ]


class _Handler(JsonHandler):
    @property
    def api(self) -> SnapshotsApi:
        api: SnapshotsApi = self.settings["snapshots"]
        return api

    def snapshot_id(self, ref: str) -> SnapshotId:
        """The id of the snapshot of this id or name; with `kernel_id` or `sandbox_id` a name is looked for there."""
        sandbox_id, kernel_id = self._scope()
        return self.api.store.get(ref, sandbox_id=sandbox_id, kernel_id=kernel_id).info.id

    def flag(self, name: str) -> bool:
        """A query argument that is there and not 0 or false."""
        return self.get_query_argument(name, "0").lower() not in {"0", "false", ""}

    def _scope(self) -> tuple[SandboxId | None, str | None]:
        sandbox_id = self.get_query_argument("sandbox_id", None)
        return SandboxId(sandbox_id) if sandbox_id else None, self.get_query_argument("kernel_id", None) or None


class SnapshotsHandler(_Handler):
    """All snapshots, or those of a sandbox or kernel."""

    def get(self) -> None:
        sandbox_id, kernel_id = self._scope()
        infos = own_snapshots(self.principal, self.api.store.infos(sandbox_id=sandbox_id, kernel_id=kernel_id))
        if self.principal is not None:
            self.answer({"snapshots": [info.to_json() for info in infos]})
            return
        store = self.api.store
        unusable = {one.id: one.error.to_json() for one in store.unreadable}
        unusable |= {one: error.to_json() for one, error in store.damaged.items()}
        if sandbox_id is not None or kernel_id is not None:
            unusable = {}
        self.answer(
            {
                "snapshots": [info.to_json() for info in infos],
                "unreadable": [{"id": one, "error": error} for one, error in unusable.items()],
                "used_bytes": self.api.store.used_bytes,
                "quota_bytes": self.api.store.quota_bytes,
                "imports": self.api.imports,
            }
        )


class SnapshotHandler(_Handler):
    """One snapshot, by id or name."""

    def get(self, ref: str) -> None:
        self.answer(self.api.store.get(self.snapshot_id(ref)).info.to_json())

    async def patch(self, ref: str) -> None:
        body = self.body()
        name = body.get("name")
        if not isinstance(name, str) or set(body) != {"name"}:
            raise InvalidRequestError("A snapshot's name is all that can be changed", hint='Send {"name": "..."}.')
        self.answer((await self.api.store.rename(self.snapshot_id(ref), name)).to_json())

    async def delete(self, ref: str) -> None:
        store = self.api.store
        broken = {str(one.id): one.id for one in store.unreadable}
        snapshot_id = broken.get(ref) or self.snapshot_id(ref)
        if snapshot_id not in broken and store.get(snapshot_id).info.kind == "suspended" and not self.flag("force"):
            raise ConflictError(
                f"Snapshot {snapshot_id} is all that there is of a suspended kernel",
                hint="Shut the kernel down in Jupyter, or remove it with `warmcell snapshots rm --force`.",
            )
        await store.remove(snapshot_id)
        self.set_status(204)
        self.finish()


class VerifyHandler(_Handler):
    """Read all of a snapshot, files and memory, and compare it with its sums."""

    async def post(self, ref: str) -> None:
        snapshot_id = self.snapshot_id(ref)
        verifier = Verifier(self.api.store, self.api.images)
        self.answer({"id": snapshot_id, "complete": await self.unless_gone(verifier.verify(snapshot_id))})


class CompressHandler(_Handler):
    """Make a snapshot smaller, until it is used again: lines that say how far it is, and the last one what it is then.

    What cannot be done at all is answered with its own status; nothing is said before it has begun.
    """

    async def post(self, ref: str) -> None:
        snapshot_id, compressor = self.snapshot_id(ref), self.api.compressor
        if compressor is None:
            raise UnsupportedOperationError("Snapshots are not compressed here", hint="Ask the keeper that has them.")
        said: list[dict[str, Any]] = []
        more = asyncio.Event()

        def told(done: int, of: int) -> None:
            said[:] = [{"done": done, "of": of}]  # Only the last one counts.
            more.set()

        with contextlib.suppress(StreamClosedError):
            await self.unless_gone(self._tell(compressor.compress(snapshot_id, told), said, more))

    async def _tell(
        self, work: Coroutine[Any, Any, SnapshotInfo], said: list[dict[str, Any]], more: asyncio.Event
    ) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda done: more.set())
        try:
            await more.wait()
            if not said:
                await task  # Raises what it refused with.
            self.set_header("Content-Type", LINES_TYPE)
            while not task.done():
                more.clear()
                await self._send(*said)
                await more.wait()
            try:
                await self._send({"snapshot": (await task).to_json()})
            except WarmcellError as error:
                await self._send({"error": error.to_json()})
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.finish()

    async def _send(self, *lines: dict[str, Any]) -> None:
        self.write("".join(json.dumps(line) + "\n" for line in lines))
        await self.flush()


class ExportHandler(_Handler):
    """A snapshot as one file, while it is made; `files_only=1` leaves the memory out."""

    async def get(self, ref: str) -> None:
        snapshot_id = self.snapshot_id(ref)
        info = self.api.store.get(snapshot_id).info
        images = None if self.flag("files_only") else self.api.images
        if images is None and not self.flag("files_only") and info.engine != NO_MEMORY:
            raise UnsupportedOperationError(
                f"The {info.engine} engine cannot take a kernel's memory out",
                hint="Export the snapshot's files alone with `--files-only`.",
            )
        await self.unless_gone(self._send(snapshot_id, images))

    async def _send(self, snapshot_id: SnapshotId, images: ImagePort | None) -> None:
        self.set_header("Content-Type", ARCHIVE_TYPE)
        try:
            async with contextlib.aclosing(export_snapshot(self.api.store, snapshot_id, images=images)) as pieces:
                async for piece in pieces:
                    if piece:
                        self.write(piece)
                        await self.flush()
        except WarmcellError:
            if not self._headers_written:
                raise
            # Too late for an answer: an archive that breaks off says that it is none.
            connection: Any = self.request.connection
            connection.stream.close()
            raise
        except StreamClosedError:
            return
        self.finish()


@web.stream_request_body
class ImportHandler(_Handler):
    """A file from an export becomes a snapshot; query `name` gives it another name."""

    _file: "IO[bytes] | None" = None
    _failed: OSError | None = None

    def prepare(self) -> None:
        super().prepare()
        if self.refused:
            return
        if not self.api.imports:
            raise UnsupportedOperationError(
                "Snapshots from elsewhere are not taken here: a snapshot decides what runs when it is restored",
                hint="If you trust where it comes from, set c.Warmcell.import_snapshots = True.",
            )
        connection: Any = self.request.connection
        connection.set_max_body_size(IMPORT_MAX_BYTES)

    async def data_received(self, chunk: bytes) -> None:
        """A part of the file has come (tornado's hook)."""
        if self._failed is not None:
            return  # The answer can only be given when all has come.
        try:
            if self._file is None:
                self._file = await asyncio.to_thread(_spool, self.api.store.root)
            await asyncio.to_thread(self._file.write, chunk)
        except OSError as error:
            self._failed = error

    async def post(self) -> None:
        if self._failed is not None:
            raise disk.failure(self._failed, "take the archive") from self._failed
        if self._file is None:
            raise InvalidRequestError("The request has no archive", hint="Send what an export gave as the body.")
        try:
            await asyncio.to_thread(self._file.flush)
        except OSError as error:
            raise disk.failure(error, "take the archive") from error
        path = Path(f"/proc/self/fd/{self._file.fileno()}")
        name = self.get_query_argument("name", "")
        done = import_snapshot(self.api.store, path, images=self.api.images, name=name)
        self.answer((await self.unless_gone(done)).to_json(), 201)

    def on_finish(self) -> None:
        """The answer is out, or nobody waits for it (tornado's hook)."""
        super().on_finish()
        if self._file is not None:
            self._file.close()

    def on_connection_close(self) -> None:
        """The caller has gone (tornado's hook)."""
        super().on_connection_close()
        self.on_finish()


def _spool(directory: Path) -> IO[bytes]:
    """A file without a name on the store's disk: gone with its descriptor."""
    return tempfile.TemporaryFile(dir=directory, prefix=f".import-{os.getpid()}-")
