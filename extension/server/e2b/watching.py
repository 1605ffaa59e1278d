"""E2B's watchers: a process in the sandbox says what changes, as events or to be asked for."""

import asyncio
import base64
import contextlib
import errno
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, Final

from warmcell.extension.server.e2b.calls import paced, ping_s, server_stream, unary
from warmcell.extension.server.e2b.fields import Fields
from warmcell.extension.server.e2b.filesystem import entry, path_of
from warmcell.extension.server.e2b.framing import Code, ConnectError
from warmcell.extension.server.e2b.handler import E2bHandler, Verb
from warmcell.sandbox.client.results import FileInfo
from warmcell.sandbox.client.watching import command, whole_lines
from warmcell.sandbox.errors import NotFoundError, WarmcellError

TAG: Final = "e2b.watcher"
NO_WATCHER: Final = "The watcher does not say what a watcher says"
TYPES: Final = {
    "created": "EVENT_TYPE_CREATE",
    "written": "EVENT_TYPE_WRITE",
    "removed": "EVENT_TYPE_REMOVE",
    "moved": "EVENT_TYPE_RENAME",
    "changed": "EVENT_TYPE_CHMOD",
}
WATCHERS_MAX: Final = 1024
"""How many are remembered; one that is forgotten tells all again."""


async def watch_dir(request: E2bHandler, message: Fields) -> AsyncGenerator[Mapping[str, Any], None]:
    """What changes, as it does; it ends with its caller."""
    async with _watcher(request, message) as (_, said):
        async for line in said:
            if "started" in line:
                yield {"start": {}}
            elif "kind" in line:
                yield {"filesystem": _event(line)}
            elif not line:
                yield {"keepalive": {}}


