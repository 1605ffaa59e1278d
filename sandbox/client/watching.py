"""What changes in a folder of a sandbox, for both flavours: a command in it says so, line by line."""

import base64
import contextlib
import errno
import json
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from warmcell.sandbox import watcher
from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.client.transport import now
from warmcell.sandbox.errors import (
    ConflictError,
    OperationTimeoutError,
    ProtocolError,
    SandboxDiedError,
    SandboxFileNotFoundError,
    WarmcellError,
    from_json,
)

Kind = Literal["created", "written", "removed", "moved", "changed", "lost"]
KINDS = tuple(watcher.TYPES.values())
"""Those that a watcher says itself."""

LINE_MAX_BYTES = 256 * 1024
"""Of one change: a name in it has 4 KiB at most, what is noted on a file 72 KiB."""


@dataclass(frozen=True, slots=True)
class FileChange:
    """One change in a folder that is watched."""

    kind: Kind
    """`moved`: it had this name; `changed`: its mode; `lost`: the system has left out some, list the folder again."""
    name: str
    """Relative to the folder."""


def command(python: str, path: str, *, recursive: bool, files: bool = False) -> list[str]:
    """The arguments of a command that watches, in a sandbox whose interpreter is that; `files`: with what they are."""
    source = Path(watcher.__file__).read_text()
    teller = [(Path(watcher.__file__).parent / "guest" / "files.py").read_text()] if files else []
    return [python or "python3", "-I", "-S", "-c", source, path, "1" if recursive else "0", *teller]


def whole_lines(rest: bytes, more: str) -> tuple[list[dict[str, Any]], bytes]:
    """What a watcher has said that is complete now, and what is left over.

    Args:
        rest: What was left over before.
        more: What has come since, in base64. Whatever is in the sandbox may have written it.

    Raises:
        ProtocolError: These are not a watcher's words.
    """
    *lines, rest = (rest + base64.b64decode(more)).split(b"\n")
    try:
        said = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        said = [None]
    if len(rest) > LINE_MAX_BYTES or not all(map(_is_word, said)):
        raise ProtocolError("The watcher does not say what a watcher says", hint="Watch again, or restart the sandbox.")
    return said, rest


class Words:
    """What a watcher says, put together from what comes of it."""

    def __init__(self) -> None:
        self._rest = b""
        self._in_loss = False

    def lose(self) -> None:
        """Some of it was lost: all up to the next line means nothing."""
        self._rest, self._in_loss = b"", True

    def take(self, more: str) -> list[dict[str, Any]]:
        """What is complete now; `more`, and what is raised, as in `whole_lines`."""
        if self._in_loss:
            _, newline, after = base64.b64decode(more).partition(b"\n")
            self._in_loss, more = not newline, base64.b64encode(after).decode()
        said, self._rest = whole_lines(self._rest, more)
        return said


def _is_word(said: object) -> bool:
    if not isinstance(said, dict):
        return False
    return "kind" not in said or (said["kind"] in KINDS and isinstance(said.get("name"), str))


class CoreWatch:
    """One folder that is watched, or about to be."""

    def __init__(self, calls: Calls, sandbox: str, path: str, *, recursive: bool, timeout_s: float | None) -> None:
        self._calls = calls
        self._sandbox = sandbox
        self._path = path
        self._recursive = recursive
        self._timeout_s = timeout_s
        self._id = uuid.uuid4().hex
        self._lines: AsyncGenerator[Mapping[str, Any]] | None = None

    async def begin(self) -> None:
        """Return when nothing is missed any more."""
        info = await self._calls.call("GET", self._sandbox)
        argv = command(info["python"], self._path, recursive=self._recursive)
        body = {"id": self._id, "argv": argv, "timeout_s": self._timeout_s, "tag": "watcher"}
        self._lines = self._said(body)
        said: Mapping[str, Any] = await anext(self._lines, {})
        if "started" not in said:
            await self.end()
            raise _failed(said.get("failed", 0), self._path)

    async def next(self) -> FileChange | None:
        """The next change; None at the end."""
        if self._lines is None:
            return None
        async for said in self._lines:
            if "kind" in said:
                return FileChange(said["kind"], said["name"])
            if "lost" in said:
                return FileChange("lost", "")
        return None

    async def end(self) -> None:
        """Watch no more. Idempotent."""
        lines, self._lines = self._lines, None
        if lines is not None:
            await lines.aclose()
            with contextlib.suppress(WarmcellError):
                await self._calls.call("DELETE", f"{self._sandbox}/commands/{self._id}")

    async def _said(self, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any]]:
        words = Words()
        entries = self._calls.entries(f"{self._sandbox}/commands", body, self._id)
        async with contextlib.aclosing(entries):
            async for entry in entries:
                if "lost" in entry:
                    words.lose()
                    yield entry
                if "stdout" in entry:
                    for one in words.take(entry["stdout"]):
                        yield one
                if "ended" in entry:
                    _check_end(entry["ended"])


class Watch:
    """`Files.watch`: begun and ended by `with`, and iterated over."""

    def __init__(self, core: CoreWatch) -> None:
        self._core = core

    def __enter__(self) -> Self:
        now(self._core.begin())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now(self._core.end())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FileChange:
        change = now(self._core.next())
        if change is None:
            raise StopIteration
        return change


class AsyncWatch:
    """`Watch` for an event loop."""

    def __init__(self, core: CoreWatch) -> None:
        self._core = core

    async def __aenter__(self) -> Self:
        await self._core.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._core.end()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> FileChange:
        change = await self._core.next()
        if change is None:
            raise StopAsyncIteration
        return change


def _check_end(ended: Mapping[str, Any]) -> None:
    """Raises unless it has ended because its time was over, or what it said tells why."""
    if ended["error"] is not None:
        error = from_json(ended["error"])
        if not isinstance(error, OperationTimeoutError):
            raise error
    elif ended["exit_code"] != 0:
        raise SandboxDiedError("What watches the folder has been ended", hint="Watch again, and list what is there.")


def _failed(number: object, path: str) -> WarmcellError:
    details = {"errno": errno.errorcode.get(number, "") if isinstance(number, int) else ""}
    if number == errno.ENOENT:
        return SandboxFileNotFoundError(f"{path} is not there", hint="Make it first: files.mkdir.", details=details)
    hint = "Give a folder." if number == errno.ENOTDIR else "Watch less, or without `recursive`."
    why = details["errno"] or "the system does not say why"
    return ConflictError(f"{path} cannot be watched: {why}", hint=hint, details=details)
