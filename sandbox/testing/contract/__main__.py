"""The contract as a command: `python -m warmcell.sandbox.testing.contract bubblewrap|docker|gvisor|…`.

`helped` is bubblewrap with sandboxes that the system's helper makes.

Prints a JSON line per check, `{"check": …, "ok": …, "why": …, "seconds": …}`, and ends with 1 if one does not hold.
"""

import argparse
import asyncio
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from warmcell.sandbox.backends.base import SandboxBackend
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.testing.contract import CHECKS, Check, Subject

CHECK_TIMEOUT_S = 90.0


def main(arguments: list[str] | None = None) -> int:
    """Check one backend; 0 if it keeps its promises."""
    parser = argparse.ArgumentParser(prog="python -m warmcell.sandbox.testing.contract", description=__doc__)
    parser.add_argument("backend", help="bubblewrap, docker, gvisor, helped, process, or MODULE:FACTORY of another")
    parser.add_argument("--python", default=sys.executable, help="interpreter whose environment sandboxes get")
    parser.add_argument("--image", help="image of the sandboxes, in which that interpreter is (docker)")
    parser.add_argument("--only", action="append", help="part of the names of the checks to run; may be given again")
    parser.add_argument("--list", action="store_true", help="only print the names of the checks that apply")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="wc-") as directory:
        subject = Subject(
            backend=make(chosen.backend, Path(directory)),
            directory=Path(directory),
            python=chosen.python,
            image=chosen.image,
            signals=chosen.backend != "helped",
        )
        names = [check for check in CHECKS if check.applies(subject) and _wanted(check, chosen.only)]
        if chosen.list:
            sys.stdout.writelines(f"{check}\n" for check in names)
            return 0
        return asyncio.run(_run(subject, chosen.only))


def make(name: str, directory: Path) -> SandboxBackend:
    """The backend of that name."""
    if name in ("bubblewrap", "helped"):
        from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
        from warmcell.sandbox.snapshots.criu import SystemHelper

        paths = Paths(runtime=directory / "r", state=directory / "s", leases=directory / "l").make()
        return BubblewrapBackend(paths=paths, helper=SystemHelper().connect if name == "helped" else None)
    if name == "process":
        from warmcell.sandbox.backends.process import ProcessBackend

        return ProcessBackend()
    if name == "docker":
        from warmcell.sandbox.backends.docker import DockerBackend

        paths = Paths(runtime=directory / "r", state=directory / "s", leases=directory / "l").make()
        return DockerBackend(paths=paths)
    if name == "gvisor":
        from warmcell.sandbox.backends.gvisor import GvisorBackend

        paths = Paths(runtime=directory / "r", state=directory / "s", leases=directory / "l").make()
        return GvisorBackend(paths=paths)
    module, _, factory = name.partition(":")
    backend: SandboxBackend = getattr(importlib.import_module(module), factory)()
    return backend


def _wanted(check: Check, only: Sequence[str] | None) -> bool:
    return only is None or any(part in check.name for part in only)


async def _run(subject: Subject, only: Sequence[str] | None) -> int:
    failed = 0
    for check in CHECKS:
        if not check.applies(subject) or not _wanted(check, only):
            continue
        began, why = time.monotonic(), ""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await check.run(subject)
        except Exception as error:  # Whatever it is, it is this check's failure.
            why = f"{type(error).__name__}: {error}"
            failed += 1
        result = {"check": check.name, "ok": not why, "why": why, "seconds": round(time.monotonic() - began, 3)}
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
