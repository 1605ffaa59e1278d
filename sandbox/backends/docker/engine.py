"""What is asked of the engine, in blocking calls. docker-py stays in here, and so do its errors."""

import contextlib
import http.client
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from warmcell.sandbox.backends.docker.about import EngineInfo, read_info
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    OperationTimeoutError,
    SandboxStartError,
    WarmcellError,
)

CALL_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 5.0
KNOWN_FOR_S = 10.0
"""How long what an engine said of itself counts: it may be upgraded or given a runtime, and needs 10 ms to say it."""
GONE_TIMEOUT_S = 15.0
"""How long a removal that somebody else has begun may take."""
TAIL_BYTES = 4096
_START = "Start it (`systemctl start docker`), or name another one: c.Warmcell.docker_host."
_INSTALL = "Install it: pip install 'warmcell[docker]'."


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container as the engine sees it."""

    id: str
    name: str
    labels: Mapping[str, str]
    running: bool
    removing: bool
    """Whether somebody removes it just now."""
    pid: int
    exit_code: int
    oom_killed: bool
    error: str


class Engine:
    """One engine. Holds no connection between calls; any thread may call."""

    def __init__(self, host: str = "") -> None:
        """Configure it.

        Args:
            host: As in DOCKER_HOST, `unix://…`; empty: that variable, else the system's or the user's own.
        """
        self._host = host
        self._api = ""
        self._info: EngineInfo | None = None
        self._said_at = 0.0

    @property
    def address(self) -> str:
        """Where it is."""
        return self._host or os.environ.get("DOCKER_HOST", "") or _usual()

    def info(self, *, fresh: bool = False) -> EngineInfo:
        """What it says of itself.

        Args:
            fresh: Ask it now; else what it said may be some seconds old.

        Raises:
            BackendUnavailableError: It does not answer, is too old, or is not on this machine.
        """
        found = self._info
        old = time.monotonic() - self._said_at > KNOWN_FOR_S
        if found is None or fresh or old:  # Nobody waits for another's question, which may take a minute to fail.
            self._api = ""
            with self.client() as client:
                found = self._info = read_info(client.info(), str(client.api_version))
            self._said_at = time.monotonic()
        return found

    def image(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Mapping[str, Any]:
        """What it says of an image.

        Raises:
            InvalidRequestError: It has no such image.
        """
        with self.client(timeout_s=timeout_s) as client:
            try:
                found: Mapping[str, Any] = client.inspect_image(name)
            except _errors().ImageNotFound:
                raise InvalidRequestError(
                    f"The engine has no image {name!r}",
                    hint=f"Get it (`docker pull {name}`), or build it: `warmcell images --help`.",
                ) from None
        return found

    def image_id(self, name: str, *, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """The id of the image that is called so. Every start asks for it, so it is asked without docker-py, which needs
        six times as long for it.

        Raises:
            InvalidRequestError: It has no such image.
        """
        if self._api:
            try:
                path = f"/v{self._api}/images/{quote(name, safe='/:')}/json"
                return str(_asked(self.address, path, timeout_s)["Id"])
            except TimeoutError as error:
                raise _too_slow(timeout_s) from error
            except _NO_ANSWER:
                self._api = ""  # By now it may be a newer engine, which does not speak this one.
        return str(self.image(name, timeout_s=timeout_s)["Id"])  # Whatever is wrong is said by this.

    def create(self, name: str, config: Mapping[str, Any]) -> str:
        """Make a container; its id.

        Raises:
            ConflictError: Another one is called so.
            InvalidRequestError: Its image is not there.
            SandboxStartError: The engine refuses it.
        """
        with self.client() as client, _as_start_error():
            made: Mapping[str, Any] = client.create_container_from_config(dict(config), name)
        return str(made["Id"])

    def start(self, container: str) -> None:
        """Start it.

        Raises:
            NotFoundError: There is none.
            SandboxStartError: The engine, or the image, refuses.
        """
        with self.client() as client, _as_start_error():
            client.start(container)

    def look(self, container: str) -> Container | None:
        """How it is, None where there is none."""
        with self.client() as client:
            try:
                found = client.inspect_container(container)
            except _errors().NotFound:
                return None
        state = found["State"]
        return Container(
            id=found["Id"],
            name=str(found["Name"]).lstrip("/"),
            labels=found["Config"].get("Labels") or {},
            running=bool(state.get("Running")),
            removing=state.get("Status") == "removing",
            pid=int(state.get("Pid") or 0),
            exit_code=int(state.get("ExitCode") or 0),
            oom_killed=bool(state.get("OOMKilled")),
            error=str(state.get("Error") or ""),
        )

    def wait(self, container: str, *, timeout_s: float) -> int:
        """Wait until it has ended; its exit code.

        Raises:
            NotFoundError: There is none.
            OperationTimeoutError: It runs on.
        """
        with self.client(timeout_s=timeout_s) as client:
            try:
                return int(client.wait(container)["StatusCode"])
            except _errors().NotFound:
                raise NotFoundError(f"There is no container {container}", hint="Somebody has removed it.") from None

    def said(self, container: str, *, errors_only: bool = True) -> str:
        """The last words of what it printed, on stderr alone unless told otherwise; at most 4 KiB.

        All of it is asked for, which is little: asked for its last lines, Podman leaves out one that does not end.
        """
        with self.client() as client:
            try:
                told = client.logs(container, stdout=not errors_only, stderr=True)
            except (_errors().NotFound, _errors().APIError):
                return ""
        return bytes(told)[-TAIL_BYTES:].decode(errors="replace")

    def remove(self, container: str) -> None:
        """Kill it and remove it with its anonymous volumes. That there is none is no failure.

        Raises:
            OperationTimeoutError: It is still there.
        """
        with self.client() as client:
            try:
                client.remove_container(container, force=True, v=True)
            except _errors().NotFound:
                return
            except _errors().APIError as error:
                if error.status_code != 409:
                    raise
                with contextlib.suppress(_errors().NotFound):  # Somebody else is removing it.
                    client.wait(container, timeout=GONE_TIMEOUT_S, condition="removed")

    def labelled(self, label: str) -> Sequence[Container]:
        """All containers with a label, `NAME` or `NAME=VALUE`, running or not."""
        with self.client() as client:
            found = client.containers(all=True, filters={"label": [label]})
        return [
            Container(
                id=one["Id"],
                name=str((one.get("Names") or [one["Id"]])[0]).lstrip("/"),
                labels=one.get("Labels") or {},
                running=one.get("State") == "running",
                removing=one.get("State") == "removing",
                pid=0,
                exit_code=0,
                oom_killed=False,
                error="",
            )
            for one in found
        ]

    def errors(self) -> Any:
        """docker-py's own errors, for who has a `client`."""
        return _errors()

    @contextlib.contextmanager
    def client(self, *, timeout_s: float = CALL_TIMEOUT_S) -> "Iterator[Any]":
        """A connection for one call. Whatever goes wrong comes out as an error of ours."""
        address = self.address
        _check_address(address)
        try:
            import docker
        except ImportError:
            raise BackendUnavailableError("docker-py is not installed", hint=_INSTALL) from None
        import requests

        try:
            # docker-py would leave the connection open over which it asks for that, if it is refused.
            version = self._api or _spoken(address, timeout_s)
            client = docker.APIClient(base_url=address, version=version, timeout=int(timeout_s), num_pools=1)
            try:
                self._api = version
                yield client
            finally:
                client.close()
        except WarmcellError:
            raise
        except requests.exceptions.Timeout as error:
            raise _too_slow(timeout_s) from error
        except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as error:
            self._api = ""  # The next call begins with what whoever listens then speaks.
            raise _explained(error, address) from error


