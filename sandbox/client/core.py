"""What can be done with sandboxes, once for both flavours: `Sandbox` blocks, `AsyncSandbox` waits in a loop."""

import base64
import codecs
import contextlib
import inspect
import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from warmcell.sandbox.client import _api, given
from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.client.core_files import CoreFiles
from warmcell.sandbox.client.results import CommandInfo, Execution, Metrics, Result, Showing
from warmcell.sandbox.client.transport import Transport
from warmcell.sandbox.client.wanted import Asked
from warmcell.sandbox.errors import (
    InvalidRequestError,
    NotFoundError,
    WarmcellError,
    from_json,
)
from warmcell.sandbox.models import ExecResult, SandboxInfo, SnapshotInfo

CREATE_TIMEOUT_S = 600.0
"""It may queue for a GPU, or be the first one of an image."""

MEMORY_TIMEOUT_S = 600.0
HERE = os.path.abspath(sys.executable)
INPUT_MAX_BYTES = 8 * 2**20
PAGE = 500
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

Telling = Callable[[str], object]
OnResult = Callable[[Result], object]


async def create(calls: Calls, asked: Asked, *, local: bool) -> SandboxInfo:
    """A new sandbox. One of the user's own keeper has the caller's interpreter where nothing else is said."""
    spec = dict(asked.body["spec"])
    if local and "snapshot" not in asked.body and "image" not in spec and "python" not in spec:
        spec["python"] = HERE
    body = {**asked.body, "spec": spec}
    said = await calls.call("POST", "/sandboxes", json=body, key=asked.key, timeout_s=CREATE_TIMEOUT_S)
    return _api.told(SandboxInfo, said, calls.who)


async def connect(calls: Calls, sandbox_id: str, timeout_s: float | None) -> SandboxInfo:
    """One that is there, awake."""
    body = {} if timeout_s is None else {"timeout_s": timeout_s}
    said = await calls.call("POST", f"{_box(sandbox_id)}/connect", json=body, key=_key(), timeout_s=MEMORY_TIMEOUT_S)
    return _api.told(SandboxInfo, said, calls.who)


async def listing(
    calls: Calls, *, tags: Mapping[str, str] | None, states: Sequence[str] | None, owner: str
) -> list[SandboxInfo]:
    """All that fit, page by page."""
    found: list[SandboxInfo] = []
    after = ""
    while True:
        params = [("tag", f"{name}={value}") for name, value in (tags or {}).items()]
        params += [("limit", str(PAGE)), ("owner", owner), ("after", after)]
        params += [("state", ",".join(given.texts("states", states or ())))]
        said = await calls.call("GET", "/sandboxes", params=params)
        found += [_api.told(SandboxInfo, one, calls.who) for one in _api.field(said, "sandboxes", list, calls.who)]
        after = str(said.get("next") or "")
        if not after:
            return found


