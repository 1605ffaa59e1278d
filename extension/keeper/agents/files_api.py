"""Files of a sandbox over REST. All is done by a process inside it (guest protocol: `files`), never on the host."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from tornado import web
from tornado.httputil import HTTPServerRequest
from tornado.iostream import StreamClosedError

from warmcell.extension.keeper.agents import checks
from warmcell.extension.keeper.agents.agents import Agents
from warmcell.extension.keeper.agents.files_told import MODE_MAX, place, refused, told
from warmcell.extension.keeper.http import JsonHandler
from warmcell.extension.pace import Pace
from warmcell.sandbox import errors
from warmcell.sandbox.guest_process import GuestProcess
from warmcell.sandbox.guest_wire import RESTART, read_object
from warmcell.sandbox.models import SandboxId

MAX_BODY_BYTES = 64 * 2**30
"""Files are streamed into the sandbox, whose size is the real limit."""

HEAD_MAX_BYTES = 16 * 2**20
DEPTH_MAX = 100
LISTED_MAX = 10_000
PATH_MAX = 4096
PARTS_MAX = 10_000
METADATA_KEY = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,128}")
METADATA_VALUE = re.compile(r"[\x20-\x7e]{0,1024}")
METADATA_MAX = 64

BOX = r"/sandboxes/([a-z0-9]+)"


def routes() -> list[tuple[str, type[JsonHandler]]]:
    """Paths below the API's prefix."""
    return [
        (rf"{BOX}/files", ContentHandler),
        (rf"{BOX}/files/(tree)", ContentHandler),
        (rf"{BOX}/files/(stat|list|mkdir|move|compose)", FilesHandler),
    ]


class Work:
    """One thing that is done with a sandbox's files."""

    def __init__(self, process: GuestProcess, op: str) -> None:
        self._process = process
        self._op = op
        self._stdout = _stdout(process)
        self._rest = b""

    async def answer(self) -> dict[str, Any]:
        """What became of it, each field of which is what it should be.

        Raises:
            WarmcellError: It could not be done, or the guest broke off.
        """
        said = bytearray()
        async for piece in self._stdout:
            said += piece
            if b"\n" in piece or len(said) > HEAD_MAX_BYTES:
                break
        line, newline, self._rest = bytes(said).partition(b"\n")
        if not newline:
            raise errors.ProtocolError("The sandbox broke off as it worked on its files", hint=RESTART)
        head = read_object(line)
        if head.get("ok") is not True:
            raise refused(head)
        return told(self._op, head)

    async def content(self) -> AsyncIterator[bytes]:
        """What follows the answer.

        Raises:
            WarmcellError: The guest broke off.
        """
        if self._rest:
            yield self._rest
        async for piece in self._stdout:
            yield piece
        if self._process.exit_code != 0:
            raise errors.ProtocolError("The sandbox broke off in the middle of a file", hint=RESTART)


@contextlib.asynccontextmanager
async def work_in(agents: Agents, sandbox_id: SandboxId, request: Mapping[str, Any]) -> AsyncGenerator[GuestProcess]:
    """Begin something with a sandbox's files; on leaving it is given up if it has not ended.

    Raises:
        WarmcellError: The sandbox does not run, and cannot.
    """
    await agents.awake(sandbox_id)
    async with agents.live(sandbox_id).files_stream() as process:
        await process.write(json.dumps(request).encode() + b"\n")
        yield process


async def done(agents: Agents, sandbox_id: SandboxId, request: Mapping[str, Any]) -> dict[str, Any]:
    """Do something whose answer is all there is.

    Raises:
        WarmcellError: It cannot be done.
    """
    async with work_in(agents, sandbox_id, request) as process:
        await process.close_stdin()
        return await Work(process, request["op"]).answer()


