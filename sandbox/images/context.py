"""The files beside a Dockerfile, as part of the declaration: their contents are, so they decide its digest."""

import base64
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import MIB
from warmcell.sandbox.wire import Wire

CONTEXT_MAX_BYTES = 8 * MIB
IGNORE = ".dockerignore"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextFile(Wire):
    """One file or link."""

    path: str
    """Relative to the context, with slashes."""
    base64: str = ""
    executable: bool = False
    link: str = ""
    """What a symbolic link says; a file's is empty."""

    @property
    def content(self) -> bytes:
        """The bytes of it."""
        return base64.b64decode(self.base64)


def check_context(files: Sequence[ContextFile]) -> None:
    """See that they are files of one folder.

    Raises:
        InvalidRequestError: A path leads out of it or is there twice, or they are too large.
    """
    seen: set[str] = set()
    size = 0
    for file in files:
        path = PurePosixPath(file.path)
        plain = str(path) == file.path and not path.is_absolute() and ".." not in path.parts and file.path != "."
        if not plain or "\0" in file.path + file.link or file.path in seen:
            raise InvalidRequestError(
                f"{file.path!r} is no file of the Dockerfile's folder", hint="Give each path once, relative to it."
            )
        seen.add(file.path)
        try:
            size += len(base64.b64decode(file.base64, validate=True))
        except ValueError as error:
            raise InvalidRequestError(f"{file.path} is not in base64", hint="Encode its content.") from error
    if size > CONTEXT_MAX_BYTES:
        raise _too_large()


def read_context(directory: Path) -> tuple[ContextFile, ...]:
    """The files of a folder, by path, less those that its .dockerignore names. Blocks.

    Raises:
        InvalidRequestError: It cannot be read, or is too large.
    """
    try:
        ignore = Ignore((directory / IGNORE).read_text() if (directory / IGNORE).exists() else "")
        found: list[ContextFile] = []
        left = CONTEXT_MAX_BYTES
        for top, folders, names in os.walk(directory):
            inside = Path(top).relative_to(directory)
            linked = [name for name in folders if Path(top, name).is_symlink()]
            folders[:] = sorted(
                name for name in folders if name not in linked and not ignore.whole_folder((inside / name).as_posix())
            )
            for name in sorted([*names, *linked]):
                path = (inside / name).as_posix()
                if not ignore.matches(path):
                    file = _read(Path(top, name), path, left)
                    left -= len(file.content)
                    found.append(file)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"The folder {directory} cannot be read: {error}", hint="Give the folder that the Dockerfile copies from."
        ) from error
    return tuple(sorted(found, key=lambda file: file.path))


def _read(place: Path, path: str, left: int) -> ContextFile:
    about = place.lstat()
    if stat.S_ISLNK(about.st_mode):
        return ContextFile(path=path, link=os.readlink(place))
    if not stat.S_ISREG(about.st_mode):
        raise InvalidRequestError(f"{place} is no file", hint=f"Name it in {IGNORE}.")
    if about.st_size > left:
        raise _too_large()
    content = base64.b64encode(place.read_bytes()).decode()
    return ContextFile(path=path, base64=content, executable=bool(about.st_mode & 0o100))


def _too_large() -> InvalidRequestError:
    return InvalidRequestError(
        f"The files beside the Dockerfile are more than {CONTEXT_MAX_BYTES // MIB} MiB",
        hint=f"Name what the image does not need in {IGNORE}, and mount large data into sandboxes instead.",
    )


class Ignore:
    """The patterns of a .dockerignore; the last one that fits decides."""

    def __init__(self, text: str) -> None:
        """Read them; lines that begin with # are none."""
        self._rules: list[tuple[re.Pattern[str], bool]] = []
        for line in map(str.strip, text.splitlines()):
            if line and not line.startswith("#"):
                kept = line.startswith("!")
                pattern = os.path.normpath(line.removeprefix("!").strip()).strip("/")
                self._rules.append((_regex(pattern), kept))

    def matches(self, path: str) -> bool:
        """Whether a file stays away."""
        ignored = False
        for rule, kept in self._rules:
            if rule.fullmatch(path):
                ignored = not kept
        return ignored

    def whole_folder(self, path: str) -> bool:
        """Whether nothing in a folder can be wanted, so that it need not be looked at."""
        return self.matches(path) and not self._has_exceptions

    @cached_property
    def _has_exceptions(self) -> bool:
        return any(kept for _, kept in self._rules)


def _regex(pattern: str) -> re.Pattern[str]:
    """A pattern for a path and all that lies below it. `**` stands for any folders, `*` and `?` for no slash."""
    said = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern):
        said += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part) or re.escape(part)
    return re.compile(f"{said}(?:/.*)?", re.DOTALL)
