"""Environments with the published packages of E2B alone: made once, and kept."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

NEWEST = ("2.63.0", "2.11.5")
OLDEST = ("2.24.0", "2.7.0")
BETWEEN = (("2.50.0", "2.9.2"), ("2.51.0", "2.9.2"))
"""Versions of `e2b` and of `e2b-code-interpreter`. From 2.51 on sandboxes are made by another path."""

CACHE = Path(__file__).parents[3] / ".cache" / "e2b"
INSTALL_TIMEOUT_S = 300


def environment(e2b: str, code_interpreter: str) -> Path:
    """A directory for PYTHONPATH with these packages and what they need."""
    made = CACHE / f"{sys.version_info.major}.{sys.version_info.minor}-{e2b}-{code_interpreter}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            fresh = made.with_name(f".{made.name}")
            shutil.rmtree(fresh, ignore_errors=True)
            wanted = (f"e2b=={e2b}", f"e2b-code-interpreter=={code_interpreter}")
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "-qq", "--no-warn-conflicts", "--target", fresh, *wanted],
                check=True,
                timeout=INSTALL_TIMEOUT_S,
            )
            os.rename(fresh, made)
    return made
