"""What the tests on a real GPU have around them; nothing that the rest of the suite needs."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leaks import Places

LOG_CHARACTERS = 8000


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """Directories of the test's own, short enough for sockets."""
    made = Places(Path(tempfile.mkdtemp(prefix="wc-", dir="/tmp")))
    for name, value in made.env.items():
        monkeypatch.setenv(name, value)
    yield made
    log = made.state / "keeper.log"
    if log.exists():  # Nobody can look into it afterwards; pytest shows it of tests that fail.
        sys.stdout.write(log.read_text()[-LOG_CHARACTERS:])
    shutil.rmtree(made.root, ignore_errors=True)
