"""The files of a sandbox, for an event loop."""

import builtins
import os
from pathlib import Path

from warmcell.sandbox.client.core_files import CoreFiles
from warmcell.sandbox.client.results import FileInfo
from warmcell.sandbox.client.watching import AsyncWatch, CoreWatch


class AsyncFiles:
    """`Files` for an event loop."""

    def __init__(self, core: CoreFiles) -> None:
        self._core = core

    async def read(self, path: str) -> bytes:
        """As `Files.read`."""
        return await self._core.read(path)

    async def read_text(self, path: str) -> str:
        """As `Files.read_text`."""
        return (await self.read(path)).decode()

    async def write(self, path: str, data: bytes | str, *, mode: int | None = None) -> FileInfo:
        """As `Files.write`."""
        return await self._core.write(path, data, mode)

    async def list(self, path: str = ".", *, depth: int = 1) -> "builtins.list[FileInfo]":
        """As `Files.list`."""
        return await self._core.listing(path, depth)

    async def stat(self, path: str) -> FileInfo:
        """As `Files.stat`."""
        return await self._core.stat(path)

    async def exists(self, path: str) -> bool:
        """As `Files.exists`."""
        return await self._core.exists(path)

    async def mkdir(self, path: str) -> bool:
        """As `Files.mkdir`."""
        return await self._core.mkdir(path)

    async def move(self, source: str, target: str) -> FileInfo:
        """As `Files.move`."""
        return await self._core.move(source, target)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """As `Files.remove`."""
        await self._core.remove(path, recursive)

    async def upload(self, source: str | os.PathLike[str], target: str) -> None:
        """As `Files.upload`."""
        await self._core.upload(Path(source), target)

    async def download(self, source: str, target: str | os.PathLike[str]) -> "builtins.list[str]":
        """As `Files.download`."""
        return await self._core.download(source, Path(target))

    async def download_url(self, path: str, *, tree: bool = False, expires: float = 3600.0) -> str:
        """As `Files.download_url`."""
        return await self._core.url(path, "read", tree, expires)

    async def upload_url(self, path: str, *, tree: bool = False, expires: float = 3600.0) -> str:
        """As `Files.upload_url`."""
        return await self._core.url(path, "write", tree, expires)

    def watch(self, path: str = ".", *, recursive: bool = False, timeout: float | None = None) -> AsyncWatch:
        """As `Files.watch`."""
        return AsyncWatch(CoreWatch(self._core.calls, self._core.path, path, recursive=recursive, timeout_s=timeout))
