"""The backend under check, and the handles that checks use."""

import asyncio
import contextlib
import os
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.base import SandboxBackend, SandboxInstance
from warmcell.sandbox.backends.files import remove_tree
from warmcell.sandbox.backends.processes import descendants
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.models import ExecResult, Limits, SandboxId, SandboxSpec, Workspace

GUEST_TIMEOUT_S = 60.0
EXEC_TIMEOUT_S = 60.0
GONE_TIMEOUT_S = 60.0
SMALL = Limits(layer_bytes=64 * 2**20, shm_bytes=16 * 2**20, pids=256)


class ContractError(AssertionError):
    """A promise that does not hold."""


def expect(holds: object, otherwise: str) -> None:
    """State what must hold.

    Raises:
        ContractError: It does not.
    """
    if not holds:
        raise ContractError(otherwise)


@dataclass(frozen=True, slots=True)
class Box:
    """A sandbox that is up, its guest answering."""

    instance: SandboxInstance
    channel: GuestChannel
    directory: Path

    async def run(self, *argv: str, input: bytes = b"", timeout: float = EXEC_TIMEOUT_S) -> ExecResult:
        """Run a command in it."""
        return await self.channel.exec(argv, input=input, timeout=timeout)

    async def shell(self, script: str) -> ExecResult:
        """Run a shell script in it."""
        return await self.run("sh", "-c", script)

    async def says(self, script: str) -> str:
        """What a shell script prints, which must succeed."""
        result = await self.shell(script)
        expect(result.exit_code == 0, f"{script!r} ended with {result.exit_code}: {result.stderr}")
        return result.stdout.strip()


@dataclass(slots=True, kw_only=True)
class Subject:
    """One backend, and where its sandboxes go."""

    backend: SandboxBackend
    directory: Path
    """A private, existing directory with a short path; the subject makes what it needs below it."""
    python: str = sys.executable
    image: str | None = None
    """What its sandboxes are of, where that is no environment of the host's; `python` is a path in it then."""
    programs: bool = True
    """Whether its sandboxes run real programs; False for one in memory."""
    signals: bool = True
    """Whether who checks may signal a sandbox's first process; False where somebody else has made it."""
    _before: frozenset[str] = field(default=frozenset(), init=False)

    @property
    def isolated(self) -> bool:
        """As it declares itself."""
        return self.backend.capabilities.isolated

    @property
    def own_kernel(self) -> bool:
        """As it declares itself."""
        return self.backend.capabilities.own_kernel

    def spec(self, **changes: Any) -> SandboxSpec:
        """A small sandbox of this backend; `workspace` may be a path."""
        workspace = changes.pop("workspace", None)
        if isinstance(workspace, Path):
            workspace = Workspace(path=str(workspace))
        network = changes.pop("network", self.backend.capabilities.networks[0])
        return SandboxSpec(
            python=changes.pop("python", self.python),
            image=changes.pop("image", self.image),
            backend=self.backend.name,
            workspace=workspace,
            network=network,
            limits=changes.pop("limits", SMALL),
            **changes,
        )

    def folder(self, name: str) -> Path:
        """A directory on the host that a sandbox may be given."""
        path = self.directory / "w" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def place(self) -> tuple[SandboxId, Path]:
        """An id and an empty directory for a new sandbox."""
        sandbox_id = SandboxId(secrets.token_hex(6))
        path = self.directory / "s" / sandbox_id
        path.mkdir(mode=0o700, parents=True)
        return sandbox_id, path

    async def create(self, *, place: tuple[SandboxId, Path] | None = None, **changes: Any) -> SandboxInstance:
        """A sandbox that the check stops itself."""
        sandbox_id, directory = place or self.place()
        given = {name: changes.pop(name) for name in ("gpus", "layer", "later") if name in changes}
        return await self.backend.create(self.spec(**changes), sandbox_id=sandbox_id, directory=directory, **given)

    @contextlib.asynccontextmanager
    async def box(self, **changes: Any) -> AsyncIterator[Box]:
        """A sandbox with its guest answering; stopped afterwards, and nothing of it may be left."""
        sandbox_id, directory = self.place()
        try:
            instance = await self.create(place=(sandbox_id, directory), **changes)
        except BaseException:
            self.nothing_is_left(sandbox_id, directory)
            raise
        try:
            channel = await GuestChannel.open(instance.run_directory, timeout=GUEST_TIMEOUT_S)
            try:
                yield Box(instance, channel, directory)
            finally:
                await channel.close()
        finally:
            await instance.stop()
            self.nothing_is_left(sandbox_id, directory)

    def nothing_is_left(self, sandbox_id: SandboxId, directory: Path) -> None:
        """No file, process, mount or control group of a sandbox is there any more; its directory is removed then."""
        files = [path.name for path in directory.iterdir()]
        expect(not files, f"files are left in the sandbox's directory: {files}")
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(directory) in line]
        expect(not mounts, f"mounts are left: {mounts}")
        # Not by a glob, which fails where others' groups go while it looks.
        within = (name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names)
        groups = [name for name in within if name.startswith("warmcell") and sandbox_id in name]
        expect(not groups, f"control groups are left: {groups}")
        directory.rmdir()

    def remember(self) -> None:
        """Take note of this process's children and descriptors, for `back_to_before`."""
        self._before = self._traces()

    async def back_to_before(self) -> None:
        """There are no more children and descriptors than there were, once what is ending has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GONE_TIMEOUT_S):
                while self._traces() - self._before:
                    await asyncio.sleep(0.01)
        left = self._traces() - self._before
        expect(not left, f"left behind: {sorted(left)}")
        remove_tree(self.directory / "w")

    def _traces(self) -> frozenset[str]:
        children = {f"process {pid}" for pid in descendants(os.getpid())}
        return frozenset({*children, *(f"descriptor of {target}" for target in _descriptors())})


def _descriptors() -> Sequence[str]:
    """What descriptors of this process lead to; the event loop's own and those that vanish meanwhile are left out."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [target for target in found if not target.startswith(("/proc/", "/dev/", "anon_inode:"))]