class Core:
    """One sandbox."""

    def __init__(self, transport: Transport, info: SandboxInfo) -> None:
        self.calls = Calls(transport)
        self.transport = transport
        self.id = info.id
        self.info = info
        self.path = _box(info.id)
        self.files = CoreFiles(self.calls, self.path)
        self.killed = False

    # Its life -----------------------------------------------------------------------------------------------------

    async def refresh(self) -> SandboxInfo:
        return self._is(await self.calls.call("GET", self.path))

    async def kill(self) -> None:
        if not self.killed:  # `with` has ended it already, and let go of the way there.
            await self.calls.call("DELETE", self.path, timeout_s=MEMORY_TIMEOUT_S)
            self.killed = True

    async def set_terms(self, **changes: Any) -> SandboxInfo:
        return self._is(await self.calls.call("PATCH", self.path, json=changes))

    async def fork(self, n: int) -> list[SandboxInfo]:
        said = await self._memory("fork", {"n": n})
        return [self._told(SandboxInfo, one) for one in self._field(said, "sandboxes", list)]

    async def snapshot(self, name: str) -> SnapshotInfo:
        return self._told(SnapshotInfo, await self._memory("snapshot", {"name": name}))

    async def restore(self, snapshot: str) -> SandboxInfo:
        return self._is(await self._memory("restore", {"snapshot": snapshot}))

    async def suspend(self) -> SandboxInfo:
        return self._is(await self._memory("suspend", {}))

    async def resume(self) -> SandboxInfo:
        return self._is(await self._memory("resume", {}))

    async def metrics(self) -> Metrics:
        return self._told(Metrics, await self.calls.call("GET", f"{self.path}/metrics"))

    async def forward(self, port: int, expires_s: float) -> str:
        body, where = {"expires_in_s": expires_s}, self.transport.where
        where.absolute("")  # Before anything is made.
        said = await self.calls.call("POST", f"{self.path}/ports/{port}", json=body, key=_key())
        host = said["host"] if isinstance(said, Mapping) and isinstance(said.get("host"), str) else None
        return where.absolute(self._field(said, "path", str), host)

    # Code ---------------------------------------------------------------------------------------------------------

    async def run(
        self,
        code: str,
        *,
        context: str,
        timeout_s: float | None,
        env: Mapping[str, str] | None,
        on_stdout: Telling | None,
        on_stderr: Telling | None,
        on_result: OnResult | None,
    ) -> Execution:
        showing = Showing()
        tell: dict[str, Callable[[Any], object] | None] = {
            "stdout": on_stdout,
            "stderr": on_stderr,
            "result": on_result,
        }

        async def entry(said: Mapping[str, Any]) -> None:
            if "lost" in said:
                showing.stderr.append(f"[{said['lost']} pieces of output were lost]\n")
            try:
                shown = showing.take(said)
            except (AttributeError, TypeError) as error:
                raise self.calls.odd("a message of no form that is known") from error
            if shown is not None:
                await _told(tell[shown[0]], shown[1])

        run_id = uuid.uuid4().hex
        body = {"id": run_id, "code": code, "context": context, "timeout_s": timeout_s, "env": dict(env or {})}
        try:
            ended = await self.calls.follow(f"{self.path}/runs", body, run_id, entry)
        except BaseException as error:
            if not isinstance(error, WarmcellError):  # Whoever waits for it has been interrupted.
                await self._quietly("DELETE", f"{self.path}/runs/{run_id}")
            raise
        if ended.get("status") == "failed":
            raise from_json(ended.get("error") or {})
        return showing.execution(ended)

    async def interrupt(self) -> None:
        await self.calls.call("POST", f"{self.path}/interrupt", json={})

    async def create_context(self, cwd: str) -> str:
        made = await self.calls.call("POST", f"{self.path}/contexts", json={"id": uuid.uuid4().hex, "cwd": cwd})
        return self._field(made, "id", str)

    async def contexts(self) -> list[str]:
        said = await self.calls.call("GET", f"{self.path}/contexts")
        return [self._field(one, "id", str) for one in self._field(said, "contexts", list)]

    async def remove_context(self, context: str) -> None:
        await self.calls.call("DELETE", self._context(context))

    async def restart_context(self, context: str) -> None:
        await self.calls.call("POST", f"{self._context(context)}/restart", json={})

    # Commands -----------------------------------------------------------------------------------------------------

    async def exec(
        self,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str] | None,
        input: bytes | str,
        timeout_s: float | None,
        on_stdout: Telling | None,
        on_stderr: Telling | None,
    ) -> ExecResult:
        data = given.as_bytes(input)
        if len(data) > INPUT_MAX_BYTES:
            raise InvalidRequestError(
                f"The input is larger than {INPUT_MAX_BYTES} bytes", hint="Write it to a file first: box.files.write()."
            )
        body = _command(argv, cwd=cwd, env=env, timeout_s=timeout_s)
        body["input"] = base64.b64encode(data).decode()
        output = _Output(self.calls, on_stdout, on_stderr)
        try:
            ended = await self.calls.follow(f"{self.path}/commands", body, body["id"], output.take)
        except BaseException as error:
            if not isinstance(error, WarmcellError):
                await self._quietly("DELETE", f"{self.path}/commands/{body['id']}")
            raise
        return await output.result(ended)

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str] | None,
        timeout_s: float | None,
        pty: tuple[int, int] | None,
        tag: str,
    ) -> CommandInfo:
        body = _command(argv, cwd=cwd, env=env, timeout_s=timeout_s)
        body |= {"stdin": True, "tag": tag, "pty": None if pty is None else {"rows": pty[0], "columns": pty[1]}}
        said = await self.calls.call("POST", f"{self.path}/commands", json=body, key=body["id"])
        return self._told(CommandInfo, said)

    async def commands(self) -> list[CommandInfo]:
        said = await self.calls.call("GET", f"{self.path}/commands")
        return [self._told(CommandInfo, one) for one in self._field(said, "commands", list)]

    async def command(self, command_id: str) -> CommandInfo:
        return self._told(CommandInfo, await self.calls.call("GET", self._command(command_id)))

    async def wait(self, command_id: str, on_stdout: Telling | None, on_stderr: Telling | None) -> ExecResult:
        output, item = _Output(self.calls, on_stdout, on_stderr), _part(command_id)
        return await output.result(await self.calls.follow(f"{self.path}/commands", None, item, output.take))

    async def write(self, command_id: str, data: bytes | str, *, close: bool = False) -> None:
        content, params = given.as_bytes(data), {"close": "1" if close else "0"}
        path = f"{self._command(command_id)}/stdin"
        await self.calls.call("POST", path, params=params, content=content, key=_key(), timeout_s=MEMORY_TIMEOUT_S)

    async def signal(self, command_id: str, signum: int) -> None:
        await self.calls.call("POST", f"{self._command(command_id)}/signal", json={"signum": signum})

    async def resize(self, command_id: str, rows: int, columns: int) -> None:
        size = {"rows": rows, "columns": columns}
        await self.calls.call("POST", f"{self._command(command_id)}/resize", json=size)

    async def kill_command(self, command_id: str) -> None:
        await self.calls.call("DELETE", self._command(command_id))

    # ----------------------------------------------------------------------------------------------------------------

    async def _memory(self, verb: str, body: Mapping[str, Any]) -> Any:
        path = f"{self.path}/{verb}"
        return await self.calls.call("POST", path, json=body, key=_key(), timeout_s=MEMORY_TIMEOUT_S)

    async def _quietly(self, method: str, path: str) -> None:
        with contextlib.suppress(WarmcellError):
            await self.calls.call(method, path)

    def _is(self, said: object) -> SandboxInfo:
        self.info = self._told(SandboxInfo, said)
        return self.info

    def _command(self, command_id: str) -> str:
        return f"{self.path}/commands/{_part(command_id)}"

    def _context(self, context: str) -> str:
        return f"{self.path}/contexts/{_part(context)}"

    def _told(self, kind: type[_api.Told], said: object) -> _api.Told:
        return _api.told(kind, said, self.calls.who)

    def _field(self, said: object, name: str, kind: type[_api.Value]) -> _api.Value:
        return _api.field(said, name, kind, self.calls.who)


