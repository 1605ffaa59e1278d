"""Environments with the published packages of E2B alone: made once, and kept."""

import ast
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

HELPERS = ("shared", "needs", "raised", "control", "envd", "rpc", "paused_in_time", "main")
SPECIAL = ("what_is_too_much_is_told",)
"""Scenarios for another principal than the server's user."""

ONCE = (
    "files_are_kept_without_the_memory",
    "gpus_are_granted_and_waited_for",
    "silence_is_told_while_code_runs",
    "room_that_is_used_up_is_told",
    "streams_say_that_they_are_there",
    "time_outs_pause_and_use_wakes",
)
"""Of these the server's part is the same for all versions, and they take seconds: usually the newest alone has them."""

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


def scenario_names(file: Path) -> list[str]:
    """The scenarios in that file, in their order, but for those that need a principal of their own."""
    found = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [name for name in found if not name.startswith("_") and name not in (*HELPERS, *SPECIAL)]
