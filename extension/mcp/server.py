"""The tools. Each answers within a bounded time and size; what takes longer goes on and is asked for again."""

import base64
import functools
import inspect
import posixpath
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final, Literal, ParamSpec, TypeVar

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import CallToolResult, ImageContent, TextContent, ToolAnnotations
from pydantic import Field

from warmcell import __version__
from warmcell.extension.mcp import pages, work
from warmcell.extension.mcp.callers import Callers
from warmcell.sandbox.client.wanted import size
from warmcell.sandbox.errors import InvalidRequestError, WarmcellError

WAIT_S: Final = 30.0
"""Clients commonly give up after 60 s."""

LISTED_MAX: Final = 100
READ_MAX_BYTES: Final = 1024 * 1024
PICTURE_ENDINGS: Final = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif"}

INSTRUCTIONS = (
    "Sandboxes are isolated places on the user's machine, without network unless hosts are allowed, in which to run "
    "Python and commands. Make "
    "one with create_sandbox and use its sandbox_id. Variables, files and processes stay between calls. run_code and "
    "exec answer after wait_s seconds at the latest: what has not ended by then goes on, and read_output with its "
    "handle gives the rest. If a call times out nothing is lost: list_work has the handles. Output comes in pages; "
    "`next` of one answer is `after` of the next."
)

Wait = Annotated[
    float | None, Field(description="Seconds to wait for its end at most. It goes on in any case.", ge=0, le=3600)
]
Id = Annotated[str, Field(description="As create_sandbox gives it.")]