class _Output:
    """Collects what a command says; a character that comes in two pieces is one."""

    def __init__(self, calls: Calls, on_stdout: Telling | None, on_stderr: Telling | None) -> None:
        self._calls = calls
        self._tell = {"stdout": on_stdout, "stderr": on_stderr}
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {name: decoder(errors="replace") for name in self._tell}
        self._parts: dict[str, list[str]] = {name: [] for name in self._tell}

    async def take(self, said: Mapping[str, Any]) -> None:
        for name, decoder in self._decoders.items():
            if name in said:
                try:
                    data = base64.b64decode(said[name], validate=True)
                except (TypeError, ValueError) as error:
                    raise self._calls.odd("output that is no base64") from error
                await self._say(name, decoder.decode(data))
        if "lost" in said:
            await self._say("stderr", f"[{said['lost']} pieces of output were lost]\n")

    async def result(self, ended: Mapping[str, Any]) -> ExecResult:
        for name, decoder in self._decoders.items():
            await self._say(name, decoder.decode(b"", final=True))
        stdout, stderr = ("".join(self._parts[name]) for name in ("stdout", "stderr"))
        if isinstance(ended.get("error"), Mapping):
            error = from_json(ended["error"])
            error.details |= {"stdout": stdout, "stderr": stderr}
            raise error
        exit_code = _api.field(ended, "exit_code", int, self._calls.who)
        return ExecResult(stdout=stdout, stderr=stderr, exit_code=exit_code)

    async def _say(self, name: str, text: str) -> None:
        if text:
            self._parts[name].append(text)
            await _told(self._tell[name], text)


async def _told(who: Callable[[Any], object] | None, what: object) -> None:
    if who is not None:
        done = who(what)
        if inspect.isawaitable(done):
            await done


def _command(
    argv: Sequence[str], *, cwd: str, env: Mapping[str, str] | None, timeout_s: float | None
) -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "argv": given.arguments(argv),
        "cwd": cwd,
        "env": dict(env or {}),
        "timeout_s": timeout_s,
    }


def _box(sandbox_id: str) -> str:
    return f"/sandboxes/{_part(sandbox_id)}"


def _part(name: object) -> str:
    """One step of a path: what somebody takes for an id leads to nothing else."""
    if not isinstance(name, str) or not ID.fullmatch(name):
        raise NotFoundError(f"{str(name)[:80]!r} is no id", hint="Give it as it was told.")
    return name


def _key() -> str:
    return uuid.uuid4().hex
