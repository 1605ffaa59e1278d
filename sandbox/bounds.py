"""What the operator allows; every request is held against it before anything is made."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from warmcell.sandbox.backends.identity import checked_name
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import MIB, USUAL_UMASK, Limits, Mount, Network, SandboxSpec, WorkspaceMode

Amount = TypeVar("Amount", int, float)

LEAST_MEMORY_BYTES = 64 * MIB
"""Less than this and not even the kernel starts."""


MOST = 2**60
"""No limit of a machine is larger, and no file system or control group takes more."""

WRITABLE_BY_OTHERS = 0o022

TEXT_MAX = 4096
"""Characters of a name, a path or a module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The operator's caps for each sandbox of this keeper."""

    networks: tuple[Network, ...] = ("none", "host")
    backends: tuple[str, ...] = ("bubblewrap",)
    """Those that may be asked for; `process` only where it is named here."""
    workspace_modes: tuple[WorkspaceMode, ...] = ("rw", "ro", "cow", "none")
    mounts: tuple[str, ...] = ()
    """Host folders below which extra mounts may lie. Empty: no extra mounts."""
    max_memory_bytes: int | None = None
    max_cpus: float | None = None
    max_sandboxes: int = 64
    umask: int = USUAL_UMASK
    """Of who started the keeper."""

    @classmethod
    def from_names(
        cls, *, networks: Iterable[str], workspace_modes: Iterable[str], backends: Iterable[str], **caps: Any
    ) -> "Bounds":
        """From plain strings, as a configuration file has them.

        Raises:
            InvalidRequestError: One of the names is not known.
        """
        for what, names, known in (
            ("network", networks, get_args(Network)),
            ("workspace mode", workspace_modes, get_args(WorkspaceMode)),
        ):
            for name in names:
                _one_of(what, name, known, "the configuration")
        return cls(
            networks=cast(tuple[Network, ...], tuple(networks)),
            workspace_modes=cast(tuple[WorkspaceMode, ...], tuple(workspace_modes)),
            backends=tuple(backends),
            **caps,
        )

    def check(self, spec: SandboxSpec) -> SandboxSpec:
        """The spec as it will be made: capped where it asks for no cap, refused where it asks for more.

        Raises:
            InvalidRequestError: Something lies outside the bounds; the hint names what is allowed.
        """
        _check_texts(spec)
        if spec.user:
            checked_name(spec.user)
            if spec.home == "persistent":
                raise InvalidRequestError(
                    "A persistent home is its user's on the host, by that name", hint="Leave out user, or home."
                )
        _one_of("backend", spec.backend, ("auto", *self.backends), "c.Warmcell.backend")
        _one_of("network", spec.network, self.networks, "c.Warmcell.networks")
        if spec.image is None:
            _check_python(spec.python)
        else:
            _check_image(spec.image, spec.python)
        if spec.workspace is not None:
            _one_of("workspace mode", spec.workspace.mode, self.workspace_modes, "c.Warmcell.workspace_modes")
            if spec.workspace.mode != "none":
                _check_workspace(spec.workspace.path)
        for mount in spec.mounts:
            self._check_mount(mount)
        return dataclasses.replace(spec, limits=self._limits(spec.limits), umask=self._umask(spec.umask))

    def _umask(self, umask: int | None) -> int | None:
        if umask is None:
            return None
        if not 0 <= umask <= 0o777:
            raise InvalidRequestError(f"umask cannot be {umask}", hint="Give a number from 0 to 511, which is 0o777.")
        return umask | (self.umask & WRITABLE_BY_OTHERS)

    def _limits(self, limits: Limits) -> Limits:
        memory = _capped("memory", limits.memory_bytes, self.max_memory_bytes, "bytes")
        if memory is not None and memory < LEAST_MEMORY_BYTES:
            raise InvalidRequestError(
                f"{memory} bytes of memory are too few for a kernel",
                hint=f"Ask for at least {LEAST_MEMORY_BYTES // MIB} MiB.",
            )
        for what, value in (
            ("pids", limits.pids),
            ("layer_bytes", limits.layer_bytes),
            ("shm_bytes", limits.shm_bytes),
        ):
            if value is not None and not 0 < value <= MOST:
                raise InvalidRequestError(f"{what} cannot be {value}", hint="Give a number above 0, or leave it out.")
        return dataclasses.replace(
            limits, memory_bytes=memory, cpus=_capped("cpus", limits.cpus, self.max_cpus, "cores")
        )

    def _check_mount(self, mount: Mount) -> None:
        source = mount.source
        if mount.target and not os.path.isabs(mount.target):
            raise InvalidRequestError(
                f"The mount target {mount.target} is not an absolute path",
                hint="Begin it with a slash, or leave it out.",
            )
        real = Path(os.path.realpath(source))
        if not real.exists():
            raise InvalidRequestError(f"The mount {source} does not exist", hint="Create it, or leave the mount out.")
        if not any(real.is_relative_to(os.path.realpath(allowed)) for allowed in self.mounts):
            raise InvalidRequestError(
                f"Mounting {source} is not allowed here",
                hint=f"The operator allows {', '.join(self.mounts) or 'none'} (c.Warmcell.mounts).",
            )


