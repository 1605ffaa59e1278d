"""Images of an engine that are built, found and removed, in blocking calls."""

import contextlib
import io
import socket
import tarfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.errors import ConflictError

IDLE_TIMEOUT_S = 24 * 3600.0
"""A step may say nothing for as long; who does not want to wait stops the build."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineImage:
    """An image as the engine sees it."""

    id: str
    labels: Mapping[str, str]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A file that a build may copy."""

    content: bytes = b""
    executable: bool = False
    link: str = ""
    """What a symbolic link says."""


class BuildFailedError(Exception):
    """A step ended with another code than 0, or the engine could not take it; for who builds, to tell in its words."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


def find(engine: Engine, name: str) -> EngineImage | None:
    """An image by name or id; None where there is none."""
    with engine.client() as client:
        errors = engine.errors()
        try:
            found = client.inspect_image(name)
        except errors.ImageNotFound:
            return None
    return EngineImage(
        id=str(found["Id"]),
        labels=(found.get("Config") or {}).get("Labels") or {},
        size_bytes=int(found.get("Size") or 0),
    )


def remove(engine: Engine, name: str) -> None:
    """Remove an image and what it alone has. That there is none is no failure.

    Raises:
        ConflictError: A container uses it.
    """
    with engine.client() as client:
        errors = engine.errors()
        try:
            client.remove_image(name)
        except errors.ImageNotFound:
            return
        except errors.APIError as error:
            if error.status_code != 409:
                raise
            raise ConflictError(
                f"The engine does not remove the image: {error.explanation}",
                hint="Remove the containers that use it: `docker ps -a`.",
            ) from None


def context(files: Mapping[str, Member]) -> bytes:
    """Files, by path, as the engine takes them. Always the same bytes."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, file in sorted(files.items()):
            member = tarfile.TarInfo(path)
            member.mode = 0o755 if file.executable else 0o644
            if file.link:
                member.type, member.linkname = tarfile.SYMTYPE, file.link
            member.size = len(file.content)
            archive.addfile(member, io.BytesIO(file.content))
    return target.getvalue()


class Build:
    """One build. Any thread may stop it."""

    def __init__(self, engine: Engine) -> None:
        """Nothing is asked yet."""
        self._engine = engine
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._answers: list[Any] = []
        self._stopped = False

    def run(
        self,
        files: bytes,
        *,
        name: str,
        labels: Mapping[str, str],
        arguments: Mapping[str, str],
        network: str,
        say: Say,
        anew: bool = False,
        newer: bool = False,
    ) -> str:
        """Build it; its id. It has its name and its labels only once all of it is there.

        Args:
            files: A tar archive with a Dockerfile.
            name: What the engine calls it; empty: nothing but its id.
            labels: What the image says of itself.
            arguments: Build arguments.
            network: Of its steps: "host", "none".
            say: Gets each line of output, in this thread.
            anew: Take no step from an earlier build.
            newer: Look for a newer base, which has to have a name that a registry knows.

        Raises:
            BuildFailedError: A step failed, or the build was stopped.
        """
        built = ""
        with self._engine.client(timeout_s=IDLE_TIMEOUT_S) as client, contextlib.ExitStack() as at_end:
            at_end.callback(self._let_go)
            client.hooks["response"].append(lambda response, **_: self._began(client, response))
            lines = client.build(
                fileobj=io.BytesIO(files),
                custom_context=True,
                tag=name or None,
                labels=dict(labels),
                buildargs=dict(arguments),
                network_mode=network,
                rm=True,
                forcerm=True,
                nocache=anew,
                pull=newer,
                decode=True,
            )
            try:
                for said in lines:
                    built = _read(said, say) or built
            except (OSError, ValueError, self._engine.errors().DockerException):
                if not self._stopped:
                    raise
        if self._stopped or not built:
            raise BuildFailedError("the build was broken off", None)
        return built

    def stop(self) -> None:
        """Have the engine give it up: it does when nobody listens any more."""
        with self._lock:
            self._stopped = True
            self._shut()

    def _let_go(self) -> None:
        """docker-py leaves the connection of an answer open that was not read to its end."""
        with self._lock:
            opened = [*self._answers, *filter(None, [self._socket])]
            self._socket = None
        for one in opened:
            one.close()

    def _began(self, client: Any, response: Any) -> None:
        """The engine answers (a hook of docker-py's own HTTP library)."""
        with self._lock:
            self._answers.append(response)
            raw = client._get_raw_response_socket(response)
            self._socket = getattr(raw, "_sock", raw)
            if self._stopped:
                self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _read(said: Mapping[str, Any], say: Say) -> str:
    """Say what the engine says; the image's id where this tells it."""
    if "error" in said:
        detail = said.get("errorDetail") or {}
        code = detail.get("code")
        raise BuildFailedError(str(detail.get("message") or said["error"]), int(code) if code else None)
    if "stream" in said:
        for line in str(said["stream"]).splitlines():
            if line.strip():
                say(line)
    elif "status" in said and not said.get("progressDetail"):
        say(" ".join(str(said[name]) for name in ("id", "status") if said.get(name)))
    return str((said.get("aux") or {}).get("ID") or "")
