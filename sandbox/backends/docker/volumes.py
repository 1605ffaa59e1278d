"""What an image has at the places of its volumes: a sandbox's own files there begin with it, as the engine's would.

It is asked of the engine while the container is made and not yet started: from then on the sandbox's memory covers it.
"""

import contextlib
import errno
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO

from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.backends.trees import beneath
from warmcell.sandbox.errors import CapacityError, SandboxStartError, WarmcellError

RIGHTS = 0o1777
"""What of a mode is kept: files become the guest's, so nothing of theirs may be a right of somebody else's."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_ELSEWHERE = frozenset({errno.EXDEV, errno.ENOENT})
"""Something else is mounted there, or its directory was left out for that reason."""


@contextlib.contextmanager
def taken(engine: Engine, container: str, path: str, *, most_bytes: int) -> Iterator[IO[bytes]]:
    """What the image has at `path`, as a tar archive. Blocks, for about a tenth of a second.

    Args:
        engine: Which has the container.
        container: One that is not started yet.
        path: Absolute, in it; links are followed.
        most_bytes: Of the files; an archive may be a little larger.

    Raises:
        CapacityError: It is larger, or the host has no room for it.
        SandboxStartError: The engine does not tell.
    """
    with tempfile.TemporaryFile() as archive:
        with engine.client() as client:  # What goes wrong later is none of the engine's.
            try:
                pieces, _ = client.get_archive(container, f"{path}/.")
            except engine.errors().APIError as error:
                raise SandboxStartError(
                    f"The container engine does not tell what the image has in its volume {path}: {error.explanation}",
                    hint="Its log says more: `journalctl -u docker`.",
                ) from None
            for piece in pieces:
                _write(archive, piece)
                if archive.tell() > 2 * most_bytes:
                    raise too_large(path, most_bytes)
        archive.seek(0)
        yield archive


def _write(archive: IO[bytes], piece: bytes) -> None:
    try:
        archive.write(piece)
        archive.flush()
    except OSError as error:
        if is_full(error):
            raise CapacityError(
                f"There is no room in {tempfile.gettempdir()} for what the image has in its volumes",
                hint="Free space there, or set TMPDIR to another directory for the keeper.",
            ) from None
        raise


def put(archive: IO[bytes], top: int, *, owner: tuple[int, int] | None) -> None:
    """Put files, directories and links of an archive into the directory `top`, which is empty. Blocks.

    Args:
        archive: As `taken` gives it.
        top: A handle.
        owner: Whose they become, None for whoever this process is.

    Raises:
        SandboxStartError: The archive is not one of a directory.
        OSError: They have no room.
    """
    modes: list[tuple[str, tarfile.TarInfo]] = []
    try:
        with tarfile.open(fileobj=archive, mode="r:") as members:
            for member in members:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise _strange(member.name)
                if path.name and (member.isdir() or member.isfile() or member.issym() or member.islnk()):
                    with contextlib.suppress(_Elsewhere), _opened(top, str(path.parent)) as parent:
                        _make(members, member, path.name, parent, top, owner)
                        if member.isdir():
                            modes.append((str(path), member))
        for name, member in reversed(modes):  # What has no right to be written to is made like others, and filled.
            with contextlib.suppress(_Elsewhere), _opened(top, name) as handle:
                os.fchmod(handle, member.mode & RIGHTS)
                os.utime(handle, (member.mtime, member.mtime))
    except tarfile.TarError as error:
        raise _strange(str(error)) from None


def too_large(path: str, most_bytes: int) -> WarmcellError:
    """For an image whose volume has more than a sandbox may."""
    return CapacityError(
        f"What the image has in its volume {path} does not fit into the {most_bytes:,} bytes that the sandbox may have",
        hint="Raise its layer_bytes, or mount a folder there.",
    )


def is_full(error: OSError) -> bool:
    """Whether it says that there is no room."""
    return error.errno in _FULL


class _Elsewhere(Exception):
    """It would not lie in the directory that is filled."""


@contextlib.contextmanager
def _opened(top: int, path: str) -> Iterator[int]:
    try:
        handle = beneath(top, path)
    except OSError as error:
        if error.errno in _ELSEWHERE:
            raise _Elsewhere from None
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _strange(path) from None
        raise
    try:
        yield handle
    finally:
        os.close(handle)


def _make(
    members: tarfile.TarFile, member: tarfile.TarInfo, name: str, parent: int, top: int, owner: tuple[int, int] | None
) -> None:
    if member.isdir():
        with contextlib.suppress(FileExistsError):  # Another volume is mounted there.
            os.mkdir(name, 0o700, dir_fd=parent)
    elif member.issym():
        os.symlink(member.linkname, name, dir_fd=parent)
    elif member.islnk():
        other = PurePosixPath(member.linkname)
        with _opened(top, str(other.parent)) as source:
            os.link(other.name, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        return
    else:
        content = members.extractfile(member)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=parent), "wb") as file:
            if content is not None:
                shutil.copyfileobj(content, file)
            file.flush()
            os.fchmod(file.fileno(), member.mode & RIGHTS)
            os.utime(file.fileno(), (member.mtime, member.mtime))
    if owner is not None:
        os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)


def _strange(what: str) -> WarmcellError:
    return SandboxStartError(
        f"The container engine gives an archive that is none of a directory: {what}",
        hint="Its log says more: `journalctl -u docker`.",
    )
