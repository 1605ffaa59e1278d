"""CRIU begins without libraries that it never uses for us, where that works, and with all of them elsewhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.leaks import Places
from warmcell.sandbox.helper import hollow, probe
from warmcell.sandbox.helper.program import Program, find
from warmcell.sandbox.snapshots.criu import helper_environment

pytestmark = pytest.mark.criu


def loaded(criu: Program, *words: str, **variables: str) -> str:
    """What the loader, or the program, says when it is run as the helper runs it."""
    executable, first, fds = criu.command()
    return subprocess.run(
        [*first, *words],
        executable=f"/proc/self/fd/{executable}",
        pass_fds=[*fds, executable],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    ).stdout


@pytest.fixture
def criu() -> Program:
    found = find({**os.environ, **helper_environment()})
    if not found.loader or hollow.directory(found.path) < 0:
        pytest.skip("this CRIU has none of the libraries that are left out")
    return found


def test_what_is_never_used_is_not_loaded(criu: Program, places: Places) -> None:
    """Neither what comes empty nor what only that needs; and a process is saved and restored all the same."""
    before = loaded(criu, LD_TRACE_LOADED_OBJECTS="1").splitlines()
    assert probe.cache(criu, str(places.state))
    probe.check(criu, str(places.state))
    after = loaded(criu, LD_TRACE_LOADED_OBJECTS="1").splitlines()
    assert len(after) < len(before) / 2, after
    assert loaded(criu, "--version").startswith("Version: ")


def test_another_process_knows_that_it_works(criu: Program, places: Places) -> None:
    """It is tried once for each start of the machine; what was found out then is written down."""
    probe.cache(criu, str(places.state))
    other = find({**os.environ, **helper_environment()})
    assert not other.light
    probe.cache(other, str(places.state))
    assert other.light


TRIED = """
import os, sys
from warmcell.sandbox.helper import hollow, probe
from warmcell.sandbox.helper.program import find

if sys.argv[2] == "lacking":
    hollow.VARIABLE = b"another"  # Then criu does not begin.
elif sys.argv[2] == "forgotten":
    probe._Small.write_cache = lambda *_: None  # Then it has to find out anew, with functions of what is left out.
criu = find(os.environ)
print(bool(probe.cache(criu, sys.argv[1])), criu.light, criu.hollow >= 0)
probe.check(criu, sys.argv[1])
"""


@pytest.mark.parametrize(
    ("how", "said"), [("", "True True True"), ("lacking", "True False False"), ("forgotten", "True True True")]
)
def test_where_it_does_not_work_all_is_loaded(criu: Program, tmp_path: Path, how: str, said: str) -> None:
    """A CRIU that does not begin without them, and a sandbox in which it has to find out all anew."""
    told = subprocess.run(
        [sys.executable, "-c", TRIED, str(tmp_path), how],
        env={**os.environ, **helper_environment()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert told.stdout.strip() == said, told.stderr