async def create_watcher(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """Begin to note what changes."""
    async with _watcher(request, message, keep=True) as (watcher_id, said):
        async for line in said:
            if "started" in line:
                break
    return {"watcherId": watcher_id}


async def events(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """What has changed since this was asked before."""
    watcher_id = await _known(request, message)
    marks = _marks(request)
    mark = marks[watcher_id] = marks.pop(watcher_id) if watcher_id in marks else Mark()
    if len(marks) > WATCHERS_MAX:
        del marks[next(iter(marks))]
    async with mark.turn:
        params = {"from": str(mark.at), "until": "now"}
        async with request.keeper.lines("GET", f"{_path(request)}/{watcher_id}/output", params=params) as lines:
            return {"events": mark.taken([line async for line in lines])}


async def remove_watcher(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """Note no more."""
    watcher_id = await _known(request, message)
    _marks(request).pop(watcher_id, None)
    await request.keeper.ask("DELETE", f"{_path(request)}/{watcher_id}")
    return {}


class Mark:
    """Up to where a watcher has been asked. A request that fails leaves it as it was."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.at = 0
        """The number of the entry that comes next."""
        self._rest = b""
        """The line that was not whole."""
        self._torn = False
        """Whether what comes next is the end of a line whose beginning is lost."""
        self._kept: list[Mapping[str, Any]] = []
        """Events that came after some that are lost, which was told instead of them."""

    def taken(self, lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The events in what the watcher has said since.

        Raises:
            ConnectError: Some before them are lost. That is told once.
            ProtocolError: Something else speaks in its place.
        """
        at, rest, torn, lost = self.at, self._rest, self._torn, False
        found: list[Mapping[str, Any]] = []
        for line in lines:
            if "next" in line:
                at = line["next"]
            elif "lost" in line:
                rest, torn, lost = b"", True, True
            elif "stdout" in line:
                more = line["stdout"]
                if torn:
                    _, end, after = base64.b64decode(more).partition(b"\n")
                    torn, more = not end, base64.b64encode(after).decode()
                said, rest = whole_lines(rest, more)
                found += [_event(one) for one in said if "kind" in one]
        found, self._kept = [*self._kept, *found], []
        self.at, self._rest, self._torn = at, rest, torn
        if lost:
            self._kept = found
            raise ConnectError(Code.RESOURCE_EXHAUSTED, "Too much has changed since this was asked: some of it is lost")
        return found


@contextlib.asynccontextmanager
async def _watcher(
    request: E2bHandler, message: Fields, *, keep: bool = False
) -> AsyncGenerator[tuple[str, AsyncIterator[Mapping[str, Any]]], None]:
    """Start one; it is ended afterwards unless it is to be kept."""
    path, recursive = path_of(message), bool(message.flag("recursive"))
    info = await request.keeper.ask("GET", f"/sandboxes/{request.sandbox_id}")
    watcher_id = uuid.uuid4().hex
    argv = command(info["python"], path, recursive=recursive, files=bool(message.flag("includeEntry")))
    asked = {"id": watcher_id, "argv": argv, "tag": TAG}
    try:
        async with request.keeper.lines("POST", _path(request), asked, params={"follow": "1"}) as lines:
            yield watcher_id, _said(paced(lines, ping_s(request)), path)
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            with contextlib.suppress(WarmcellError):
                await request.keeper.ask("DELETE", f"{_path(request)}/{watcher_id}")


async def _said(lines: AsyncIterator[dict[str, Any]], path: str) -> AsyncIterator[Mapping[str, Any]]:
    """What a watcher says; empty where it says nothing for a while.

    Raises:
        ConnectError: It cannot watch, or has ended.
        ProtocolError: Something else speaks in its place.
    """
    rest = b""
    async for line in lines:
        if "stdout" in line:
            whole, rest = whole_lines(rest, line["stdout"])
            for said in whole:
                if "failed" in said:
                    raise _failed(said["failed"], path)
                yield said
        elif "ended" in line:
            raise ConnectError(Code.UNAVAILABLE, "The watcher has ended")
        elif not line:
            yield {}


def _event(said: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": TYPES[said["kind"]], "name": said["name"], **_entry(said.get("file"))}


def _entry(file: object) -> Mapping[str, Any]:
    """The entry of a file that a watcher tells of, if it was there still."""
    if file is None:
        return {}
    if not isinstance(file, dict):
        raise ConnectError(Code.UNAVAILABLE, NO_WATCHER)
    try:
        found = FileInfo.from_json(file).to_json()
        return {"entry": entry(found)}
    except (WarmcellError, ValueError, TypeError, OverflowError, OSError):
        raise ConnectError(Code.UNAVAILABLE, NO_WATCHER) from None


def _failed(number: object, path: str) -> ConnectError:
    if number == errno.ENOENT:
        return ConnectError(Code.NOT_FOUND, f"{path} is not there")
    code = Code.INVALID_ARGUMENT if number == errno.ENOTDIR else Code.RESOURCE_EXHAUSTED
    why = errno.errorcode.get(number, "") if isinstance(number, int) else ""
    return ConnectError(code, f"{path} cannot be watched: {why or 'the system does not say why'}")


def _marks(request: E2bHandler) -> dict[str, Mark]:
    """Of each watcher, those that were asked last at the end."""
    marks: dict[str, Mark] = request.settings.setdefault("warmcell_e2b_watchers", {})
    return marks


async def _known(request: E2bHandler, message: Fields) -> str:
    watcher_id = message.text("watcherId", most=64)
    found = (await request.keeper.ask("GET", _path(request)))["commands"]
    if not any(command["id"] == watcher_id and command["tag"] == TAG for command in found):
        raise NotFoundError(f"There is no watcher {watcher_id}", hint="It was removed, or never made.")
    return watcher_id


def _path(request: E2bHandler) -> str:
    return f"/sandboxes/{request.sandbox_id}/commands"


def _verb(name: str, serve: Any) -> Verb:
    return Verb("envd", "POST", rf"/filesystem\.Filesystem/{name}", serve)


VERBS: Final[Sequence[Verb]] = (
    _verb("WatchDir", server_stream(watch_dir)),
    _verb("CreateWatcher", unary(create_watcher)),
    _verb("GetWatcherEvents", unary(events)),
    _verb("RemoveWatcher", unary(remove_watcher)),
)
