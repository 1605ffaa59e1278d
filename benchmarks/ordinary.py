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
from tests.engines import Dockerd, own_engine
from tests.integration.helper.system import SystemHelper
from tests.lanes import absence, as_ordinary_user, ordinary_uid
from tests.leaks import own_places
from warmcell.sandbox.snapshots.criu import SOCKET_VARIABLE

ENGINE_VARIABLE = "WARMCELL_BENCH_ENGINE"
"""Leads to the directory of an engine of containers that root has lent for `docker run`."""
SANDBOXES = 64
"""More than any measurement has at a time."""


def measured(arguments: Sequence[str], *, engine: bool) -> Result:
    """Run the benchmarks in a process of theirs, with a home of their own; for root.

    Args:
        arguments: Of `python -m benchmarks --rows-only`.
        engine: Lend them an engine of containers, which nobody else can start.
    """
    uid = ordinary_uid()
    with contextlib.ExitStack() as stack:
        socket, home = stack.enter_context(_helper()), stack.enter_context(_home(uid))
        fd, looked = stack.enter_context(looker())
        lent = stack.enter_context(_engine(uid)) if engine else {}
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
        user = {"HOME": str(home), "USER": f"u{uid}", "LOGNAME": f"u{uid}", "PYTHONDONTWRITEBYTECODE": "1"}
        said = subprocess.run(
            as_ordinary_user(sys.executable, "-m", "benchmarks", "--rows-only", *arguments, uid=uid),
            env={**kept, **user, **socket, **looked, **lent},
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


def lent() -> Dockerd | None:
    """The engine that root has lent to this process."""
    directory = os.environ.get(ENGINE_VARIABLE)
    return Dockerd(Path(directory)) if directory else None


@contextlib.contextmanager
def _engine(uid: int) -> Iterator[Mapping[str, str]]:
    if absence("docker") is not None:
        yield {}
        return
    with own_engine() as engine:
        os.chown(engine.directory / "sock", uid, uid)
        yield {ENGINE_VARIABLE: str(engine.directory)}


@contextlib.contextmanager
def _home(uid: int) -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="wc-home-", dir="/tmp"))
    try:
        os.chown(home, uid, uid)
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)
