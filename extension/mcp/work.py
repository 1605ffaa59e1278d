"""Code and commands that go on whether or not somebody waits: a handle names each, and whoever has it asks again."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from mcp_types import CallToolResult, TextContent

from warmcell.extension.mcp import pages
from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.errors import InvalidRequestError

PROGRESS_S: Final = 2.0
"""Between two words to a client that waits."""

RENEW_S: Final = 30.0
"""Whoever waits uses the sandbox: its time begins anew so often."""

WAIT_MAX_S: Final = 3600.0
NOUNS: Final = {"run": "runs", "cmd": "commands"}

Progress = Callable[[float, str], Awaitable[None]]


def new_id() -> str:
    """For a run or a command of ours."""
    return uuid.uuid4().hex[:16]


def place(sandbox_id: str, handle: str) -> str:
    """The API's path of what a handle names.

    Raises:
        InvalidRequestError: It is none.
    """
    kind, _, item = handle.partition("-")
    if kind not in NOUNS or not _is_id(item):
        raise InvalidRequestError(f"{handle!r} is no handle", hint="`list_work` lists those of a sandbox.")
    return f"{box(sandbox_id)}/{NOUNS[kind]}/{item}"


def box(sandbox_id: str) -> str:
    """The API's path of a sandbox.

    Raises:
        InvalidRequestError: It cannot be an id.
    """
    if not _is_id(sandbox_id):
        raise InvalidRequestError(f"{sandbox_id!r} is no sandbox", hint="`list_sandboxes` lists yours.")
    return f"/sandboxes/{sandbox_id}"


async def follow(
    calls: Calls, sandbox_id: str, handle: str, *, after: str, wait_s: float, progress: Progress
) -> CallToolResult:
    """Wait for it for so long, telling the client that it goes on; then what it has said, whether or not it has ended.

    Raises:
        WarmcellError: There is no such thing, or the sandbox is gone.
    """
    path, began = place(sandbox_id, handle), time.monotonic()
    wait_s = min(max(wait_s, 0.0), WAIT_MAX_S)
    info = await calls.call("GET", path)
    renewed = -RENEW_S
    while info["state"] != "ended" and (left := began + wait_s - time.monotonic()) > 0:
        waited = time.monotonic() - began
        if waited - renewed >= RENEW_S:
            await calls.call("POST", f"{box(sandbox_id)}/connect", json={}, timeout_s=None)
            renewed = waited
        await progress(waited, f"{handle}: {info['state']} for {time.time() - info['started_at']:.0f} s")
        info = await calls.call("GET", path, params={"wait": f"{min(PROGRESS_S, left):.3f}"})
    page, whole = await pages.read(calls, path, after)
    ended = info["state"] == "ended"
    told: dict[str, Any] = {"handle": handle, "state": info["state"], "next": page.next, "more": not (ended and whole)}
    for name in ("status", "exit_code"):
        if info.get(name) is not None:
            told[name] = info[name]
    if info.get("error"):
        told["error"] = info["error"]["message"]
    return CallToolResult(
        content=[*page.content(), TextContent(type="text", text=_line(told, ended=ended, whole=whole))],
        structured_content=told,
        is_error=False,
    )


async def all_of(calls: Calls, sandbox_id: str) -> list[dict[str, Any]]:
    """Runs and commands of a sandbox, with their handles, the oldest first."""
    path = box(sandbox_id)
    answers = await asyncio.gather(*(calls.call("GET", f"{path}/{noun}") for noun in NOUNS.values()))
    found = []
    for (kind, noun), said in zip(NOUNS.items(), answers, strict=True):
        for one in said[noun]:
            kept = {name: one[name] for name in ("state", "status", "exit_code", "argv", "context") if name in one}
            found.append({"handle": f"{kind}-{one['id']}", "started_at": one["started_at"], **kept})
    return sorted(found, key=lambda one: float(one["started_at"]))


def _is_id(text: str) -> bool:
    """Whether it can be a step of a path, and no other path."""
    return text.isascii() and text.isalnum()


def _line(told: Mapping[str, Any], *, ended: bool, whole: bool) -> str:
    """The last line of an answer: how it stands, and what to do next."""
    how = told.get("status") or (f"exit code {told['exit_code']}" if "exit_code" in told else told["state"])
    if "error" in told:
        how = f"{how}: {told['error']}"
    ask = f'read_output(handle="{told["handle"]}", after="{told["next"]}")'
    if not whole:
        return f"[{how}; there is more: {ask}]"
    return f"[ended: {how}]" if ended else f"[still {told['state']}: {ask} waits for more]"