_NO_ANSWER = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError)


def _spoken(address: str, timeout_s: float) -> str:
    """The newest API that the engine speaks."""
    try:
        return str(_asked(address, "/version", timeout_s)["ApiVersion"])
    except TimeoutError as error:
        raise _too_slow(timeout_s) from error
    except _NO_ANSWER as error:
        raise BackendUnavailableError(f"The container engine does not answer: {error}", hint=_START) from error


def _asked(address: str, path: str, timeout_s: float) -> Mapping[str, Any]:
    """What the engine answers to one request.

    Raises:
        OSError, HTTPException, ValueError: It does not, or not in JSON.
    """
    connection = http.client.HTTPConnection("localhost", timeout=timeout_s)
    with contextlib.closing(connection), socket.socket(socket.AF_UNIX) as opened:
        opened.settimeout(timeout_s)
        opened.connect(address.removeprefix("unix://"))
        connection.sock = opened
        connection.request("GET", path)
        answer: Mapping[str, Any] = json.loads(connection.getresponse().read())
        return answer


def _usual() -> str:
    own = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}") / "docker.sock"
    return f"unix://{own}" if os.getuid() != 0 and own.is_socket() else "unix:///var/run/docker.sock"


def _check_address(address: str) -> None:
    """It must be on this machine: guests are reached through files and process numbers."""
    if not address.startswith("unix://"):
        raise BackendUnavailableError(
            f"The container engine at {address} is not on this machine",
            hint="Run Warmcell where the engine runs, and name its socket: c.Warmcell.docker_host = 'unix://…'.",
        )
    path = address.removeprefix("unix://")
    with socket.socket(socket.AF_UNIX) as tried:
        tried.settimeout(CONNECT_TIMEOUT_S)
        try:
            tried.connect(path)
        except PermissionError:
            raise _no_right(address) from None
        except OSError as error:
            said = error.strerror or str(error)
            raise BackendUnavailableError(f"No container engine listens at {path} ({said})", hint=_START) from None


