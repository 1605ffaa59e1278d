"""Snapshots that were brought in from elsewhere."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.snapshots.notebooks import keeper, notebook
from tests.leaks import Places
from warmcell.sandbox.errors import UnsupportedOperationError

pytestmark = pytest.mark.criu


async def cli(*arguments: str) -> Any:
    """What a command of `warmcell snapshots` says as JSON."""
    argv = [sys.executable, "-m", "warmcell.extension.cli", "snapshots", *arguments, "--json"]
    done = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        stdout, stderr = await done.communicate()
    assert done.returncode == 0, stderr.decode()
    return json.loads(stdout)


async def test_files_alone_are_no_kernel(places: Places, tmp_path: Path) -> None:
    """A restore says so, and the kernel runs on with all it had."""
    async with keeper(places, import_snapshots=True) as client, notebook(client, tmp_path) as book:
        await book.run("x = 41")
        await book.do("snapshot", name="mine")
        await cli("export", "mine", str(tmp_path / "archive"), "--files-only")
        brought = await cli("import", str(tmp_path / "archive"))
        with pytest.raises(UnsupportedOperationError, match="files alone"):
            await book.do("restore", snapshot=brought["id"])
        assert (await book.info())["state"] == "running"
        assert await book.run("x += 1; print(x)") == "42"