@dataclass(frozen=True, slots=True)
class Check:
    """One promise. Its name is the sentence."""

    name: str
    body: Callable[[Subject], Awaitable[None]]
    programs: bool
    isolated: bool | None
    needs: Callable[[Subject], bool]

    def __str__(self) -> str:
        return self.name

    def applies(self, subject: Subject) -> bool:
        """Whether a backend of these capabilities makes this promise."""
        return (
            (subject.programs or not self.programs)
            and self.isolated in (None, subject.isolated)
            and self.needs(subject)
        )

    async def run(self, subject: Subject) -> None:
        """Check it, and that nothing is left behind.

        Raises:
            ContractError: It does not hold.
        """
        subject.remember()
        await self.body(subject)
        await subject.back_to_before()


class Register:
    """Collects checks; a decorator."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def __call__(
        self,
        *,
        programs: bool = False,
        isolated: bool | None = None,
        needs: Callable[[Subject], bool] = lambda subject: True,
    ) -> Callable[[Callable[[Subject], Awaitable[None]]], Callable[[Subject], Awaitable[None]]]:
        """Add a check.

        Args:
            programs: Real programs are run in the sandbox.
            isolated: Only for backends that declare (True) or deny (False) isolation; None for all.
            needs: What else must be so for the promise to be made.
        """

        def add(body: Callable[[Subject], Awaitable[None]]) -> Callable[[Subject], Awaitable[None]]:
            name = getattr(body, "__name__", "").replace("_", " ")
            self.checks.append(Check(name, body, programs or isolated is True, isolated, needs))
            return body

        return add


def variables(text: str) -> Mapping[str, str]:
    """What `env` printed."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {name: value for name, _, value in pairs}
