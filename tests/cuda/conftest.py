"""What the tests on a real GPU have around them; nothing that the rest of the suite needs."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leaks import Places


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """Directories of the test's own, short enough for sockets."""
    made = Places(Path(tempfile.mkdtemp(prefix="wc-", dir="/tmp")))
    for name, value in made.env.items():
        monkeypatch.setenv(name, value)
    yield made
    shutil.rmtree(made.root, ignore_errors=True)
