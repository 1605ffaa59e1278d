"""The same measurements as somebody who is not root, beside a helper of root's such as a machine has."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.memory import looker
from benchmarks.results import Result
from tests.integration.helper.system import SystemHelper
from tests.lanes import absence, as_ordinary_user, ordinary_uid
from tests.leaks import own_places
from warmcell.sandbox.snapshots.criu import SOCKET_VARIABLE

SANDBOXES = 64
"""More than any measurement has at a time."""


def measured(arguments: Sequence[str]) -> Result:
    """Run the benchmarks in a process of theirs, with a home of their own; for root.

    Args:
        arguments: Of `python -m benchmarks --rows-only`.
    """
    uid = ordinary_uid()
    with _helper() as socket, _home(uid) as home, looker() as (fd, looked):
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
        user = {"HOME": str(home), "USER": f"u{uid}", "LOGNAME": f"u{uid}", "PYTHONDONTWRITEBYTECODE": "1"}
        said = subprocess.run(
            as_ordinary_user(sys.executable, "-m", "benchmarks", "--rows-only", *arguments, uid=uid),
            env={**kept, **user, **socket, **looked},
            pass_fds=[fd],
            cwd=results.TOP,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
    return Result.from_json(json.loads(said))


@contextlib.contextmanager
def _helper() -> Iterator[Mapping[str, str]]:
    """A helper of this run's and the variable that leads to it; nothing where memory cannot be saved at all."""
    if absence("criu") is not None:
        yield {}
        return
    with own_places() as places:
        helper = SystemHelper(places, most=SANDBOXES)
        helper.start()
        try:
            yield {SOCKET_VARIABLE: str(helper.path)}
        finally:
            helper.end()


@contextlib.contextmanager
def _home(uid: int) -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="wc-home-", dir="/tmp"))
    try:
        os.chown(home, uid, uid)
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)
