"""What can be done on this machine: what drivers declare, and what was found when they were tried."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from warmcell.sandbox.models import Network
from warmcell.sandbox.wire import Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities(Wire):
    """What a backend can do on this machine, declared so that the unsupported fails before any side effect."""

    isolated: bool
    gpus: bool
    networks: tuple[Network, ...]
    snapshot_engines: tuple[str, ...] = ("template",)
    layers: bool = False
    """Whether the private files of a sandbox can be saved, and sandboxes begin with them."""
    own_kernel: bool = False
    """Whether a sandbox's kernel is its own. The host then sees none of its processes, only what that kernel runs in,
    and a lack of memory ends all of it."""
    rootless: bool = True
    """Whether ordinary users can have it."""

    @property
    def isolation(self) -> str:
        """What is between a sandbox and the host, in two words at most."""
        return "own kernel" if self.own_kernel else "namespaces" if self.isolated else "none"

    @property
    def memory_engines(self) -> tuple[str, ...]:
        """The engines that save its memory, and so let it be suspended, restored and forked. A template does not."""
        return tuple(name for name in self.snapshot_engines if name != "template")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendReport(Wire):
    """A row of `warmcell doctor`."""

    name: str
    ready: bool
    capabilities: Capabilities
    why_not: str = ""
    hint: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    tried: bool = True
    """Whether a sandbox was made. Where there is nothing to make one of, it is ready as far as can be known."""
    rootless: bool | None = None
    """Whether ordinary users can have it here, as was tried; None: as far as is known, as it is declared."""
    no_gpus: str = ""
    """Why its sandboxes get no GPUs on this machine, though it can hand them out elsewhere, with the cure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport(Wire):
    """A row of `warmcell doctor`: whether a snapshot engine works on this machine."""

    name: str
    ready: bool
    why_not: str = ""
    hint: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    backends: tuple[str, ...] = ()
    """Which it serves, of all that declare it; empty: all of them."""
    by: str = ""
    """What does its work, where that is not as usual."""