READS = ToolAnnotations(read_only_hint=True)
ENDS = ToolAnnotations(destructive_hint=True)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def build(callers: Callers, *, wait_s: float = WAIT_S) -> MCPServer[Any]:
    """A server with all tools.

    Args:
        callers: Whom each request is asked for.
        wait_s: How long run_code, exec and read_output wait for an end where the model does not say; less than what
            clients wait for an answer.
    """
    server: MCPServer[Any] = MCPServer(
        "warmcell", title="Warmcell sandboxes", instructions=INSTRUCTIONS, version=str(__version__), log_level="WARNING"
    )

    def tool(
        annotations: ToolAnnotations | None = None,
    ) -> Callable[[Callable[Arguments, Awaitable[Result]]], Callable[Arguments, Awaitable[Result]]]:
        def add(function: Callable[Arguments, Awaitable[Result]]) -> Callable[Arguments, Awaitable[Result]]:
            server.add_tool(_typed(function), annotations=annotations)
            return function

        return add

    @tool()
    async def create_sandbox(
        ctx: Context[Any, Any],
        image: Annotated[str | None, Field(description="Name of an image that was built here.")] = None,
        gpu: Annotated[str | None, Field(description='As in "A100", "H100:2", "24GiB" or "any".')] = None,
        memory: Annotated[str | None, Field(description='Cap, as in "4GiB".')] = None,
        cpus: Annotated[float | None, Field(description="Cap, in cores.")] = None,
        env: Annotated[dict[str, str] | None, Field(description="Environment variables.")] = None,
        preload: Annotated[list[str] | None, Field(description="Modules imported in advance.")] = None,
        allow: Annotated[
            list[str] | None,
            Field(description='Hosts that it reaches by http and https, as in "pypi.org", "*.example.com".'),
        ] = None,
        packages: Annotated[bool, Field(description="Whether pip install works, from the operator's index.")] = False,
        snapshot: Annotated[str | None, Field(description="Go on from this one, with all that was in memory.")] = None,
        timeout_s: Annotated[float, Field(description="Seconds of running until on_timeout.", gt=0)] = 300.0,
        on_timeout: Annotated[
            Literal["suspend", "kill"], Field(description="A suspended one wakes when it is used.")
        ] = "suspend",
    ) -> dict[str, Any]:
        """Make a sandbox; it is ready when this answers."""
        limits = {"memory_bytes": size(memory), "cpus": cpus}
        network = {"allow": allow or [], "packages": packages} if allow or packages else None
        wanted = {"image": image, "gpu": gpu, "env": env, "preload": preload, "network": network}
        spec: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
        if any(value is not None for value in limits.values()):
            spec["limits"] = {name: value for name, value in limits.items() if value is not None}
        body: dict[str, Any] = {"spec": spec, "terms": {"timeout_s": timeout_s, "on_timeout": on_timeout}}
        if snapshot is not None:
            body["snapshot"] = snapshot
        calls = await callers.of(ctx.headers)
        return _told(await calls.call("POST", "/sandboxes", json=body, key=work.new_id(), timeout_s=None))

    @tool(READS)
    async def list_sandboxes(
        ctx: Context[Any, Any],
        after: Annotated[str, Field(description="`next` of an earlier answer.")] = "",
    ) -> dict[str, Any]:
        """Your sandboxes, the oldest first, a hundred at a time."""
        calls = await callers.of(ctx.headers)
        params = {"limit": str(LISTED_MAX), "owner": "client", **({"after": after} if after else {})}
        said = await calls.call("GET", "/sandboxes", params=params)
        return {"sandboxes": [_told(one) for one in said["sandboxes"]], "next": said["next"]}

    @tool(ENDS)
    async def kill_sandbox(ctx: Context[Any, Any], sandbox_id: Id) -> dict[str, Any]:
        """End a sandbox with all that is in it."""
        calls = await callers.of(ctx.headers)
        await calls.call("DELETE", work.box(sandbox_id), timeout_s=None)
        return {"killed": sandbox_id}

    @tool()
    async def run_code(
        ctx: Context[Any, Any],
        sandbox_id: Id,
        code: Annotated[str, Field(description="Python, as in a notebook's cell; its last value is shown.")],
        wait_s: Wait = None,
    ) -> CallToolResult:
        """Run Python. Variables stay between calls. Pictures that it shows come as pictures."""
        calls, run = await callers.of(ctx.headers), work.new_id()
        body = {"id": run, "code": code, "linger_s": None}
        await calls.call("POST", f"{work.box(sandbox_id)}/runs", json=body, key=run, timeout_s=None)
        return await _follow(ctx, calls, sandbox_id, f"run-{run}", wait_s)

    @tool()
    async def exec(
        ctx: Context[Any, Any],
        sandbox_id: Id,
        command: Annotated[str | list[str], Field(description="A line for the shell, or a program and its arguments.")],
        cwd: Annotated[str, Field(description="Directory.")] = "",
        env: Annotated[dict[str, str] | None, Field(description="Further environment variables.")] = None,
        wait_s: Wait = None,
    ) -> CallToolResult:
        """Run a command."""
        calls, item = await callers.of(ctx.headers), work.new_id()
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        body = {"id": item, "argv": argv, "cwd": cwd, "env": env or {}}
        await calls.call("POST", f"{work.box(sandbox_id)}/commands", json=body, key=item, timeout_s=None)
        return await _follow(ctx, calls, sandbox_id, f"cmd-{item}", wait_s)

    @tool(READS)
    async def read_output(
        ctx: Context[Any, Any],
        sandbox_id: Id,
        handle: Annotated[str, Field(description="As run_code, exec or list_work gives it.")],
        after: Annotated[str, Field(description="`next` of an earlier answer; empty: from the beginning.")] = "",
        wait_s: Wait = None,
    ) -> CallToolResult:
        """More of what code or a command has said. Waits for its end, wait_s at most."""
        return await _follow(ctx, await callers.of(ctx.headers), sandbox_id, handle, wait_s, after)

    @tool(READS)
    async def list_work(ctx: Context[Any, Any], sandbox_id: Id) -> dict[str, Any]:
        """Code and commands of a sandbox that run or ran, with their handles, the oldest first."""
        found = await work.all_of(await callers.of(ctx.headers), sandbox_id)
        return {"work": found[-LISTED_MAX:]}

    @tool(ENDS)
    async def interrupt(ctx: Context[Any, Any], sandbox_id: Id, handle: str) -> dict[str, Any]:
        """Interrupt code, or kill a command."""
        calls = await callers.of(ctx.headers)
        await calls.call("DELETE", work.place(sandbox_id, handle))
        return {"interrupted": handle}

    @tool(READS)
    async def read_file(
        ctx: Context[Any, Any],
        sandbox_id: Id,
        path: Annotated[str, Field(description="Absolute, or below the home.")],
        offset: Annotated[int, Field(description="Characters to leave out at its beginning.", ge=0)] = 0,
    ) -> CallToolResult:
        """A page of a text file of up to a mebibyte, or a picture."""
        calls, data = await callers.of(ctx.headers), bytearray()
        async for piece in calls.download(f"{work.box(sandbox_id)}/files", {"path": path}):
            data += piece
            if len(data) > READ_MAX_BYTES:
                raise InvalidRequestError(
                    f"{path} has more than {READ_MAX_BYTES} bytes", hint="Read a part of it with exec: head, tail, sed."
                )
        return _file(path, bytes(data), offset)

    @tool()
    async def write_file(
        ctx: Context[Any, Any],
        sandbox_id: Id,
        path: Annotated[str, Field(description="Absolute, or below the home; directories are made.")],
        text: Annotated[str, Field(description="Its content.")] = "",
        data: Annotated[str | None, Field(description="Its content in base64, instead of text.")] = None,
    ) -> dict[str, Any]:
        """Write a file."""
        try:
            content = text.encode() if data is None else base64.b64decode(data, validate=True)
        except ValueError as error:
            raise InvalidRequestError("data is no base64", hint="Give text instead.") from error
        calls = await callers.of(ctx.headers)
        where = f"{work.box(sandbox_id)}/files"
        info: dict[str, Any] = await calls.call("PUT", where, params={"path": path, "parents": "1"}, content=content)
        return {"path": info["path"], "size_bytes": info["size_bytes"]}

    @tool(READS)
    async def list_files(
        ctx: Context[Any, Any],
        sandbox_id: Id,
        path: Annotated[str, Field(description="A directory.")] = ".",
        depth: Annotated[int, Field(description="1: what is in it.", ge=1, le=16)] = 1,
        after: Annotated[str, Field(description="`next` of an earlier answer.")] = "",
    ) -> dict[str, Any]:
        """Files, a hundred at a time."""
        calls = await callers.of(ctx.headers)
        params = {"path": path, "depth": str(depth), "limit": str(LISTED_MAX), **({"after": after} if after else {})}
        said = await calls.call("GET", f"{work.box(sandbox_id)}/files/list", params=params)
        shown = [{name: one[name] for name in ("path", "type", "size_bytes")} for one in said["files"]]
        return {"files": shown, "next": said["next"]}

    @tool(ENDS)
    async def remove_file(ctx: Context[Any, Any], sandbox_id: Id, path: str, recursive: bool = False) -> dict[str, Any]:
        """Remove a file, or a directory with all that is in it."""
        calls = await callers.of(ctx.headers)
        params = {"path": path, **({"recursive": "1"} if recursive else {})}
        await calls.call("DELETE", f"{work.box(sandbox_id)}/files", params=params)
        return {"removed": path}

    @tool()
    async def fork_sandbox(
        ctx: Context[Any, Any],
        sandbox_id: Id,
        n: Annotated[int, Field(description="How many.", ge=1, le=64)] = 1,
    ) -> dict[str, Any]:
        """Copies of a sandbox with its memory and files as they are now; it goes on itself."""
        calls, key = await callers.of(ctx.headers), work.new_id()
        path = f"{work.box(sandbox_id)}/fork"
        said = await calls.call("POST", path, json={"n": n}, key=key, timeout_s=None)
        return {"sandboxes": [_told(one) for one in said["sandboxes"]]}

    @tool()
    async def snapshot_sandbox(
        ctx: Context[Any, Any],
        sandbox_id: Id,
        name: Annotated[str, Field(description="What to call it.")] = "",
    ) -> dict[str, Any]:
        """Save memory and files; create_sandbox(snapshot=…) goes on from there as often as you like."""
        calls, key = await callers.of(ctx.headers), work.new_id()
        path = f"{work.box(sandbox_id)}/snapshot"
        said = await calls.call("POST", path, json={"name": name}, key=key, timeout_s=None)
        return {"snapshot": said["id"], "name": said["name"]}

    async def _follow(
        ctx: Context[Any, Any], calls: Any, sandbox_id: str, handle: str, wait: float | None, after: str = ""
    ) -> CallToolResult:
        async def progress(waited_s: float, message: str) -> None:
            await ctx.report_progress(round(waited_s, 3), message=message)

        wait = wait_s if wait is None else wait
        return await work.follow(calls, sandbox_id, handle, after=after, wait_s=wait, progress=progress)

    return server


