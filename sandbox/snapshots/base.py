"""What saves and restores the memory of a sandbox: the port that every snapshot engine implements.

An engine handles memory only. The writable layer, the manifest and all policy (names, quota, age) are the store's and
the service's; an engine's image has the id of the snapshot that it belongs to.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.reports import EngineReport

Then = Literal["stop", "go_on"]
"""What becomes of the kernel once its memory is saved."""


class Place(Protocol):
    """A sandbox that is up; every `SandboxInstance` is one."""

    @property
    def pid(self) -> int:
        """Host pid of the first process of its pid namespace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dumped:
    """A kernel whose memory is saved."""

    image_bytes: int
    """What the image takes on disk by itself; what it shares with other images does not count."""
    memory_bytes: int
    """What a restore of it makes: the sum over its processes of what was resident."""
    pids: tuple[int, ...]
    """Its processes as the guest sees them, the kernel first."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What a restore needs to be equal: engine, its version, Linux release, processor flags."""
    ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A kernel that goes on."""

    pid: int
    """As the guest sees it; the same as when it was dumped."""
    host_pid: int = 0
    """As the host sees it; 0 where that is not known."""
    ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """An image that an engine holds."""

    id: SnapshotId
    image_bytes: int
    created_at: float
    shared_bytes: int = 0
    """Its equal part of what it has in common with others, which is in the `image_bytes` of none."""
    compressed: bool = False
    """Whether its memory is expanded before it can be restored."""


class SnapshotEngine(Protocol):
    """One way to save a kernel's memory. All methods raise `WarmcellError` and nothing else."""

    name: str
    whole: bool
    """Whether its images are of whole sandboxes, files included. Nobody may be connected with one while it is saved,
    nothing is saved apart, and kernels come back only in sandboxes that `maker` has made, not in one that is there."""
    backends: tuple[str, ...]
    """Which it serves, of all that declare it; empty: all of them."""

    def maker(self, backend: SandboxBackend, image: SnapshotId | None) -> SandboxBackend:
        """What makes the sandbox that a kernel is restored in: the backend, unless images are of whole sandboxes. Those
        go on from `image`; without one they stand by, until `restore` names it.
        """

    async def probe(self) -> EngineReport:
        """Try it for real, once for each boot and version, with a small dump and restore. Never raises."""

    async def enroll(self, place: Place, *, template: bool = False) -> None:
        """Make a fresh sandbox one whose kernels can be dumped. Called before the first kernel starts in it.

        With `template` they will be restored also in sandboxes that have had other kernels.

        Not for a sandbox that a kernel is restored into: `restore` does what it needs.
        """

    async def dump(
        self,
        place: Place,
        *,
        pid: int,
        image: SnapshotId,
        then: Then,
        while_frozen: Callable[[], Awaitable[None]],
        when_stopped: Callable[[], Awaitable[None]] | None = None,
        passing: bool = False,
    ) -> Dumped:
        """Save the kernel `pid` (as the guest sees it) and all processes below it.

        Nothing outside the sandbox may be connected to it. While nothing of it runs `while_frozen` is awaited, which
        saves the writable layer. If that or anything else fails, the kernel runs on and there is no image.

        `when_stopped` is awaited before, while its memory is still being written: the files are then as they will be.
        Where that was not so, since files that were open and removed got names, it is awaited once more.

        An image that is `passing` is dropped soon: it need not outlive the machine's present run.

        Raises:
            UnsupportedOperationError: It holds what cannot be saved; the message names it.
            StorageFullError: The disk is full.
            SnapshotError: Anything else; the kernel runs on.
        """

    async def restore(
        self, place: Place, *, image: SnapshotId, told: Callable[[int, int], None] | None = None
    ) -> Restored:
        """Bring a kernel back in a sandbox that is fresh: nothing was started in it but its init.

        Memory that is compressed is expanded first, and stays so; `told` is told how many bytes of how many are done.

        If it fails the sandbox is of no use any more, and the image is as before.

        Raises:
            SnapshotNotFoundError: There is no such image.
            SnapshotIncompatibleError: This machine, or a file that it had open, is not as it was.
            SnapshotCorruptError: The image is not what was written.
        """

    async def populate(self, image: SnapshotId) -> int:
        """Begin to read from disk what restored kernels map of an image, and do not wait for it; how many bytes.

        Raises:
            SnapshotNotFoundError: There is no such image.
            SnapshotCorruptError: The image is not what was written.
        """

    async def settle(self, image: SnapshotId) -> None:
        """Wait until all of an image is on the disk, so that it outlives a loss of power.

        Raises:
            SnapshotNotFoundError: There is no such image.
            SnapshotCorruptError: The machine stopped before that, and the image is of no use.
        """

    async def images(self) -> list[ImageInfo]:
        """What it holds for this user."""

    async def drop(self, image: SnapshotId) -> None:
        """Remove an image; restored kernels that share its memory live on. Idempotent."""

    async def close(self) -> None:
        """End what it started for itself."""
