"""Files that people have already: requirements.txt and pyproject.toml, read into steps."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images import texts
from warmcell.sandbox.images.steps import PipInstall

FILE_MAX_BYTES = 2**20
INCLUDED_MAX = 20
_COMMENT = re.compile(r"(?:^|\s)#.*$")
_OPTION = re.compile(r"(--?[A-Za-z][A-Za-z-]*)(?:\s*=\s*|\s+)?(.*)")
_IGNORED = ("--no-cache-dir", "--prefer-binary", "--progress-bar", "--trusted-host")
"""They change how packages are fetched, not which: that is the operator's."""


def read_text(path: Path) -> str:
    """A text file. Blocks.

    Raises:
        InvalidRequestError: It cannot be read, or is too large.
    """
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise InvalidRequestError(f"{path} is larger than {FILE_MAX_BYTES} bytes", hint="Name another file.")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{path} cannot be read: {error}", hint="Name another file.") from error


def read_requirements(path: Path) -> PipInstall:
    """What a requirements.txt lists, those that it includes in their places. Blocks.

    Raises:
        InvalidRequestError: It cannot be read, or a line of it cannot be part of an image.
    """
    found = _Requirements()
    found.read(path, depth=0)
    return _step(found, path)


def requirements_of(lines: Sequence[str], path: Path) -> PipInstall:
    """The same of lines that are in a file of another kind.

    Raises:
        InvalidRequestError: One of them cannot be part of an image.
    """
    found = _Requirements()
    found.take("\n".join(lines), path, depth=0)
    return _step(found, path)


def _step(found: "_Requirements", path: Path) -> PipInstall:
    if not found.requirements:
        raise InvalidRequestError(f"{path} lists no packages", hint="Name another file.")
    return PipInstall(
        requirements=tuple(found.requirements),
        index_url=found.index_url,
        extra_index_urls=tuple(dict.fromkeys(found.extra_index_urls)),
        pre=found.pre,
    )


class _Requirements:
    """What has been read so far."""

    def __init__(self) -> None:
        self.requirements: list[str] = []
        self.index_url = ""
        self.extra_index_urls: list[str] = []
        self.pre = False

    def read(self, path: Path, *, depth: int) -> None:
        """Read a file with those that it includes."""
        if depth > INCLUDED_MAX:
            raise InvalidRequestError(
                f"{path} includes itself", hint="Take the `-r` line out.", details={"file": str(path)}
            )
        self.take(read_text(path), path, depth=depth)

    def take(self, text: str, path: Path, *, depth: int) -> None:
        """Take in what a file says."""
        for line in _logical_lines(text):
            try:
                self._line(line, path, depth)
            except InvalidRequestError as error:
                if "file" in error.details:  # one that it includes
                    raise
                raise InvalidRequestError(
                    f"{path}: {error.message}", hint=error.hint, details={"file": str(path)}
                ) from error

    def _line(self, line: str, path: Path, depth: int) -> None:
        option = _OPTION.fullmatch(line) if line.startswith("-") else None
        if option is None:
            self.requirements.append(texts.requirement(line))
            return
        name, value = option[1], option[2].strip().strip("\"'")
        if name.startswith("-r") and not name.startswith("--"):  # `-rmore.txt` is one too
            name, value = "-r", f"{option[1][2:]}{value}"
        match name:
            case "-r" | "--requirement":
                self.read(path.parent / value, depth=depth + 1)
            case "-i" | "--index-url":
                self.index_url = texts.url(value, what="The index")
            case "--extra-index-url":
                self.extra_index_urls.append(texts.url(value, what="The index"))
            case "--pre":
                self.pre = True
            case _ if name in _IGNORED:
                pass
            case _:
                raise InvalidRequestError(
                    f"{line[:80]!r} cannot be part of an image",
                    hint="Requirements, -r, --index-url, --extra-index-url and --pre can; a package of your own goes "
                    "in by its address, or by a Dockerfile.",
                )


def _logical_lines(text: str) -> Sequence[str]:
    """Lines without comments, those that end with a backslash joined."""
    lines: list[str] = []
    joined = ""
    for line in text.splitlines():
        line = _COMMENT.sub("", line)
        if line.endswith("\\"):
            joined += f"{line[:-1].strip()} "
            continue
        whole = f"{joined}{line.strip()}".strip()
        joined = ""
        if whole:
            lines.append(whole)
    return [*lines, *([joined.strip()] if joined.strip() else [])]


def read_pyproject(path: Path, groups: Sequence[str]) -> PipInstall:
    """The dependencies of a project, with those groups of optional ones. Blocks.

    Raises:
        InvalidRequestError: It cannot be read, lists none, or has no such group.
    """
    try:
        project = tomllib.loads(read_text(path)).get("project")
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{path} is no TOML: {error}", hint="Mend it.") from error
    project = project if isinstance(project, Mapping) else {}
    optional = project.get("optional-dependencies", {})
    found = list(_texts(project.get("dependencies", []), path))
    for group in groups:
        if not isinstance(optional, Mapping) or group not in optional:
            names = ", ".join(map(str, optional)) if isinstance(optional, Mapping) and optional else "none"
            raise InvalidRequestError(f"{path} has no optional dependencies {group!r}", hint=f"It has {names}.")
        found += _texts(optional[group], path)
    if not found:
        raise InvalidRequestError(f"{path} lists no dependencies", hint="Name a group of optional ones, or packages.")
    return PipInstall(requirements=tuple(dict.fromkeys(found)))


def _texts(value: object, path: Path) -> Sequence[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidRequestError(f"The dependencies in {path} are no list of texts", hint="Mend the file.")
    return value
