"""What the operator allows; every request is held against it before anything is made."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import MIB, Limits, Network, SandboxSpec, WorkspaceMode

Amount = TypeVar("Amount", int, float)

LEAST_MEMORY_BYTES = 64 * MIB
"""Less than this and not even the kernel starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The operator's caps for each sandbox of this keeper."""

    networks: tuple[Network, ...] = ("none", "host")
    backends: tuple[str, ...] = ("bubblewrap",)
    """Those that may be asked for; `process` only where it is named here."""
    workspace_modes: tuple[WorkspaceMode, ...] = ("rw", "ro", "none")
    mounts: tuple[str, ...] = ()
    """Host folders below which extra mounts may lie. Empty: no extra mounts."""
    max_memory_bytes: int | None = None
    max_cpus: float | None = None
    max_sandboxes: int = 64

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
        _one_of("backend", spec.backend, ("auto", *self.backends), "c.Warmcell.backends")
        _one_of("network", spec.network, self.networks, "c.Warmcell.networks")
        _check_python(spec.python)
        if spec.workspace is not None:
            _one_of("workspace mode", spec.workspace.mode, self.workspace_modes, "c.Warmcell.workspace_modes")
            _check_workspace(spec.workspace.path)
        for mount in spec.mounts:
            self._check_mount(mount.source)
        return dataclasses.replace(spec, limits=self._limits(spec.limits))

    def _limits(self, limits: Limits) -> Limits:
        memory = _capped("memory", limits.memory_bytes, self.max_memory_bytes, "bytes")
        if memory is not None and memory < LEAST_MEMORY_BYTES:
            raise InvalidRequestError(
                f"{memory} bytes of memory are too few for a kernel",
                hint=f"Ask for at least {LEAST_MEMORY_BYTES // MIB} MiB.",
            )
        return dataclasses.replace(
            limits, memory_bytes=memory, cpus=_capped("cpus", limits.cpus, self.max_cpus, "cores")
        )

    def _check_mount(self, source: str) -> None:
        real = Path(os.path.realpath(source))
        if not real.exists():
            raise InvalidRequestError(f"The mount {source} does not exist", hint="Create it, or leave the mount out.")
        if not any(real.is_relative_to(os.path.realpath(allowed)) for allowed in self.mounts):
            raise InvalidRequestError(
                f"Mounting {source} is not allowed here",
                hint=f"The operator allows {', '.join(self.mounts) or 'none'} (c.Warmcell.mounts).",
            )


def _one_of(what: str, value: str, allowed: Sequence[str], trait: str) -> None:
    if value not in allowed:
        raise InvalidRequestError(
            f"{what} {value!r} is not allowed here", hint=f"Use one of {', '.join(allowed)}, or change {trait}."
        )


def _capped(what: str, asked: Amount | None, most: Amount | None, unit: str) -> Amount | None:
    if asked is not None and asked <= 0:
        raise InvalidRequestError(f"{what} must be more than nothing, not {asked}", hint=f"Give a number of {unit}.")
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


def _check_workspace(path: str) -> None:
    if not os.path.isabs(path) or not os.path.isdir(path):
        raise InvalidRequestError(
            f"The workspace {path} does not exist",
            hint="Create the folder, or start the kernel from a notebook in an existing one.",
        )
