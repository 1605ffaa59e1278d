"""E2B's `process.Process`: commands of a sandbox, which go on when whoever started them has gone."""

import base64
import binascii
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, Final

from warmcell.extension.server.e2b import gateway, shapes
from warmcell.extension.server.e2b.calls import client_stream, paced, ping_s, server_stream, timeout_s, unary
from warmcell.extension.server.e2b.fields import Fields
from warmcell.extension.server.e2b.framing import Code, ConnectError
from warmcell.extension.server.e2b.handler import E2bHandler, Verb
from warmcell.sandbox import errors
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError

KILL_WAIT_S: Final = "10"
SIGNALS: Final[Mapping[str, int]] = {"SIGNAL_SIGTERM": signal.SIGTERM, "SIGNAL_SIGKILL": signal.SIGKILL}


async def start(request: E2bHandler, message: Fields) -> AsyncGenerator[Mapping[str, Any], None]:
    """Start one and tell what it says. A time-out of the call is one of the command's, too."""
    config = message.message("process") or Fields({})
    argv, env = [config.text("cmd"), *config.texts("args")], config.mapping("envs")
    own = gateway.started_by(argv)
    check_user(request, also="" if own is None else gateway.USER)
    if not argv[0]:
        raise InvalidRequestError("process.cmd is missing", hint="Name the program.")
    if own is not None:
        await gateway.note(request, env)
    pty = message.message("pty")
    asked = {
        "argv": own or argv,
        "env": env,
        "cwd": await _directory(request, config.text("cwd", most=4096)),
        "stdin": message.flag("stdin") is not False and pty is None,
        "pty": None if pty is None else _size(pty),
        "tag": message.text("tag", most=256),
        "timeout_s": timeout_s(request),
    }
    async with request.keeper.lines("POST", _path(request), asked, params={"follow": "1"}) as lines:
        async for event in _events(paced(lines, ping_s(request)), pty=pty is not None):
            yield event


async def connect(request: E2bHandler, message: Fields) -> AsyncGenerator[Mapping[str, Any], None]:
    """Tell what one says from now on."""
    command = await _selected(request, message)
    yield _started(command)
    path = f"{_path(request)}/{command['id']}/output"
    async with request.keeper.lines("GET", path, params={"from": str(command["output"])}) as lines:
        async for event in _events(paced(lines, ping_s(request)), pty=command["pty"]):
            yield event