def _typed(function: Callable[Arguments, Awaitable[Result]]) -> Callable[Arguments, Awaitable[Result]]:
    """The tool, whose failures the model reads with their cure."""

    @functools.wraps(function)
    async def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        try:
            return await function(*arguments, **named)
        except WarmcellError as error:
            raise ToolError(f"{error.code}: {error}") from error

    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined] # what the schema is made from
    return call


def _told(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a model needs to know of a sandbox."""
    told = {"sandbox_id": info["id"], "state": info["state"], "backend": info["backend"]}
    if info.get("gpus"):
        told["gpus"] = [gpu["name"] for gpu in info["gpus"]]
    if (info.get("terms") or {}).get("ends_at"):
        told["ends_at"] = info["terms"]["ends_at"]
    if info.get("error"):
        told["error"] = info["error"]["message"]
    return told


def _file(path: str, data: bytes, offset: int) -> CallToolResult:
    """A picture as one, text in pages, and of anything else only its size."""
    mime = PICTURE_ENDINGS.get(posixpath.splitext(path)[1].lower())
    if mime is not None:
        return CallToolResult(
            content=[ImageContent(type="image", data=base64.b64encode(data).decode(), mime_type=mime)]
        )
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return CallToolResult(content=[TextContent(type="text", text=f"[{path} is no text: {len(data)} bytes]")])
    shown = text[offset : offset + pages.TEXT_MAX]
    content = [TextContent(type="text", text=shown)]
    until = offset + len(shown)
    if until < len(text):
        content.append(TextContent(type="text", text=f"[{len(text) - until} characters more: offset={until}]"))
    return CallToolResult(content=[*content])
