"""A folder that a sandbox may change for itself alone: an overlay over it, mounted inside the container.

An engine has no such mount. The keeper enters the container's mounts for it, as root, before anything of the guest's
runs there.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from warmcell.sandbox.backends import layers
from warmcell.sandbox.backends.docker import overlay
from warmcell.sandbox.backends.layers import Part, Saved

PART = "workspace"
PLACE = "/.changes"
"""Directory of root's in the container, in memory; what lies in it is the overlay's."""
LOWER, SAVED, UPPER, WORK = (f"{PLACE}/{name}" for name in ("lower", "saved", "upper", "work"))
LEAST_BYTES = 256 * 1024
"""Room that a full layer leaves for the marks of what is removed."""
ENTRY_BYTES = 4096
TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """The overlay of a sandbox, as it is mounted."""

    targets: tuple[str, ...]
    """Where it is shown."""
    lower: str
    saved: str
    """What lies above that, of the layer that the sandbox began with; empty where it has nothing of it."""
    upper: str
    work: str
    options: str
    owner: tuple[int, int]
    mode: int
    size_bytes: int
    """Of the memory that what is changed may take."""


def planned(folder: Path, targets: tuple[str, ...], *, saved: Saved | None, layer_bytes: int) -> Changes:
    """The overlay of a folder, above what a saved layer has of it."""
    found = folder.stat()
    had = 0 if saved is None else saved.bytes.get(PART, 0)
    above = saved is not None and PART in saved.bytes
    return Changes(
        targets=targets,
        lower=LOWER,
        saved=SAVED if above else "",
        upper=UPPER,
        work=WORK,
        options=layers.marks_option(as_root=True),
        owner=(found.st_uid, found.st_gid),
        mode=found.st_mode & 0o7777,
        size_bytes=max(layer_bytes - had, LEAST_BYTES),
    )


def part(*, layer_bytes: int, above: bool) -> Part:
    """What of it is saved.

    Args:
        layer_bytes: Most that the whole layer may take.
        above: Whether it lies above what an earlier layer had.
    """
    return Part(
        place=UPPER.lstrip("/"),
        most_bytes=layer_bytes,
        most_entries=2 * max(1024, layer_bytes // ENTRY_BYTES),
        lowest=LOWER.lstrip("/"),
        base=above,
    )


def mount(changes: Changes, process: int, *, layer: int) -> str:
    """Mount it. Blocks.

    Args:
        changes: What.
        process: A pidfd of the container's first process.
        layer: A descriptor of the layer that the sandbox began with, -1 where there is none. Its path may change.

    Returns:
        Why that cannot be, else nothing.
    """
    plan = json.dumps({**asdict(changes), "part": PART})
    argv = [sys.executable, "-I", "-S", overlay.__file__, str(process), str(layer), plan]
    try:
        made = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            pass_fds=[fd for fd in (process, layer) if fd >= 0],
            env={},
            cwd="/",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it took too long"
    said = made.stdout.strip()
    if said == overlay.DONE:
        return ""
    return os.strerror(int(said)) if said.isdigit() else f"exit code {made.returncode}"