class FilesHandler(JsonHandler):
    """What is there, and other names."""

    async def get(self, sandbox_id: str, verb: str) -> None:
        if verb not in ("stat", "list"):
            raise errors.InvalidRequestError(f"{verb} is asked for with POST", hint="See the keeper's API.")
        request: dict[str, Any] = {"op": verb, "path": self._path()}
        if verb == "list":
            depth, limit = self.get_query_argument("depth", "1"), self.get_query_argument("limit", str(LISTED_MAX))
            request["depth"] = int(checks.number(depth, "depth", least=1, most=DEPTH_MAX))
            request["limit"] = int(checks.number(limit, "limit", least=1, most=LISTED_MAX))
            if after := self.get_query_argument("after", ""):
                request["after"] = checked_path(place(after))
            self.answer(await self._done(sandbox_id, request))
        else:
            request["follow"] = self.get_query_argument("follow", "0") == "1"
            self.answer((await self._done(sandbox_id, request))["file"])

    async def post(self, sandbox_id: str, verb: str) -> None:
        body = self.body()
        if verb == "mkdir":
            request = {
                "op": verb,
                "path": checked_path(body.get("path")),
                "parents": checks.flag(body, "parents", True),
            }
            said = await self._done(sandbox_id, request)
            self.answer({**said["file"], "created": said["created"]})
        elif verb == "move":
            request = {
                "op": verb,
                "source": checked_path(body.get("source")),
                "target": checked_path(body.get("target")),
            }
            self.answer((await self._done(sandbox_id, request))["file"])
        elif verb == "compose":
            sources = body.get("sources")
            if not isinstance(sources, list) or not 0 < len(sources) <= PARTS_MAX:
                raise errors.InvalidRequestError("`sources` must be paths", hint=f"A list of 1 to {PARTS_MAX}.")
            request = {
                "op": verb,
                "sources": [checked_path(one) for one in sources],
                "target": checked_path(body.get("target")),
            }
            self.answer((await self._done(sandbox_id, request))["file"])
        else:
            raise errors.InvalidRequestError(f"{verb} is asked for with GET", hint="See the keeper's API.")

    def _path(self) -> str:
        return path_asked(self.request)

    async def _done(self, sandbox_id: str, request: Mapping[str, Any]) -> dict[str, Any]:
        return await self.unless_gone(done(self.settings["keeper"].agents, SandboxId(sandbox_id), request))


