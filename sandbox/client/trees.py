"""Folders on their way between this machine and a sandbox, as tars. What comes from a sandbox is not trusted."""

import contextlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from warmcell.sandbox.errors import InvalidRequestError

PIECE_BYTES = 2**20
IN_MEMORY_BYTES = 8 * 2**20
HEAD_MAX_BYTES = 64 * 1024
"""Of what says a name that is too long for a member's own head, and the like."""

HEADS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


def packed(folder: Path) -> BinaryIO:
    """A tar of what is in a folder, to be read from its beginning. Links stay links; sockets and the like are left out.

    Raises:
        OSError: Something in it cannot be read.
    """
    file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES)  # noqa: SIM115 - whoever asks closes it.
    try:
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, arcname=path.name, filter=lambda member: None if member.isdev() else member)
    except BaseException:
        file.close()
        raise
    return file  # type: ignore[return-value]


def pieces(file: BinaryIO) -> Iterator[bytes]:
    """All of a file from its beginning, piece by piece."""
    file.seek(0)
    while piece := file.read(PIECE_BYTES):
        yield piece


def unpack(archive: BinaryIO, folder: Path) -> list[str]:
    """Write the files and folders of a tar below a folder, which is made; nothing outside it is touched.

    Links, devices and the like are not made, so no name in the tar leads anywhere else. Nor are sparse files, so that
    what is written is no larger than the tar.

    Returns:
        The names of what was left out.

    Raises:
        InvalidRequestError: It is no tar.
        OSError: Something cannot be written.
    """
    archive.seek(0)
    left: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=archive, mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                plain = member.isfile() and not member.issparse()  # A few bytes of a sparse one may fill a disk.
                if not (plain or member.isdir()) or not parts or ".." in parts or member.name.startswith("/"):
                    left.append(member.name)
                    continue
                content = tar.extractfile(member) if plain else None
                _write(folder, parts, member.mode, content)
    except (tarfile.TarError, ValueError, RecursionError) as error:  # A name with a null byte; heads upon heads.
        raise InvalidRequestError(f"What came is no tar: {error}", hint="Download it again.") from error
    return left


class _Member(tarfile.TarInfo):
    """One whose head is of bounded size: tarfile would have all of it in memory, whatever it says of itself."""

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:  # TarInfo's own hook
        if self.type == tarfile.GNUTYPE_SPARSE or (self.type in HEADS and self.size > HEAD_MAX_BYTES):
            raise tarfile.ReadError(f"{self.name!r:.80} is no head that a tar of a sandbox has")
        made: tarfile.TarInfo = super()._proc_member(tarfile_)  # type: ignore[misc]
        return made

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError(f"{self.name!r:.80} has its map where its content should be")


def _write(folder: Path, parts: list[str], mode: int, content: IO[bytes] | None) -> None:
    """One file or folder, each step of its path opened without following links."""
    with contextlib.ExitStack() as opened:
        here = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        opened.callback(os.close, here)
        for part in parts[:-1] if content is not None else parts:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=here)
            here = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            opened.callback(os.close, here)
        if content is None:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(parts[-1], dir_fd=here)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        number = os.open(parts[-1], flags, 0o600, dir_fd=here)
        with os.fdopen(number, "wb") as file:
            shutil.copyfileobj(content, file)
            os.fchmod(file.fileno(), 0o644 | (mode & 0o111))
