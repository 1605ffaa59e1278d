"""What a kernel is started with: the kernelspec's configuration, then what its notebook chose."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import DEFAULT_PRELOAD, Limits, Mount, SandboxSpec
from warmcell.sandbox.plain_files import read_plain
from warmcell.sandbox.wire import Wire

CHOICES: Final = frozenset({"gpu", "memory", "network", "preload", "remote", "template"})
"""What a notebook may choose; the rest of a spec is the kernelspec's."""

LOCALE: Final = ("LANG", "LC_ALL", "LC_CTYPE", "TZ")
"""Variables that every kernel gets from the launching environment: language and time zone."""

REMOTE: Final = "WARMCELL_REMOTE"
"""Variable that tells a kernel its notebook's defaults of `%%remote`."""

NOTEBOOK_MAX_BYTES: Final = 256 * 1024**2

_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", re.IGNORECASE)
_FACTOR: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes(Wire):
    """The configuration of a Warmcell kernelspec (`metadata.kernel_provisioner.config`)."""

    backend: str = "auto"
    python: str = ""
    """Interpreter of the kernel's environment; empty: the image's, without one the one that runs this."""
    image: str | None = None
    """What `warmcell images ls` lists, or what an engine of containers calls an image."""
    preload: tuple[str, ...] | None = None
    template: str = "default"
    warmup: str = ""
    network: str | tuple[str, ...] | Mapping[str, Any] = "none"
    """A list: hosts that are reached through the keeper's proxy. An object: a whole policy, but for headers."""
    workspace: str = "rw"
    home: str = "private"
    memory: str | int | None = None
    cpus: float | None = None
    pids: int | None = Limits().pids
    gpu: str | tuple[str, ...] | None = None
    mounts: tuple[str | Mapping[str, Any], ...] = ()
    env: tuple[str, ...] | Mapping[str, str] = ()
    remote: Mapping[str, Any] = field(default_factory=dict)
    """What `%%remote` has where its line does not say it, as in {"gpu": "A100", "n": 4}."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the configuration."""
        return tuple(each.name for each in fields(cls))

    def chosen(self, choice: Mapping[str, Any], *, source: str) -> "Wishes":
        """These, with a notebook's choice; names that nobody may choose are ignored.

        Raises:
            InvalidRequestError: A value cannot be what it is chosen for; `source` says where it stands.
        """
        known = {name: value for name, value in choice.items() if name in CHOICES}
        limits = choice.get("limits")
        if isinstance(limits, Mapping) and "memory_bytes" in limits:
            known["memory"] = limits["memory_bytes"]
        try:
            return Wishes.from_json({**self.to_json(), **known})
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"{source}: {error.message.removeprefix('Wishes.')}",
                hint="Choose again in the notebook's Warmcell menu, or remove it from the notebook's metadata.",
            ) from error

    def spec(self, *, folder: str, environ: Mapping[str, str]) -> SandboxSpec:
        """The sandbox that is wished for.

        Args:
            folder: The notebook's folder.
            environ: Where allow-listed variables get their values.

        Raises:
            InvalidRequestError: A wish is not of its form.
        """
        if isinstance(self.network, Mapping) and (self.network.get("headers") or self.network.get("through")):
            raise InvalidRequestError(
                "network.headers and through are not for kernelspecs, which are no place for secrets",
                hint="Give them from code: Sandbox(network={…}).",
            )
        workspace = None if self.workspace == "none" else {"path": folder, "mode": self.workspace}
        return SandboxSpec.from_json(
            {
                "python": self.python or ("" if self.image else sys.executable),
                "image": self.image or None,
                "backend": self.backend,
                "workspace": workspace,
                "network": self.network,
                "mounts": [_mount(each).to_json() for each in self.mounts],
                "env": self._env(environ),
                "home": self.home,
                "limits": {"memory_bytes": parse_size(self.memory), "cpus": self.cpus, "pids": self.pids},
                "gpu": list(self.gpu) if isinstance(self.gpu, tuple) else self.gpu or None,
                "template": self.template,
                "preload": list(DEFAULT_PRELOAD if self.preload is None else self.preload),
                "warmup": self.warmup,
            }
        )

    def _env(self, environ: Mapping[str, str]) -> dict[str, str]:
        names: Sequence[str] = LOCALE if isinstance(self.env, Mapping) else (*LOCALE, *self.env)
        found = {name: environ[name] for name in names if name in environ}
        if self.remote:
            found[REMOTE] = json.dumps(self.remote)
        return {**found, **self.env} if isinstance(self.env, Mapping) else found


def parse_size(size: str | int | None) -> int | None:
    """Bytes of "8GiB", "512M", 1000 or None. Units are powers of 1024.

    Raises:
        InvalidRequestError: It is none of these.
    """
    if size is None or size == "":
        return None
    if isinstance(size, int):
        return size
    found = _SIZE.fullmatch(size)
    if found is None:
        raise InvalidRequestError(f"{size!r} is no amount of memory", hint='Write it as "8GiB" or "512MiB".')
    return int(float(found[1]) * _FACTOR[found[2].upper()])


def notebook_of(environ: Mapping[str, str]) -> str | None:
    """The notebook that a kernel is started for, as Jupyter's server tells it; None if there is none."""
    path = environ.get("JPY_SESSION_NAME", "")
    return path if path.endswith(".ipynb") and Path(path).is_absolute() else None


def read_choice(notebook: str) -> Mapping[str, Any]:
    """`metadata.warmcell` of a notebook file, less what a file may not ask for; empty where it cannot be read. Blocks.

    A notebook that came from elsewhere must not open a network for itself: the page offers that, and somebody clicks.
    """
    try:
        # Its sandbox may put anything there.
        choice = json.loads(read_plain(Path(notebook), most_bytes=NOTEBOOK_MAX_BYTES))["metadata"]["warmcell"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    if not isinstance(choice, dict):
        return {}
    return {name: value for name, value in choice.items() if name != "network" or value == "none"}


def _mount(wish: str | Mapping[str, Any]) -> Mount:
    """One mount: /data, /data:ro, /data:/mnt/data:rw, or the object that these stand for."""
    if isinstance(wish, Mapping):
        return Mount.from_json(wish)
    source, *rest = wish.split(":")
    mode = rest.pop() if rest and rest[-1] in ("ro", "rw") else "ro"
    if len(rest) > 1:
        raise InvalidRequestError(f"{wish!r} is no mount", hint='Write it as "/data", "/data:ro" or "/data:/mnt:rw".')
    return Mount.from_json({"source": source, "target": rest[0] if rest else "", "mode": mode})