async def list_them(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """Those that run."""
    shown = [command for command in await _running(request) if not command["tag"].startswith("e2b.")]
    return {"processes": [_shown(command) for command in shown]}


async def send_input(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """Bytes for its input, or for its terminal."""
    await _send(request, await _selected(request, message), message)
    return {}


async def stream_input(request: E2bHandler, messages: AsyncIterator[Fields]) -> Mapping[str, Any]:
    """The same, as a stream that first says for whom it is."""
    command: Mapping[str, Any] | None = None
    async for message in messages:
        kind = message.one_of("start", "data", "keepalive")
        said = message.message(kind)
        assert said is not None
        if kind == "start":
            command = await _selected(request, said)
        elif kind == "data":
            if command is None:
                raise InvalidRequestError("The first message must be start", hint="Say first for which process it is.")
            await _send(request, command, said)
    return {}


async def send_signal(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """To it and what it has started."""
    name = message.text("signal")
    if name not in SIGNALS:
        raise InvalidRequestError(f"signal must be one of {', '.join(SIGNALS)}", hint="Send it by its name.")
    command = await _selected(request, message)
    path = f"{_path(request)}/{command['id']}"
    await request.keeper.ask("POST", f"{path}/signal", {"signum": int(SIGNALS[name])})
    if SIGNALS[name] == signal.SIGKILL:  # Whoever has killed it finds it dead.
        await request.keeper.ask("GET", path, params={"wait": KILL_WAIT_S})
    return {}


async def close_stdin(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """It reads the end of its input."""
    command = await _selected(request, message)
    path = f"{_path(request)}/{command['id']}/stdin"
    await request.keeper.ask("POST", path, params={"close": "1"}, content=b"")
    return {}


async def update(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """The size of its terminal."""
    pty = message.message("pty")
    command = await _selected(request, message)
    if pty is not None:
        await request.keeper.ask("POST", f"{_path(request)}/{command['id']}/resize", _size(pty))
    return {}


def check_user(request: E2bHandler, named: str = "", *, also: str = "") -> None:
    """A sandbox has one user; `named` is whom the body asks for, `also` another name for that user in this request.

    Raises:
        InvalidRequestError: Another is asked for, by name in the Authorization or the query.
    """
    asked = named or request.argument("username") or ""
    kind, _, encoded = request.request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            asked = base64.b64decode(encoded, validate=True).decode().partition(":")[0]
        except (binascii.Error, ValueError):
            raise InvalidRequestError("The Authorization header is not of its form", hint="Leave it out.") from None
    if asked not in ("", shapes.USER, also):
        raise InvalidRequestError(f"There is no user {asked!r} in a sandbox", hint="Leave `user` out.")


async def _events(lines: AsyncIterator[dict[str, Any]], *, pty: bool) -> AsyncIterator[Mapping[str, Any]]:
    """A command's output as events."""
    async for line in lines:
        if "command" in line:
            yield _started(line["command"])
        elif "ended" in line:
            yield _ended(line["ended"])
        elif "stdout" in line:
            yield _event("data", {"pty" if pty else "stdout": line["stdout"]})
        elif "stderr" in line:
            yield _event("data", {"stderr": line["stderr"]})
        elif "lost" in line:
            note = f"[{line['lost']} pieces of output were not read in time and are lost]\n"
            yield _event("data", {"pty" if pty else "stderr": base64.b64encode(note.encode()).decode()})
        else:
            yield _event("keepalive", {})


def _event(kind: str, what: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"event": {kind: what}}


def _started(command: Mapping[str, Any]) -> Mapping[str, Any]:
    return _event("start", {"pid": command["pid"]})


def _ended(command: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its end; raises ConnectError where it did not come to its own."""
    error, exit_code = command["error"], command["exit_code"]
    if error is not None and error["code"] == errors.OperationTimeoutError.code:
        raise ConnectError(Code.DEADLINE_EXCEEDED, error["message"])
    if exit_code is None:
        message = error["message"] if error is not None else "The command has ended without an exit code"
        raise ConnectError(Code.UNAVAILABLE, message)
    status = f"exit status {exit_code}"
    said = {"exitCode": exit_code, "exited": True, "status": status}
    return _event("end", said if exit_code == 0 else {**said, "error": status})


def _shown(command: Mapping[str, Any]) -> Mapping[str, Any]:
    program, *arguments = command["argv"]
    config = {"cmd": program, "args": arguments, **({"cwd": command["cwd"]} if command["cwd"] else {})}
    return {"config": config, "pid": command["pid"], **({"tag": command["tag"]} if command["tag"] else {})}


async def _directory(request: E2bHandler, cwd: str) -> str:
    """Where a command begins; a relative path is one of the home's."""
    if not cwd or cwd.startswith("/"):
        return cwd
    info = await request.keeper.ask("GET", f"/sandboxes/{request.sandbox_id}/files/stat", params={"path": cwd})
    return str(info["path"])


def _size(pty: Fields) -> dict[str, int]:
    size = pty.message("size") or Fields({})
    rows, columns = size.whole("rows", most=10_000), size.whole("cols", most=10_000)
    return {"rows": rows or 24, "columns": columns or 80}


async def _selected(request: E2bHandler, message: Fields) -> Mapping[str, Any]:
    """The command that runs and is meant.

    Raises:
        NotFoundError: None like that runs.
    """
    selector = message.message("process") or Fields({})
    by = selector.one_of("pid", "tag")
    wanted: int | str | None = selector.whole("pid") if by == "pid" else selector.text("tag")
    found = [command for command in await _running(request) if command[by] == wanted]
    if not found:
        raise NotFoundError(f"No process with {by} {wanted} runs", hint="List those that do.")
    return found[-1]


async def _running(request: E2bHandler) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = (await request.keeper.ask("GET", _path(request)))["commands"]
    return [command for command in found if command["state"] == "running"]


async def _send(request: E2bHandler, command: Mapping[str, Any], message: Fields) -> None:
    given = message.message("input") or Fields({})
    data = given.data(given.one_of("stdin", "pty"))
    await request.keeper.ask("POST", f"{_path(request)}/{command['id']}/stdin", content=data)


def _path(request: E2bHandler) -> str:
    return f"/sandboxes/{request.sandbox_id}/commands"


def _verb(name: str, serve: Any) -> Verb:
    return Verb("envd", "POST", rf"/process\.Process/{name}", serve)


VERBS: Final[Sequence[Verb]] = (
    _verb("Start", server_stream(start)),
    _verb("Connect", server_stream(connect)),
    _verb("List", unary(list_them)),
    _verb("SendInput", unary(send_input)),
    _verb("StreamInput", client_stream(stream_input)),
    _verb("SendSignal", unary(send_signal)),
    _verb("CloseStdin", unary(close_stdin)),
    _verb("Update", unary(update)),
)
