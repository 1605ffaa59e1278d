"""What can be done with the files of a sandbox, once for both flavours."""

import contextlib
import errno
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from warmcell.sandbox.client import _api, given, trees
from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.client.results import FileInfo
from warmcell.sandbox.errors import CapacityError, SandboxFileNotFoundError

PAGES_MAX = 100
"""Of one listing: a million files. What runs in the sandbox can make more for as long as somebody lists them."""


class CoreFiles:
    """Those of one sandbox."""

    def __init__(self, calls: Calls, path: str) -> None:
        self.calls = calls
        self.transport = calls.transport
        self.path = path

    async def read(self, path: str) -> bytes:
        parts = [piece async for piece in self.calls.download(f"{self.path}/files", {"path": path})]
        return b"".join(parts)

    async def write(self, path: str, data: bytes | str, mode: int | None) -> FileInfo:
        content = given.as_bytes(data)
        params = {"path": path} if mode is None else {"path": path, "mode": str(mode)}
        said = await self.calls.call("PUT", f"{self.path}/files", params=params, content=content, timeout_s=None)
        return self._file(said)

    async def listing(self, path: str, depth: int) -> list[FileInfo]:
        params = {"path": path, "depth": str(depth)}
        found: list[FileInfo] = []
        pages: set[str] = set()
        for _ in range(PAGES_MAX):
            said = await self.calls.call("GET", f"{self.path}/files/list", params=params)
            found += [self._file(one) for one in _api.field(said, "files", list, self.calls.who)]
            if said.get("next") is None:
                return found
            params["after"] = _api.field(said, "next", str, self.calls.who)
            if params["after"] in pages:
                raise _api.odd(self.calls.who, "the same page comes again")
            pages.add(params["after"])
        raise CapacityError(
            f"There are more files in {path} than one list may have: {len(found)} are not all",
            hint="List fewer levels at once, or have code in the sandbox look for what you need.",
        )

    async def stat(self, path: str) -> FileInfo:
        return self._file(await self.calls.call("GET", f"{self.path}/files/stat", params={"path": path}))

    async def exists(self, path: str) -> bool:
        try:
            await self.stat(path)
        except SandboxFileNotFoundError:
            return False
        return True

    async def mkdir(self, path: str) -> bool:
        said = await self.calls.call("POST", f"{self.path}/files/mkdir", json={"path": path}, key=uuid.uuid4().hex)
        return _api.field(said, "created", bool, self.calls.who)

    async def move(self, source: str, target: str) -> FileInfo:
        body = {"source": source, "target": target}
        return self._file(await self.calls.call("POST", f"{self.path}/files/move", json=body))

    async def remove(self, path: str, recursive: bool) -> None:
        params = {"path": path, "recursive": "1" if recursive else "0"}
        await self.calls.call("DELETE", f"{self.path}/files", params=params)

    async def url(self, path: str, operation: str, tree: bool, expires_s: float) -> str:
        body = {"path": path, "operation": operation, "tree": tree, "expires_in_s": expires_s}
        self.transport.where.absolute("")  # Before anything is made.
        said = await self.calls.call("POST", f"{self.path}/files/url", json=body, key=uuid.uuid4().hex)
        return self.transport.where.absolute(_api.field(said, "path", str, self.calls.who))

    async def upload(self, source: Path, target: str) -> None:
        folder = await self.transport.off_loop(source.is_dir)
        where = f"{self.path}/files/tree" if folder else f"{self.path}/files"
        opening: Callable[[], BinaryIO] = (lambda: trees.packed(source)) if folder else (lambda: source.open("rb"))
        with contextlib.closing(await self.transport.off_loop(opening)) as file:
            content = lambda: trees.pieces(file)  # noqa: E731
            await self.calls.call("PUT", where, params={"path": target}, content=content, timeout_s=None)

    async def download(self, source: str, target: Path) -> list[str]:
        found = await self.calls.call("GET", f"{self.path}/files/stat", params={"path": source, "follow": "1"})
        folder = self._file(found).type == "directory"
        where = f"{self.path}/files/tree" if folder else f"{self.path}/files"
        if not folder:
            await self.transport.off_loop(lambda: _make_way(target))
            work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
            try:
                with await self.transport.off_loop(lambda: work.open("xb")) as file:
                    await self._fetch(where, source, file)
                await self.transport.off_loop(lambda: work.replace(target))
            finally:
                work.unlink(missing_ok=True)
            return []
        with tempfile.TemporaryFile() as archive:
            await self._fetch(where, source, cast(BinaryIO, archive))
            return await self.transport.off_loop(lambda: trees.unpack(cast(BinaryIO, archive), target))

    def _file(self, said: object) -> FileInfo:
        return _api.told(FileInfo, said, self.calls.who)

    async def _fetch(self, where: str, path: str, file: BinaryIO) -> None:
        async for piece in self.calls.download(where, {"path": path}):
            await self.transport.off_loop(lambda piece=piece: file.write(piece))  # type: ignore[misc]


def _make_way(target: Path) -> None:
    """Have a folder for what comes; raises IsADirectoryError where a folder has its very name."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{os.strerror(errno.EISDIR)}: name the file in it", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
