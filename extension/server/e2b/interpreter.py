"""E2B's code interpreter: code in a sandbox's kernel, line by line as it comes, and contexts."""

import asyncio
import contextlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

from warmcell.extension.server.e2b import failures, languages, results, shapes
from warmcell.extension.server.e2b.calls import paced
from warmcell.extension.server.e2b.handler import E2bHandler, Verb
from warmcell.sandbox.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    UnauthenticatedError,
    WarmcellError,
)

DEFAULT_CONTEXT: Final = "default"
HOME: Final = "/home/user"
"""Where contexts begin, as clients know it."""
CODE_MAX: Final = 4 * 2**20
KEEPALIVE_S: Final = 5.0
"""How often at least clients of `/execute` hear something."""


async def execute(request: E2bHandler) -> None:
    """Run code. A client that goes away interrupts it."""
    body = await request.body_stream.fields()
    if body.has("context_id") and body.has("language"):
        raise InvalidRequestError("Give context_id or language, not both", hint="A context has its language.")
    language = languages.known(body.text("language"))
    usual = DEFAULT_CONTEXT if language == languages.PYTHON else language
    context = body.text("context_id", most=64) or usual
    language = languages.of_context(context)
    await _ensure(request, context)
    run_id = uuid.uuid4().hex
    path = f"/sandboxes/{request.sandbox_id}/runs"
    asked = {
        "id": run_id,
        "code": languages.as_python(body.text("code", most=CODE_MAX), language),
        "context": context,
        "linger_s": 0,
        "env": body.mapping("env_vars"),
        "env_stays": False,
    }
    try:
        async with request.keeper.lines("POST", path, asked, params={"follow": "1"}) as lines:
            request.set_header("Content-Type", "application/x-ndjson")
            shown = False
            async for entry in paced(lines, KEEPALIVE_S):
                if "ended" in entry and entry["ended"]["status"] != "ok" and await _is_gone(request):
                    raise failures.ended_meanwhile()  # Clients that hear a break instead of it ask why.
                if "ended" in entry:
                    for line in results.ending(entry["ended"], shown=shown):
                        await _tell(request, line)
                elif not entry:
                    await _tell(request, {"type": "keepalive"})
                elif "run" not in entry and (told := results.line(entry)) is not None:
                    shown = shown or told["type"] == "error"
                    await _tell(request, told)
    except UnauthenticatedError as error:
        if not request.streams:
            raise
        why = {"name": error.code, "value": error.message, "traceback": str(error)}
        await _tell(request, {"type": "error", **why})
        await _tell(request, {"type": "end_of_execution"})
    except asyncio.CancelledError:
        with contextlib.suppress(WarmcellError):
            await request.keeper.ask("DELETE", f"{path}/{run_id}")
        raise
    request.finish()


async def _is_gone(request: E2bHandler) -> bool:
    """Whether there is no such sandbox any more."""
    try:
        return not shapes.is_shown(await request.keeper.ask("GET", f"/sandboxes/{request.sandbox_id}"))
    except NotFoundError:
        return True


async def contexts(request: E2bHandler) -> None:
    """Its contexts: variables of their own, each in a process of its own."""
    found = await request.keeper.ask("GET", f"/sandboxes/{request.sandbox_id}/contexts")
    shown = [_context(one) for one in found["contexts"]]
    if languages.LISTED not in [one["id"] for one in shown]:
        shown.insert(1, _context({"id": languages.LISTED, "cwd": ""}))
    request.answer(shown)


async def new_context(request: E2bHandler) -> None:
    """One more."""
    body = await request.body_stream.fields()
    name = languages.new_context(languages.known(body.text("language")))
    asked = {"id": name, "cwd": body.text("cwd", most=4096)}
    request.answer(_context(await request.keeper.ask("POST", f"/sandboxes/{request.sandbox_id}/contexts", asked)))


async def remove_context(request: E2bHandler) -> None:
    """Its variables are gone with it."""
    try:
        await request.keeper.ask("DELETE", _path(request))
    except NotFoundError:
        if not languages.is_usual(request.groups["context"]):
            raise
    request.answer(None, 204)


async def restart_context(request: E2bHandler) -> None:
    """Its variables are gone, it stays."""
    await _ensure(request, request.groups["context"])
    request.answer(_context(await request.keeper.ask("POST", f"{_path(request)}/restart", {})))


async def health(request: E2bHandler) -> None:
    """Whether the sandbox is there; a paused one is not."""
    info = await request.keeper.ask("GET", f"/sandboxes/{request.sandbox_id}")
    if not shapes.is_shown(info) or shapes.state_of(info) == "paused":
        raise failures.unknown_sandbox(request.sandbox_id)
    request.answer(None, 204)


async def _ensure(request: E2bHandler, context: str) -> None:
    """Have that context be there, if it is one that a language has without being asked for it."""
    if languages.is_usual(context):
        with contextlib.suppress(ConflictError):
            await request.keeper.ask("POST", f"/sandboxes/{request.sandbox_id}/contexts", {"id": context})


def _context(one: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": one["id"], "language": languages.of_context(one["id"]), "cwd": one["cwd"] or HOME}


def _path(request: E2bHandler) -> str:
    return f"/sandboxes/{request.sandbox_id}/contexts/{request.groups['context']}"


async def _tell(request: E2bHandler, line: Mapping[str, Any]) -> None:
    await request.tell(failures.encoded(line) + b"\n")


_ONE: Final = r"/contexts/(?P<context>[A-Za-z0-9_-]{1,64})"

VERBS: Final[Sequence[Verb]] = (
    Verb("interpreter", "POST", r"/execute", execute),
    Verb("interpreter", "GET", r"/contexts", contexts, ("envd", "traffic")),
    Verb("interpreter", "POST", r"/contexts", new_context, ("envd", "traffic")),
    Verb("interpreter", "DELETE", _ONE, remove_context, ("envd", "traffic")),
    Verb("interpreter", "POST", rf"{_ONE}/restart", restart_context, ("envd", "traffic")),
    Verb("interpreter", "GET", r"/health", health, ("envd", "traffic")),
    Verb("envd", "GET", r"/health", health),
)
