"""The files of a sandbox, for code without an event loop."""

import builtins
import os
from pathlib import Path

from warmcell.sandbox.client.core_files import CoreFiles
from warmcell.sandbox.client.results import FileInfo
from warmcell.sandbox.client.transport import now
from warmcell.sandbox.client.watching import CoreWatch, Watch


class Files:
    """All is done by a process in the sandbox: whatever a path leads to is what the sandbox sees.

    Paths are absolute or relative to the sandbox's home. Each may raise SandboxFileNotFoundError, ConflictError
    (`details["errno"]` says why: it exists, is a directory, is not permitted) and CapacityError (no space).
    """

    def __init__(self, core: CoreFiles) -> None:
        self._core = core

    def read(self, path: str) -> bytes:
        """The content of a file."""
        return now(self._core.read(path))

    def read_text(self, path: str) -> str:
        """The content of a file, in UTF-8."""
        return self.read(path).decode()

    def write(self, path: str, data: bytes | str, *, mode: int | None = None) -> FileInfo:
        """Its content is this from now on; nobody sees a part of it. Folders on the way are made."""
        return now(self._core.write(path, data, mode))

    def list(self, path: str = ".", *, depth: int = 1) -> "builtins.list[FileInfo]":
        """What is in a folder, and so many levels below it: all of it, in pages of 10,000.

        Raises:
            CapacityError: There are more than a hundred pages.
            WarmcellError: The folder cannot be listed.
        """
        return now(self._core.listing(path, depth))

    def stat(self, path: str) -> FileInfo:
        """What a path is; a link is not followed."""
        return now(self._core.stat(path))

    def exists(self, path: str) -> bool:
        """Whether anything is there."""
        return now(self._core.exists(path))

    def mkdir(self, path: str) -> bool:
        """Make a folder, those above it included; False if it was there."""
        return now(self._core.mkdir(path))

    def move(self, source: str, target: str) -> FileInfo:
        """Another name for it; what has that name already is not replaced."""
        return now(self._core.move(source, target))

    def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file, an empty folder, or with `recursive` all of a folder."""
        now(self._core.remove(path, recursive))

    def upload(self, source: str | os.PathLike[str], target: str) -> None:
        """Copy a file, or what is in a folder, from here into the sandbox."""
        now(self._core.upload(Path(source), target))

    def download(self, source: str, target: str | os.PathLike[str]) -> "builtins.list[str]":
        """Copy a file, or what is in a folder, from the sandbox to here.

        Links and special files are left out: they might lead anywhere.

        Returns:
            The names of what was left out.
        """
        return now(self._core.download(source, Path(target)))

    def download_url(self, path: str, *, tree: bool = False, expires: float = 3600.0) -> str:
        """A URL that reads one file, or with `tree` a folder as a tar, without a token.

        It is good for that alone, for so many seconds (a week at most), and no longer than the token that it was made
        with.

        Raises:
            UnsupportedOperationError: The sandbox is had from the user's keeper, which browsers do not reach.
        """
        return now(self._core.url(path, "read", tree, expires))

    def upload_url(self, path: str, *, tree: bool = False, expires: float = 3600.0) -> str:
        """A URL that writes, with PUT, one file, or with `tree` a folder as a tar, without a token.

        It is good for that alone, for so many seconds (a week at most), and no longer than the token that it was made
        with.

        Raises:
            UnsupportedOperationError: The sandbox is had from the user's keeper, which browsers do not reach.
        """
        return now(self._core.url(path, "write", tree, expires))

    def watch(self, path: str = ".", *, recursive: bool = False, timeout: float | None = None) -> Watch:
        """What changes in a folder from now on, in the order in which it does.

            with box.files.watch("results") as changes:
                for change in changes:
                    print(change.kind, change.name)

        `with` begins when it watches. It goes on across connections that break.

        Args:
            path: The folder.
            recursive: Also in those below it, new ones included.
            timeout: Seconds after which there is an end. None: not by itself.

        Raises:
            SandboxFileNotFoundError: It is not there (at `with`).
            ConflictError: It is no folder, or the system watches too much already.
        """
        return Watch(CoreWatch(self._core.calls, self._core.path, path, recursive=recursive, timeout_s=timeout))
