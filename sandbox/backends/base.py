"""What isolates: the port that every backend implements.

A backend brings up a sandbox whose first process is our guest init (`sandbox/guest/init.py`). All
talk with the guest goes through sockets in the run directory, never through the backend, so a backend
has few verbs and a sandbox needs no network.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from warmcell.sandbox.models import GpuDevice, LimitStatus, SandboxId, SandboxSpec
from warmcell.sandbox.reports import BackendReport, Capabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitInfo:
    """How a sandbox ended."""

    exit_code: int
    """As a shell says it: 128 + n for death by signal n."""
    oom_killed: bool = False
    message: str = ""
    """Last words on the backend's stderr, at most 4 KiB."""


class SandboxInstance(Protocol):
    """A sandbox that is up. It ends when `stop` is called, its init ends, or the keeper dies."""

    @property
    def pid(self) -> int:
        """Host pid of the first process of its pid namespace."""

    @property
    def run_directory(self) -> Path:
        """Run directory as the host sees it; the guest listens on `init.sock` in it."""

    @property
    def guest_run_directory(self) -> str:
        """The same directory as the guest sees it."""

    @property
    def limits(self) -> Mapping[str, LimitStatus]:
        """By name: memory, pids, cpu, layer. What is not enforced says why."""

    @property
    def workspace_note(self) -> str:
        """Why the workspace is not as asked for, else empty."""

    @property
    def waits(self) -> bool:
        """Whether its init comes only when a line is written to the FIFO `begin` in its run directory."""

    @property
    def stands_by(self) -> bool:
        """Whether nothing runs in it, until it goes on from an image of a whole sandbox."""

    @property
    def shows_others(self) -> bool:
        """Whether its processes see other GPUs than those that it was made with, at once or after `show_gpus`."""

    async def show_gpus(self, gpus: Sequence[GpuDevice]) -> None:
        """Have its processes see these devices, and none that they saw before. Only where it shows others.

        Raises:
            UnsupportedOperationError: The system refuses it; all is as before.
        """

    def processes(self) -> Sequence[int]:
        """Host pids of all processes of the sandbox, the backend's own included."""

    def oom_kills(self) -> int:
        """How many processes of it the kernel has killed for memory; 0 where that cannot be known."""

    async def save_layer(self, target: Path) -> None:
        """Copy the sandbox's private files out: packages, /tmp, the private home, shared memory.

        They are as of one moment if nothing in the sandbox runs meanwhile; whatever runs can spoil its own files
        only. Sockets in the run directory and a persistent home are not among them. It does not fsync.

        Args:
            target: An existing, empty, 0700 directory on disk, which `SandboxBackend.create` takes as `layer`.

        Raises:
            UnsupportedOperationError: This backend has no layers, or there is a file that cannot be copied.
            CapacityError: The disk is full, or the files exceed the sandbox's limits; `target` is removed.
            SnapshotError: Anything else; `target` is removed.
        """

    async def can_be_replaced_by(self, other: "SandboxInstance", *, fork_server: bool = False) -> bool:
        """Whether a kernel that is to start in it would miss nothing in `other`, which is of an equal spec.

        That is where no process is left but those that it began with, its private files, those that `save_layer` saves,
        are exactly the other's, and both show the same folders of the host. Where they are too many to be compared in a
        moment the answer is no. It holds until something is asked of the guest.

        Args:
            other: What would take its place.
            fork_server: Its init keeps one, which is not missed, nor is the kernel that comes up there.
        """

    async def wait(self) -> ExitInfo:
        """Wait until it has ended, however that came. Any number may wait."""

    async def stop(self, *, timeout: float = 5.0) -> ExitInfo:
        """Kill every process of it and remove every mount, cgroup and file of it but `directory`.

        Idempotent, also while another call runs.

        Raises:
            OperationTimeoutError: Processes are left after `timeout` seconds.
        """


class SandboxBackend(Protocol):
    """One way to isolate. Instances hold configuration only; all state is in what `create` returns."""

    name: str

    @property
    def capabilities(self) -> Capabilities:
        """What it can do where it is ready."""

    async def probe(self) -> BackendReport:
        """Try it for real, once, and say what is missing with its cure. Never raises."""

    def fingerprint(self, spec: SandboxSpec) -> str:
        """Names the interpreter and the packages that its sandboxes of this spec come with; where any of these has
        changed it is another one. Blocks, for some milliseconds.

        Raises:
            WarmcellError: It cannot be known.
        """

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
    ) -> SandboxInstance:
        """Bring up a sandbox with our init as its first process.

        Called by `SandboxService` in the keeper's main thread (die-with-parent follows the thread).
        Returns when the process tree is started; the service then waits for `init.sock`. A call that
        fails or is cancelled leaves no process, mount, cgroup or file but `directory` itself.

        Args:
            directory: An existing, empty, 0700 directory for this sandbox alone; `run/` in it becomes
                the run directory. The service removes it after `stop`.
            gpus: Devices that are leased for it.
            layer: What `save_layer` has saved from a sandbox of an equal spec: this one has the same files. It is
                never changed, may serve any number of sandboxes, and must stay there until the last of them ends.
            named: Whose name it has as a host; its own if None. What takes the place of another is called as that was.
            later: Its init may wait until somebody needs it, where that can be; see `SandboxInstance.waits`.
            progress: Told what is being done, in a few words.

        Raises:
            BackendUnavailableError: A tool or permission is missing.
            InvalidRequestError: The spec asks for what cannot be (a workspace that does not exist).
            UnsupportedOperationError: This backend has no layers; nothing was made.
            SnapshotIncompatibleError: The layer is of another spec, or does not fit its limits; nothing was made.
            SnapshotCorruptError: The layer is not what was saved; nothing was made.
            SandboxStartError: It was tried and failed.
        """
