"""What an image brings, found out by running its Python once, in a container that has less than any sandbox."""

import json
import os
import resource
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    InvalidRequestError,
    OperationTimeoutError,
    SandboxStartError,
)

OLDEST_PYTHON = (3, 9)
CHECK_TIMEOUT_S = 60.0
LOOK_BYTES = 256 * 2**20
"""Memory of the container in which an image is looked at. Its interpreter is whatever somebody has made."""
OPEN_FILES = 65_536
"""Of each process: engines give a million and more, up to which some programs count when they start another one."""
NAME_TIMEOUT_S = 3.0
"""Kernels that need nothing of the engine wait for that."""
CHECK = """
import json, os, site, sys
try:
    import ctypes
    lacks = ""
except ImportError as error:
    lacks = str(error)
def filled(path):
    try:
        return bool(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # It is not for this user to see.
        return True
print(json.dumps({"python": sys.executable, "version": list(sys.version_info[:2]), "lacks": lacks,
    "user_site": sys.base_prefix in site.PREFIXES,
    "volumes": {path: os.path.realpath(path) for path in sys.argv[1:]},
    "filled": [path for path in sys.argv[1:] if filled(path)],
    "links": [path for path in ("/tmp", "/home", "/run", "/dev", "/var") if os.path.islink(path)]}))
"""
_NO_FILE = ("no such file or directory", "executable file not found", "not a directory", "is a directory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An image, looked at."""

    id: str
    python: str
    """Absolute path of the interpreter in it."""
    version: tuple[int, int]
    user_site: bool
    """Whether that interpreter looks into its user's own packages."""
    env: Mapping[str, str]
    volumes: Mapping[str, str]
    """Paths that it declares to be volumes, and where they are when its links have been followed."""
    filled: frozenset[str] = frozenset()
    """Those of them at which it has something."""


def ulimits(*, podman: bool) -> Sequence[Mapping[str, Any]]:
    """Limits of each process in a container, as the engine's API takes them."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = OPEN_FILES if files < 0 else min(OPEN_FILES, files)  # Not every root may give more than it has.
    made = [("core", 0, 0), ("nofile", files, files)]
    if podman:  # It would ask for a million, which not every root may give: those that this process has, then.
        most = int(Path("/proc/sys/kernel/pid_max").read_text())
        soft, hard = (most if one < 0 else min(one, most) for one in resource.getrlimit(resource.RLIMIT_NPROC))
        made.append(("nproc", soft, hard))
    return [{"Name": name, "Soft": soft, "Hard": hard} for name, soft, hard in made]


class Images:
    """What is known of an engine's images. Any thread may ask."""

    def __init__(self, engine: Engine, labels: Mapping[str, str]) -> None:
        """Know nothing yet.

        Args:
            engine: Which has them.
            labels: Of the containers in which they are looked at.
        """
        self._engine = engine
        self._labels = labels
        self._known: dict[tuple[str, str], Image] = {}
        self._called: dict[str, str] = {}
        self._looking: dict[tuple[str, str], threading.Lock] = {}
        self._lock = threading.Lock()

    def look_at(self, name: str, python: str, progress: Callable[[str], None] = lambda detail: None) -> Image:
        """What an image brings. Blocks, for a second where it is new.

        Args:
            name: As the engine calls it.
            python: Path of an interpreter in it; empty: the first `python3` on its search path.
            progress: Told where it takes a while.

        Raises:
            InvalidRequestError: The engine has no such image, or it has no Python of use; the error says which.
        """
        if python and not python.startswith("/"):
            raise InvalidRequestError(
                f"The interpreter {python!r} is not an absolute path",
                hint="Give the path that it has in the image, or leave it out.",
            )
        said = self._engine.image(name)
        key = (str(said["Id"]), python)
        with self._lock:
            alone = self._looking.setdefault(key, threading.Lock())
        with alone:  # Others need not wait for this image.
            known = self._known.get(key)
            if known is None:
                progress("looking at the image")
                known = self._known[key] = self._examine(name, python, said)
        return known

    def id_of(self, name: str) -> str:
        """Which image is called so; while the engine is away the one that was. Blocks.

        Raises:
            InvalidRequestError: The engine has no such image.
            BackendUnavailableError: It does not answer, and never has told.
        """
        try:
            self._called[name] = self._engine.image_id(name, timeout_s=NAME_TIMEOUT_S)
        except (BackendUnavailableError, OperationTimeoutError):
            if name not in self._called:
                raise
        return self._called[name]

    def _examine(self, name: str, python: str, said: Mapping[str, Any]) -> Image:
        config = said.get("Config") or {}
        declared = sorted(config.get("Volumes") or ())
        python = python or "python3"
        told = self._run(name, str(said["Id"]), python, declared)
        try:
            found = _read(told, declared)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InvalidRequestError(
                f"{python} in the image {name} is no Python of use: it does not say of itself what a Python says",
                hint="Try it: `docker run --rm IMAGE python3 --version`.",
            ) from None
        major, minor = found["version"]
        if (major, minor) < OLDEST_PYTHON:
            raise InvalidRequestError(
                f"The image {name} has Python {major}.{minor}, and sandboxes need 3.9 or newer",
                hint="Choose a newer image, or name another interpreter in it.",
            )
        if found["lacks"]:
            raise InvalidRequestError(
                f"The Python of the image {name} cannot load ctypes ({found['lacks']}), which sandboxes need",
                hint="Install libffi in the image, or choose a Python that was built with it.",
            )
        if found["links"]:
            raise InvalidRequestError(
                f"In the image {name} {', '.join(found['links'])} is a symbolic link",
                hint="Make it a directory in the image: sandboxes have their own there.",
            )
        return Image(
            id=str(said["Id"]),
            python=found["python"],
            version=(major, minor),
            user_site=found["user_site"],
            env=dict(str(one).partition("=")[::2] for one in config.get("Env") or ()),
            volumes={path: _plain(found["volumes"][path], name) for path in declared},
            filled=frozenset(found["filled"]),
        )

    def _run(self, name: str, image: str, python: str, volumes: Sequence[str]) -> Mapping[str, Any]:
        called = f"warmcell-look-{secrets.token_hex(6)}"
        try:
            made = self._engine.create(called, self._container(image, python, volumes))
            try:
                self._engine.start(made)
                code = self._engine.wait(made, timeout_s=CHECK_TIMEOUT_S)
            except SandboxStartError as error:
                if any(words in error.message for words in _NO_FILE):
                    raise _no_python(name, python) from None
                raise
            said = self._engine.said(made, errors_only=False)
        finally:
            self._engine.remove(called)
        try:
            if code == 0:
                found: Mapping[str, Any] = json.loads(said.splitlines()[-1])
                return found
        except (ValueError, IndexError):
            pass
        if code in (126, 127):
            raise _no_python(name, python)
        raise InvalidRequestError(
            f"{python} in the image {name} is no Python of use: it ended with {code}: {said[-500:].strip()}",
            hint="Try it: `docker run --rm IMAGE python3 --version`.",
        )

    def _container(self, image: str, python: str, volumes: Sequence[str]) -> Mapping[str, Any]:
        return {
            "Image": image,
            "Entrypoint": [python],
            "Cmd": ["-I", "-c", CHECK, *volumes],
            "User": "65534:65534",
            "Labels": dict(self._labels),
            "WorkingDir": "/",
            "Healthcheck": {"Test": ["NONE"]},
            "HostConfig": {
                "NetworkMode": "none",
                "ReadonlyRootfs": True,
                "CapDrop": ["ALL"],
                "SecurityOpt": ["no-new-privileges"],
                "PidsLimit": 16,
                "Memory": LOOK_BYTES,
                "MemorySwap": LOOK_BYTES,
                "Ulimits": ulimits(podman=self._engine.info().podman),
                "LogConfig": {"Type": "json-file", "Config": {"max-size": "64k", "max-file": "1"}},
            },
        }


def _read(found: Mapping[str, Any], volumes: Sequence[str]) -> Mapping[str, Any]:
    """What an image's interpreter has said of itself, in the types that it should have.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: It has others.
    """
    major, minor = map(int, found["version"])
    return {
        "python": str(found["python"]),
        "version": (major, minor),
        "lacks": str(found["lacks"]),
        "user_site": bool(found["user_site"]),
        "volumes": {path: str(found["volumes"][path]) for path in volumes},
        "filled": [str(path) for path in found["filled"]],
        "links": [str(path) for path in found["links"]],
    }


def _plain(path: str, image: str) -> str:
    """Where a volume is, as the image's own interpreter says it."""
    if path == "/" or not path.startswith("/") or os.path.normpath(path) != path:
        raise InvalidRequestError(
            f"The image {image} declares a volume at {path!r}, which no sandbox can have",
            hint="Declare it elsewhere in the image's Dockerfile.",
        )
    return path


def _no_python(name: str, python: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The image {name} has no interpreter {python}",
        hint="Install Python 3.9 or newer in it, or say where its interpreter is.",
    )
