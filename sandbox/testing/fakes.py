"""Backends in memory, for tests of what stands above a backend. They keep the same contract as real ones."""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.base import ExitInfo
from warmcell.sandbox.backends.threads import in_thread
from warmcell.sandbox.errors import InvalidRequestError, UnsupportedOperationError, WarmcellError
from warmcell.sandbox.models import GpuDevice, LimitStatus, SandboxId, SandboxSpec
from warmcell.sandbox.reports import BackendReport, Capabilities

STDOUT, CONTROL = 1, 3
PROTOCOL = 1
PYTHON = "3.11.0"

Program = Callable[[Sequence[str]], tuple[str, int]]
"""Arguments to standard output and exit code."""

PROGRAMS: Mapping[str, Program] = {
    "echo": lambda arguments: (" ".join(arguments) + "\n", 0),
    "true": lambda arguments: ("", 0),
    "false": lambda arguments: ("", 1),
}


@dataclass(slots=True)
class FakeKernel:
    """A kernel of a fake sandbox: only the news of it."""

    pid: int
    exit_code: int | None = None


class FakeInstance:
    """A sandbox that is a socket: its guest speaks the guest protocol, its programs are functions."""

    workspace_note = ""
    waits = False
    stands_by = False
    shows_others = False

    def __init__(
        self, pid: int, directory: Path, limits: Mapping[str, LimitStatus], *, layer: Path | None = None
    ) -> None:
        self.pid = pid
        self.layer = layer
        """What it began with."""
        self.run_directory = directory / "run"
        self.guest_run_directory = str(self.run_directory)
        self.limits = limits
        self.kernels: list[FakeKernel] = []
        """Kernels that were asked for, the latest last."""
        self.requests: list[Mapping[str, Any]] = []
        """Every request that came, in order."""
        self.gpus: tuple[GpuDevice, ...] | None = None
        """That it was asked to show."""
        self.replaceable = False
        """Whether another one is as good."""
        self._ended: asyncio.Future[ExitInfo] = asyncio.get_running_loop().create_future()
        self._server: asyncio.Server | None = None
        self._listeners: list[asyncio.StreamWriter] = []
        self._open: set[asyncio.StreamWriter] = set()
        self._template: dict[str, Any] = {"event": "template", "state": "none", "name": ""}

    async def start(self) -> None:
        """Let its guest listen."""
        await in_thread(self.run_directory.mkdir, 0o700)
        self._server = await asyncio.start_unix_server(self._serve, self.run_directory / "init.sock")

    async def show_gpus(self, gpus: Sequence[GpuDevice]) -> None:
        """Note them."""
        self.gpus = tuple(gpus)

    def processes(self) -> Sequence[int]:
        """Its one imaginary process."""
        return () if self._ended.done() else (self.pid,)

    def oom_kills(self) -> int:
        """None, unless it was told to die of it."""
        return int(self._ended.done() and self._ended.result().oom_killed)

    async def wait(self) -> ExitInfo:
        """Wait for its end."""
        return await asyncio.shield(self._ended)

    def die(self, *, exit_code: int = 137, oom_killed: bool = False, message: str = "") -> None:
        """End it from outside, as a crash or a lack of memory would."""
        if not self._ended.done():
            self._ended.set_result(ExitInfo(exit_code=exit_code, oom_killed=oom_killed, message=message))
        for writer in list(self._open):
            writer.close()

    async def save_layer(self, target: Path) -> None:
        """It has no files; a note stands for them."""
        await in_thread((target / "layer.json").write_text, json.dumps({"pid": self.pid}))

    async def can_be_replaced_by(self, other: object, *, fork_server: bool = False) -> bool:
        """As it was told."""
        return self.replaceable

    async def stop(self, *, timeout: float = 5.0) -> ExitInfo:
        """End it and remove its files."""
        self.die()
        if self._server is not None:
            self._server.close()
            self._server = None
        await asyncio.to_thread(shutil.rmtree, self.run_directory, ignore_errors=True)
        return await self.wait()

    def end_kernel(self, exit_code: int) -> None:
        """Let its latest kernel end, and say so."""
        kernel = self.kernels[-1]
        kernel.exit_code = exit_code
        self._announce({"event": "kernel", "pid": kernel.pid, "state": "exited", "exit_code": exit_code})

    def _announce(self, event: Mapping[str, Any]) -> None:
        for writer in self._listeners:
            writer.write(_line(event))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            request = json.loads(await reader.readline() or b"{}")
            if self._ended.done():
                return
            self.requests.append(request)
            await self._answer(request, reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(
        self, request: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        match request.get("op"):
            case "hello":
                writer.write(_line({"ok": True, "pid": 1, "python": PYTHON, "protocol": PROTOCOL}))
            case "exec":
                writer.write(_line({"ok": True, "pid": 2}))
                writer.write(_executed(request["argv"]))
            case "prepare":
                self._template = {
                    "event": "template",
                    "state": "ready",
                    "name": request["name"],
                    "importing": "",
                    "since": 0.0,
                    "seconds": 0.0,
                    "imported": list(request["preload"]),
                    "failed": {},
                }
                writer.write(_line({"ok": True}))
                self._announce(self._template)
            case "kernel":
                kernel = FakeKernel(pid=100 + len(self.kernels))
                self.kernels.append(kernel)
                warm = request["engine"] == "template" and self._template["state"] == "ready"
                started = {"pid": kernel.pid, "started_from": "template" if warm else "cold"}
                writer.write(_line({"ok": True, **started, "sockets": Path(request["connection"]).stem}))
                self._announce({"event": "kernel", "pid": kernel.pid, "state": "running"})
            case "signal":
                living = [kernel for kernel in self.kernels if kernel.exit_code is None]
                known = [kernel for kernel in living if kernel.pid == request["pid"]]
                writer.write(
                    _line({"ok": True} if known else {"ok": False, "code": "not_found", "message": "no such process"})
                )
                if known and request["signum"] in (9, 15):
                    self.end_kernel(128 + request["signum"])
            case "events":
                writer.write(_line({"ok": True}))
                writer.write(_line(self._template))
                self._listeners.append(writer)
                await reader.read()
                self._listeners.remove(writer)
            case other:
                writer.write(_line({"ok": False, "code": "unsupported", "message": f"a fake has no {other!r}"}))


@dataclass
class FakeBackend:
    """A backend without processes. Implements `SandboxBackend`."""

    name: str = "fake"
    isolated: bool = False
    fails_with: WarmcellError | None = None
    """What the next creations raise, as a machine that lacks something would."""
    delay_s: float = 0.0
    """How long a creation takes."""
    instances: list[FakeInstance] = field(default_factory=list)
    """All that were made, the latest last."""
    _pids: "itertools.count[int]" = field(default_factory=lambda: itertools.count(4_000_000_000))

    @property
    def capabilities(self) -> Capabilities:
        """No isolation unless it is told to pretend; then also a closed network."""
        return Capabilities(
            isolated=self.isolated, gpus=True, networks=("none", "host") if self.isolated else ("host",)
        )

    async def probe(self) -> BackendReport:
        """Ready, unless it is told to fail."""
        failure = self.fails_with
        return BackendReport(
            name=self.name,
            ready=failure is None,
            capabilities=self.capabilities,
            why_not=failure.message if failure else "",
            hint=failure.hint if failure else "",
        )

    def fingerprint(self, spec: SandboxSpec) -> str:
        """The same as long as the interpreter is where it was."""
        return spec.python

    async def create(
        self,
        spec: SandboxSpec,
        *,
        sandbox_id: SandboxId,
        directory: Path,
        gpus: Sequence[GpuDevice] = (),
        layer: Path | None = None,
        named: SandboxId | None = None,
        later: bool = False,
        progress: Callable[[str], None] = lambda detail: None,
    ) -> FakeInstance:
        """A sandbox in memory; see the port. Of a layer it only takes note."""
        _check(spec)
        if spec.network not in self.capabilities.networks:
            raise UnsupportedOperationError("A fake has no such network", hint='Choose network "host".')
        progress("pretending")
        if self.fails_with is not None:
            raise self.fails_with
        await asyncio.sleep(self.delay_s)
        instance = FakeInstance(next(self._pids), directory, _limits(spec), layer=layer)
        try:
            await instance.start()
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(instance.stop()))
            raise
        self.instances.append(instance)
        return instance


def _check(spec: SandboxSpec) -> None:
    if not os.path.isabs(spec.python) or not os.access(spec.python, os.X_OK):
        raise InvalidRequestError(f"There is no interpreter {spec.python}", hint="Give an absolute path.")
    workspace = spec.workspace
    if workspace is not None and workspace.mode != "none" and not os.path.isdir(workspace.path):
        raise InvalidRequestError(f"The workspace {workspace.path} is not a directory", hint="Create it.")


def _limits(spec: SandboxSpec) -> Mapping[str, LimitStatus]:
    limits = spec.limits
    asked = {"memory": limits.memory_bytes, "pids": limits.pids, "cpu": limits.cpus, "layer": limits.layer_bytes}
    why = "a fake has no processes to limit"
    return {name: LimitStatus(value=value, enforced=False, why=why) for name, value in asked.items()}


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _executed(argv: Sequence[str]) -> bytes:
    """All frames of a finished program."""
    program = PROGRAMS.get(argv[0])
    stdout, code = ("", 127) if program is None else program(argv[1:])
    return _frame(STDOUT, stdout.encode()) + _frame(CONTROL, json.dumps({"exit_code": code}).encode())


def _frame(channel: int, content: bytes) -> bytes:
    return bytes((channel,)) + len(content).to_bytes(4, "big") + content if content else b""
