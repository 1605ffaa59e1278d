"""Which runsc: the one that is named, or the one on PATH."""

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from warmcell.sandbox.errors import BackendUnavailableError, OperationTimeoutError

OVERRIDE = "WARMCELL_RUNSC"
OLDEST = 20240729
"""The day of the release. Older ones do not save a sandbox that runs on."""
CURE = "Install it: apt install -t bookworm-backports runsc, or a release binary from gvisor.dev."
FLAGS = (
    "--network=none",
    "--ignore-cgroups",
    "--platform=systrap",
    "--overlay2=root:memory",
    "--host-uds=all",
    "--host-fifo=open",
    "--oci-seccomp",
)
"""Of every command: a sandbox is found again only by the flags that it was made with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runsc:
    """A binary that was run."""

    path: Path
    version: str
    """As it says it; memory of one version is of no use to another."""
    day: int
    """Of its release, as in 20240729."""
    driver: str = ""
    """Version of the NVIDIA driver that a sandbox uses by it; empty: it has no GPU."""

    def argv(self, state: Path, *words: str) -> list[str]:
        """A command line for the sandbox whose state is in that directory."""
        gpus = ("--nvproxy", f"--nvproxy-driver-version={self.driver}") if self.driver else ()
        return [str(self.path), f"--root={state}", *FLAGS, *gpus, *words]


def find() -> Runsc:
    """The runsc of this machine; WARMCELL_RUNSC, if set, is the only one looked at. Blocks.

    Raises:
        BackendUnavailableError: There is none, it cannot be run, it is too old, or this is not root.
    """
    if os.getuid() != 0:
        raise BackendUnavailableError(
            "gVisor sandboxes that can be saved need root", hint="Run the keeper as root, or use another backend."
        )
    path = os.environ.get(OVERRIDE) or shutil.which("runsc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
    if path is None:
        raise BackendUnavailableError("runsc was not found on PATH", hint=CURE, details={"required": "runsc"})
    try:
        found = _asked(Path(path), Path(path).stat().st_mtime_ns)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BackendUnavailableError(f"{path} cannot be used: {error}", hint=CURE) from error
    if found.day < OLDEST:
        raise BackendUnavailableError(
            f"{path} is of {found.day}, too old",
            hint=CURE,
            details={"required": str(OLDEST), "found": found.version},
        )
    return found


@cache
def _asked(path: Path, changed_ns: int) -> Runsc:
    """What the binary says of itself; asked again when the file has changed."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    match = re.search(r"runsc version (\S*?(\d{8})\S*)", said.stdout)
    if match is None:
        raise ValueError((said.stderr or said.stdout).strip()[:200] or f"exit code {said.returncode}")
    return Runsc(path=path.resolve(), version=match[1], day=int(match[2]))


class CommandError(Exception):
    """A command of runsc's failed, with what it said."""


async def command(argv: Sequence[str], *, timeout_s: float) -> None:
    """Run one to its end.

    Raises:
        CommandError: It failed; the text is the first line of what it said.
        OperationTimeoutError: It took longer, and was killed.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        cwd="/",
    )
    try:
        async with asyncio.timeout(timeout_s):
            _, said = await process.communicate()
    except TimeoutError:
        raise OperationTimeoutError(
            f"{argv[0]} did not end within {timeout_s:.0f} s",
            hint="The machine may be overloaded; try again.",
            details={"operation": "runsc", "timeout": timeout_s},
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise CommandError(first_line(said.decode(errors="replace")) or f"exit code {process.returncode}")


def first_line(said: str) -> str:
    """What went wrong, without the stacks that follow."""
    return next((line.strip() for line in said.splitlines() if line.strip()), "")[:400]