def _check_texts(spec: SandboxSpec) -> None:
    """What the operating system would refuse later, and less clearly."""
    named = [("python", spec.python), ("backend", spec.backend), ("template", spec.template)]
    named += [("the warm-up", spec.warmup), ("the image", spec.image or "")]
    named += [("a module of preload", module) for module in spec.preload]
    named += [("an environment variable", text) for pair in spec.env.items() for text in pair]
    named += [("a mount", text) for mount in spec.mounts for text in (mount.source, mount.target)]
    if spec.workspace is not None:
        named.append(("the workspace", spec.workspace.path))
    for what, text in named:
        if "\0" in text or not _is_encodable(text) or (what != "an environment variable" and len(text) > TEXT_MAX):
            raise InvalidRequestError(f"{what} cannot be {text[:50]!r}", hint="Give text without null bytes.")
    for name in spec.env:
        if not name or "=" in name:
            raise InvalidRequestError(f"{name!r} is no name of an environment variable", hint="Leave out the `=`.")
    for module in spec.preload:
        if not all(part.isidentifier() for part in module.split(".")):
            raise InvalidRequestError(f"{module!r} is no name of a module", hint="Write it as in `import`.")


def _is_encodable(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _one_of(what: str, value: str, allowed: Sequence[str], trait: str) -> None:
    if value not in allowed:
        raise InvalidRequestError(
            f"{what} {value!r} is not allowed here", hint=f"Use one of {', '.join(allowed)}, or change {trait}."
        )


def _capped(what: str, asked: Amount | None, most: Amount | None, unit: str) -> Amount | None:
    if asked is not None and not 0 < asked <= MOST:
        raise InvalidRequestError(
            f"{what} must be more than nothing, and less than 2**60, not {asked}", hint=f"Give a number of {unit}."
        )
    if most is None:
        return asked
    if asked is not None and asked > most:
        raise InvalidRequestError(
            f"{asked} {unit} of {what} is more than the operator's {most}", hint=f"Ask for at most {most} {unit}."
        )
    return most if asked is None else asked


def _check_python(python: str) -> None:
    if not (os.path.isabs(python) and os.access(python, os.X_OK) and not os.path.isdir(python)):
        raise InvalidRequestError(
            f"{python} is no Python interpreter",
            hint="Give the absolute path of one, as `warmcell kernelspec install --python PATH` does.",
        )


def _check_image(image: str, python: str) -> None:
    if not image or image.startswith("-") or any(letter.isspace() for letter in image):
        raise InvalidRequestError(
            f"{image!r} is no name of an image", hint="`warmcell images ls` lists those that were built here."
        )
    if python and not os.path.isabs(python):
        raise InvalidRequestError(
            f"{python} is no absolute path in the image",
            hint="Begin it with a slash, or leave it out: the image's own is taken.",
        )


def _check_workspace(path: str) -> None:
    if not os.path.isabs(path) or not os.path.isdir(path):
        raise InvalidRequestError(
            f"The workspace {path} does not exist",
            hint="Create the folder, or start the kernel from a notebook in an existing one.",
        )