def _too_slow(timeout_s: float) -> WarmcellError:
    return OperationTimeoutError(
        f"The container engine did not answer within {timeout_s:.0f} s",
        hint="It may be overloaded, or wait for a disk: its log says more.",
        details={"operation": "engine", "timeout": timeout_s},
    )


def _no_right(address: str) -> WarmcellError:
    return BackendUnavailableError(
        f"The container engine at {address} may not be used by this user",
        hint="Whoever may use it has root's rights: as root, `usermod -aG docker USER`, then log in again.",
    )


def _explained(error: Exception, address: str) -> WarmcellError:
    said = str(error)
    if "Permission denied" in said:
        return _no_right(address)
    explanation = getattr(error, "explanation", None)
    if explanation:
        return SandboxStartError(f"The container engine refuses: {_short(str(explanation))}", hint=_OF_ENGINE)
    return BackendUnavailableError(f"The container engine does not answer: {_short(said)}", hint=_START)


_OF_ENGINE = "Its log says more: `journalctl -u docker`."


@contextlib.contextmanager
def _as_start_error() -> Iterator[None]:
    errors = _errors()
    try:
        yield
    except errors.APIError as error:
        said = _short(str(error.explanation or error))
        if isinstance(error, errors.ImageNotFound):
            raise InvalidRequestError(
                f"The image was removed while a container of it was made: {said}",
                hint="Get it again (`docker pull IMAGE`), or build it: `warmcell images --help`.",
            ) from None
        if error.status_code == 409:
            raise ConflictError(
                f"The container engine refuses a container of that name: {said}",
                hint="Remove what is called so (`docker rm -f NAME`), then try again.",
            ) from None
        if error.status_code == 404 and "No such container" in said:
            raise NotFoundError(f"The container is gone: {said}", hint="Somebody has removed it; try again.") from None
        raise SandboxStartError(f"The container engine refuses: {said}", hint=_OF_ENGINE) from None


def _errors() -> Any:
    import docker.errors

    return docker.errors


def _short(said: str) -> str:
    return " ".join(said.split())[:1000]