@web.stream_request_body
class ContentHandler(JsonHandler):
    """A file's content, or a tree as a tar: streamed either way."""

    def initialize(self) -> None:
        """Nothing has come yet (tornado's hook)."""
        self._held: contextlib.AsyncExitStack | None = None
        self._process: GuestProcess | None = None
        self._refused: errors.WarmcellError | None = None
        self._stalled: asyncio.TimerHandle | None = None

    async def prepare(self) -> None:  # type: ignore[override]
        """Before the body is read: have the guest wait for it."""
        super().prepare()
        if self.refused:
            return
        connection: Any = self.request.connection
        connection.set_max_body_size(MAX_BODY_BYTES)
        self._pace = Pace(self._patience_s)
        if self.request.method != "PUT":
            return
        try:
            self._process = await self._hold(self._request())
        except errors.WarmcellError as error:  # Whoever still sends would not hear the answer now.
            self._refused = error
        self._expect()

    async def data_received(self, chunk: bytes) -> None:
        """Bytes of the content (tornado's hook), at the pace at which the sandbox takes them."""
        self._expect(no_more=True)  # It is the sandbox's time that passes now.
        self._pace.came(len(chunk))
        if self._process is not None:
            await self._process.write(chunk)
        self._expect()

    async def get(self, sandbox_id: str, tree: str = "") -> None:
        """The content."""
        request = {"op": "pack" if tree else "read", "path": self._path()}
        agents: Agents = self.settings["keeper"].agents
        with contextlib.suppress(StreamClosedError):
            await self.unless_gone(self._send(agents, SandboxId(sandbox_id), request, bool(tree)))

    async def put(self, sandbox_id: str, tree: str = "") -> None:
        """All of it has come."""
        self._expect(no_more=True)
        try:
            if self._refused is not None:
                raise self._refused
            assert self._process is not None
            await self._process.close_stdin()
            said = await self.unless_gone(Work(self._process, "unpack" if tree else "write").answer())
        finally:
            await self._let_go()
        self.answer({"files": said["files"]} if tree else said["file"])

    async def delete(self, sandbox_id: str, tree: str = "") -> None:
        """The file goes."""
        if tree:
            raise errors.InvalidRequestError("A tree is removed with recursive=1", hint="DELETE …/files?recursive=1")
        recursive = self.get_query_argument("recursive", "0") == "1"
        request = {"op": "remove", "path": self._path(), "recursive": recursive}
        await self.unless_gone(done(self.settings["keeper"].agents, SandboxId(sandbox_id), request))
        self.set_status(204)

    def on_connection_close(self) -> None:
        """The caller has gone (tornado's hook): what was not complete never gets its name."""
        super().on_connection_close()
        self._expect(no_more=True)
        if self._held is not None:
            self.settings["keeper"].kernels.spawn(self._let_go())

    def on_finish(self) -> None:
        """The answer is out (tornado's hook)."""
        super().on_finish()
        self._expect(no_more=True)

    def no_longer(self, error: errors.UnauthenticatedError) -> None:
        """What is being written is given up, and says so; half of what is read can only break off."""
        if self.request.method == "PUT":
            self._give_up(error)
        elif self._headers_written:
            self.hang_up()
        else:
            super().no_longer(error)

    def _give_up(self, error: errors.WarmcellError) -> None:
        """Answer in the middle of the body, which is read no further; what was not complete never gets its name."""
        self._expect(no_more=True)
        if not self._finished:
            self.settings["keeper"].kernels.spawn(self._let_go())
            self.write_error(errors.http_status(error), exc_info=(type(error), error, None))

    async def _send(self, agents: Agents, sandbox_id: SandboxId, request: Mapping[str, Any], tree: bool) -> None:
        async with work_in(agents, sandbox_id, request) as process:
            await process.close_stdin()
            work = Work(process, request["op"])
            await work.answer()
            self.set_header("Content-Type", "application/x-tar" if tree else "application/octet-stream")
            name = PurePosixPath(request["path"]).name + (".tar" if tree else "")
            self.set_header("Content-Disposition", f"attachment; filename*=UTF-8''{quote(name, errors='replace')}")
            try:
                async for piece in work.content():
                    self.write(piece)
                    async with asyncio.timeout(self._patience_s):
                        await self.flush()
            except (errors.WarmcellError, TimeoutError):
                # Half of it is there already: only a broken connection says that.
                self.hang_up()
                raise StreamClosedError from None

    @property
    def _patience_s(self) -> float:
        patience_s: float = self.settings["keeper"].wiring.settings.stalled_after
        return patience_s

    def _expect(self, *, no_more: bool = False) -> None:
        """Have the next bytes come in time; who has stopped sending, or nearly, holds nothing for ever."""
        if self._stalled is not None:
            self._stalled.cancel()
        self._stalled = None
        if not no_more:
            loop, pace = asyncio.get_running_loop(), self._pace
            self._stalled = loop.call_later(pace.wait(), lambda: self._give_up(pace.stalled()))

    def _request(self) -> dict[str, Any]:
        if len(self.path_args) > 1:
            return {"op": "unpack", "path": self._path()}
        mode = self.get_query_argument("mode", "")
        parents = self.get_query_argument("parents", "1") == "1"
        number = int(checks.number(mode, "mode", most=MODE_MAX)) if mode else None
        metadata = checked_metadata(self.get_query_argument("metadata", "{}", strip=False))
        return {"op": "write", "path": self._path(), "mode": number, "parents": parents, "metadata": metadata}

    async def _hold(self, request: Mapping[str, Any]) -> GuestProcess:
        self._held = contextlib.AsyncExitStack()
        work = work_in(self.settings["keeper"].agents, SandboxId(self.path_args[0]), request)
        return await self._held.enter_async_context(work)

    async def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            await held.aclose()

    def _path(self) -> str:
        return path_asked(self.request)


async def _stdout(process: GuestProcess) -> AsyncGenerator[bytes]:
    async for name, content in process.output():
        if name == "stdout":
            yield content


def path_asked(request: HTTPServerRequest) -> str:
    """The path in a request's query, byte for byte: tornado would take another character for some; raises as below."""
    return checked_path(request.query_arguments.get("path", [b""])[-1].decode("utf-8", "surrogateescape"))


def checked_path(value: object) -> str:
    """The path of a file that a request names; raises InvalidRequestError."""
    if not isinstance(value, str) or not value or "\0" in value or len(value) > PATH_MAX:
        raise errors.InvalidRequestError("`path` must be the path of a file", hint="Absolute, or relative to the home.")
    return value


def checked_metadata(text: str) -> dict[str, str]:
    """What a request notes on a file, as an object in JSON; raises InvalidRequestError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if (
        not isinstance(found, dict)
        or len(found) > METADATA_MAX
        or not all(
            isinstance(value, str) and METADATA_KEY.fullmatch(key) and METADATA_VALUE.fullmatch(value)
            for key, value in found.items()
        )
    ):
        raise errors.InvalidRequestError(
            "The metadata of a file is not of its form",
            hint=f"At most {METADATA_MAX} keys of a-z, 0-9 and !#$%&'*+-.^_`|~ with 1024 of printable ASCII each.",
        )
    return found
