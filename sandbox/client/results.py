"""What the SDK gives back: results of code and commands, files, and what a sandbox uses."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from warmcell.sandbox.models import ErrorInfo
from warmcell.sandbox.wire import Wire

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One thing that code has shown: the value of its last line, a picture, a table."""

    data: Mapping[str, Any]
    """By MIME type, as Jupyter has it; pictures in base64."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    main: bool = False
    """It is the value of the last line."""

    @property
    def text(self) -> str | None:
        """As plain text."""
        return self._as("text/plain")

    @property
    def html(self) -> str | None:
        """As HTML."""
        return self._as("text/html")

    @property
    def png(self) -> str | None:
        """As a PNG in base64."""
        return self._as("image/png")

    @property
    def json(self) -> object:
        """As JSON."""
        return self.data.get("application/json")

    def _as(self, mime: str) -> str | None:
        found = self.data.get(mime)
        if isinstance(found, list):
            return "".join(map(str, found))
        return None if found is None else str(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionError:
    """What the code has raised, or why it did not come to its end."""

    name: str
    """Of the exception; "Interrupted" or "TimeoutError" where it was stopped."""
    value: str
    traceback: str = ""
    """As a notebook shows it, without colours."""

    def __str__(self) -> str:
        return self.traceback or f"{self.name}: {self.value}"


class CodeError(Exception):
    """Code in a sandbox has failed; raised by `Execution.check`."""

    def __init__(self, error: ExecutionError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What became of code that was run in a sandbox."""

    stdout: str = ""
    stderr: str = ""
    results: tuple[Result, ...] = ()
    error: ExecutionError | None = None
    execution_count: int | None = None

    @property
    def text(self) -> str | None:
        """The value of its last line as text; None if it has none."""
        return next((result.text for result in self.results if result.main), None)

    def check(self) -> "Execution":
        """Itself, if nothing was raised.

        Raises:
            CodeError: The code has failed.
        """
        if self.error is not None:
            raise CodeError(self.error)
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo(Wire):
    """What there is to know of a file in a sandbox."""

    path: str
    name: str
    type: Literal["file", "directory", "symlink", "other"]
    size_bytes: int
    mode: int
    owner: str
    group: str
    modified_at: float
    """Unix time in seconds."""
    target: str | None = None
    """Of a symbolic link: what it says."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What was noted on it as it was uploaded (E2B's wire), in extended attributes `user.e2b.*`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandInfo(Wire):
    """What is told of a process that was started in a sandbox."""

    id: str
    argv: tuple[str, ...]
    cwd: str = ""
    tag: str = ""
    pid: int = 0
    pty: bool = False
    state: Literal["running", "ended"] = "running"
    exit_code: int | None = None
    error: ErrorInfo | None = None
    """Why it was ended by others: its time was over, or its sandbox went."""
    started_at: float = 0.0
    ended_at: float | None = None
    output: int = 0
    """Entries of output so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic(Wire):
    """What went through a sandbox's proxy since it was made."""

    sent_bytes: int = 0
    received_bytes: int = 0
    allowed: int = 0
    """Requests, and connections of which only the host is seen."""
    refused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics(Wire):
    """What a sandbox uses now."""

    at: float
    """Unix time in seconds."""
    memory_bytes: int
    """Proportional set size: each shared page by its share."""
    cpu_s: float
    """Processor time of what runs in it and of what has ended below that."""
    processes: int
    memory_limit_bytes: float | None = None
    cpus: float | None = None
    pids_limit: float | None = None
    cache_bytes: int = 0
    """Of that memory: pages of files, of which the system has another copy on disk."""
    disk_used_bytes: int | None = None
    """What it has written, where that was asked for."""
    network: Traffic = Traffic()


class Showing:
    """Collects what code shows, entry by entry."""

    def __init__(self) -> None:
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self.results: list[Result] = []
        self.error: ExecutionError | None = None
        self._displays: dict[str, int] = {}

    def take(self, entry: Mapping[str, Any]) -> tuple[Literal["stdout", "stderr", "result"], str | Result] | None:
        """Add an entry; what it is to those who follow, if it is something."""
        kind, content = entry.get("msg_type"), entry.get("content", {})
        if kind == "stream":
            text = str(content.get("text", ""))
            if content.get("name") == "stderr":
                self.stderr.append(text)
                return "stderr", text
            self.stdout.append(text)
            return "stdout", text
        if kind == "error":
            lines = "\n".join(str(line) for line in content.get("traceback", ()))
            self.error = ExecutionError(
                name=str(content.get("ename", "")),
                value=str(content.get("evalue", "")),
                traceback=_COLOURS.sub("", lines),
            )
        elif kind in ("execute_result", "display_data", "update_display_data"):
            result = Result(
                data=content.get("data", {}), metadata=content.get("metadata", {}), main=kind == "execute_result"
            )
            display = content.get("transient", {}).get("display_id")
            if kind == "update_display_data" and display in self._displays:
                self.results[self._displays[display]] = result
            else:
                if display is not None:
                    self._displays[display] = len(self.results)
                self.results.append(result)
            return "result", result
        return None

    def execution(self, ended: Mapping[str, Any]) -> Execution:
        """All of it, with how it ended."""
        error, status = self.error, ended.get("status")
        if status == "timeout":
            error = ExecutionError(name="TimeoutError", value=str((ended.get("error") or {}).get("message", "")))
        elif status == "interrupted":
            error = ExecutionError(name="Interrupted", value="It was interrupted")
        return Execution(
            stdout="".join(self.stdout),
            stderr="".join(self.stderr),
            results=tuple(self.results),
            error=error,
            execution_count=ended.get("execution_count"),
        )
