"""What can be done with sandboxes, once for both flavours: `Sandbox` blocks, `AsyncSandbox` waits in a loop."""

import base64
import codecs
import contextlib
import inspect
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from warmcell.sandbox.client.calls import Calls
from warmcell.sandbox.client.core_files import CoreFiles
from warmcell.sandbox.client.results import CommandInfo, Execution, Metrics, Result, Showing
from warmcell.sandbox.client.transport import Transport
from warmcell.sandbox.client.wanted import Asked
from warmcell.sandbox.errors import (
    InvalidRequestError,
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

Telling = Callable[[str], object]
OnResult = Callable[[Result], object]


async def create(calls: Calls, asked: Asked, *, local: bool) -> SandboxInfo:
    """A new sandbox. One of the user's own keeper has the caller's interpreter where nothing else is said."""
    spec = dict(asked.body["spec"])
    if local and "snapshot" not in asked.body and "image" not in spec and "python" not in spec:
        spec["python"] = HERE
    body = {**asked.body, "spec": spec}
    said = await calls.call("POST", "/sandboxes", json=body, key=asked.key, timeout_s=CREATE_TIMEOUT_S)
    return SandboxInfo.from_json(said)


async def connect(calls: Calls, sandbox_id: str, timeout_s: float | None) -> SandboxInfo:
    """One that is there, awake."""
    body = {} if timeout_s is None else {"timeout_s": timeout_s}
    path = f"/sandboxes/{sandbox_id}/connect"
    return SandboxInfo.from_json(await calls.call("POST", path, json=body, key=_key(), timeout_s=MEMORY_TIMEOUT_S))


async def listing(
    calls: Calls, *, tags: Mapping[str, str] | None, states: Sequence[str] | None, owner: str
) -> list[SandboxInfo]:
    """All that fit, page by page."""
    found: list[SandboxInfo] = []
    after = ""
    while True:
        params = [("tag", f"{name}={value}") for name, value in (tags or {}).items()]
        params += [("limit", str(PAGE)), ("owner", owner), ("state", ",".join(states or ())), ("after", after)]
        said = await calls.call("GET", "/sandboxes", params=params)
        found += [SandboxInfo.from_json(one) for one in said["sandboxes"]]
        after = said["next"] or ""
        if not after:
            return found


class Core:
    """One sandbox."""

    def __init__(self, transport: Transport, info: SandboxInfo) -> None:
        self.calls = Calls(transport)
        self.transport = transport
        self.id = info.id
        self.info = info
        self.path = f"/sandboxes/{info.id}"
        self.files = CoreFiles(self.calls, self.path)

    # Its life -----------------------------------------------------------------------------------------------------

    async def refresh(self) -> SandboxInfo:
        return self._is(await self.calls.call("GET", self.path))

    async def kill(self) -> None:
        await self.calls.call("DELETE", self.path, timeout_s=MEMORY_TIMEOUT_S)

    async def set_terms(self, **changes: Any) -> SandboxInfo:
        return self._is(await self.calls.call("PATCH", self.path, json=changes))

    async def fork(self, n: int) -> list[SandboxInfo]:
        said = await self._memory("fork", {"n": n})
        return [SandboxInfo.from_json(one) for one in said["sandboxes"]]

    async def snapshot(self, name: str) -> SnapshotInfo:
        return SnapshotInfo.from_json(await self._memory("snapshot", {"name": name}))

    async def restore(self, snapshot: str) -> SandboxInfo:
        return self._is(await self._memory("restore", {"snapshot": snapshot}))

    async def suspend(self) -> SandboxInfo:
        return self._is(await self._memory("suspend", {}))

    async def resume(self) -> SandboxInfo:
        return self._is(await self._memory("resume", {}))

    async def metrics(self) -> Metrics:
        return Metrics.from_json(await self.calls.call("GET", f"{self.path}/metrics"))

    async def forward(self, port: int, expires_s: float) -> str:
        body, where = {"expires_in_s": expires_s}, self.transport.where
        where.absolute("")  # Before anything is made.
        said = await self.calls.call("POST", f"{self.path}/ports/{port}", json=body, key=_key())
        return where.absolute(said["path"], said["host"])

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
            shown = showing.take(said)
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
        if ended["status"] == "failed":
            raise from_json(ended["error"] or {})
        return showing.execution(ended)

    async def interrupt(self) -> None:
        await self.calls.call("POST", f"{self.path}/interrupt", json={})

    async def create_context(self, cwd: str) -> str:
        made = await self.calls.call("POST", f"{self.path}/contexts", json={"id": uuid.uuid4().hex, "cwd": cwd})
        return str(made["id"])

    async def contexts(self) -> list[str]:
        return [one["id"] for one in (await self.calls.call("GET", f"{self.path}/contexts"))["contexts"]]

    async def remove_context(self, context: str) -> None:
        await self.calls.call("DELETE", f"{self.path}/contexts/{context}")

    async def restart_context(self, context: str) -> None:
        await self.calls.call("POST", f"{self.path}/contexts/{context}/restart", json={})

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
        data = input.encode() if isinstance(input, str) else input
        if len(data) > INPUT_MAX_BYTES:
            raise InvalidRequestError(
                f"The input is larger than {INPUT_MAX_BYTES} bytes", hint="Write it to a file first: box.files.write()."
            )
        body = _command(argv, cwd=cwd, env=env, timeout_s=timeout_s)
        body["input"] = base64.b64encode(data).decode()
        output = _Output(on_stdout, on_stderr)
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
        return CommandInfo.from_json(said)

    async def commands(self) -> list[CommandInfo]:
        said = await self.calls.call("GET", f"{self.path}/commands")
        return [CommandInfo.from_json(one) for one in said["commands"]]

    async def command(self, command_id: str) -> CommandInfo:
        return CommandInfo.from_json(await self.calls.call("GET", f"{self.path}/commands/{command_id}"))

    async def wait(self, command_id: str, on_stdout: Telling | None, on_stderr: Telling | None) -> ExecResult:
        output = _Output(on_stdout, on_stderr)
        return await output.result(await self.calls.follow(f"{self.path}/commands", None, command_id, output.take))

    async def write(self, command_id: str, data: bytes, at: int, close: bool) -> int:
        """Input, from an offset on, so that what is sent twice arrives once."""
        path, params = f"{self.path}/commands/{command_id}/stdin", {"at": str(at), "close": "1" if close else "0"}
        said = await self.calls.call("POST", path, params=params, content=data, key=_key(), timeout_s=MEMORY_TIMEOUT_S)
        return int(said["received"])

    async def signal(self, command_id: str, signum: int) -> None:
        await self.calls.call("POST", f"{self.path}/commands/{command_id}/signal", json={"signum": signum})

    async def resize(self, command_id: str, rows: int, columns: int) -> None:
        size = {"rows": rows, "columns": columns}
        await self.calls.call("POST", f"{self.path}/commands/{command_id}/resize", json=size)

    async def kill_command(self, command_id: str) -> None:
        await self.calls.call("DELETE", f"{self.path}/commands/{command_id}")

    # ----------------------------------------------------------------------------------------------------------------

    async def _memory(self, verb: str, body: Mapping[str, Any]) -> Any:
        path = f"{self.path}/{verb}"
        return await self.calls.call("POST", path, json=body, key=_key(), timeout_s=MEMORY_TIMEOUT_S)

    async def _quietly(self, method: str, path: str) -> None:
        with contextlib.suppress(WarmcellError):
            await self.calls.call(method, path)

    def _is(self, said: Mapping[str, Any]) -> SandboxInfo:
        self.info = SandboxInfo.from_json(said)
        return self.info


class _Output:
    """Collects what a command says; a character that comes in two pieces is one."""

    def __init__(self, on_stdout: Telling | None, on_stderr: Telling | None) -> None:
        self._tell = {"stdout": on_stdout, "stderr": on_stderr}
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {name: decoder(errors="replace") for name in self._tell}
        self._parts: dict[str, list[str]] = {name: [] for name in self._tell}

    async def take(self, said: Mapping[str, Any]) -> None:
        for name, decoder in self._decoders.items():
            if name in said:
                await self._say(name, decoder.decode(base64.b64decode(said[name])))
        if "lost" in said:
            await self._say("stderr", f"[{said['lost']} pieces of output were lost]\n")

    async def result(self, ended: Mapping[str, Any]) -> ExecResult:
        for name, decoder in self._decoders.items():
            await self._say(name, decoder.decode(b"", final=True))
        if ended["error"] is not None:
            raise from_json(ended["error"])
        stdout, stderr = ("".join(self._parts[name]) for name in ("stdout", "stderr"))
        return ExecResult(stdout=stdout, stderr=stderr, exit_code=int(ended["exit_code"]))

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
    if not argv:
        raise InvalidRequestError("There is no command", hint='As in box.exec("ls", "-l").')
    return {
        "id": uuid.uuid4().hex,
        "argv": [str(one) for one in argv],
        "cwd": cwd,
        "env": dict(env or {}),
        "timeout_s": timeout_s,
    }


def _key() -> str:
    return uuid.uuid4().hex
