"""Where memory cannot hold a layer, it is on disk, and says so."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import OrdinaryUser
from warmcell.sandbox.backends.bubblewrap import plan
from warmcell.sandbox.backends.files import remove_tree

SCRIPT = str(Path(__file__).with_name("disk_layer.py"))


@pytest.mark.user
@pytest.mark.parametrize("checks", ["environment", "limit", "leaves nothing"])
async def test_it_keeps_the_promises_of_a_layer(ordinary_user: OrdinaryUser, checks: str) -> None:
    """Packages can be installed and replaced, the host does not see it, and nothing is left afterwards."""
    process = await asyncio.create_subprocess_exec(
        *ordinary_user.argv(sys.executable, SCRIPT, checks),
        stdout=asyncio.subprocess.PIPE,
        env=dict(ordinary_user.env),
        cwd="/",
    )
    stdout, _ = await asyncio.wait_for(process.communicate(), 100)
    results = [json.loads(line) for line in stdout.splitlines()]
    assert results
    assert not [f"{result['check']}: {result['why']}" for result in results if not result["ok"]]


@pytest.mark.parametrize(
    ("release", "uid", "needed"),
    [("6.1.0-50-amd64", 1000, True), ("5.15.0", 1000, True), ("6.6.1", 1000, False), ("6.1.0", 0, False)],
)
def test_it_is_needed_by_ordinary_users_of_older_kernels(
    monkeypatch: pytest.MonkeyPatch, release: str, uid: int, needed: bool
) -> None:
    """Root's layers use attributes that memory has always had."""
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", release, "#1", "x86_64")))
    monkeypatch.setattr(os, "getuid", lambda: uid)
    assert plan.needs_layer_on_disk() is needed


def test_a_tree_is_removed_whatever_its_modes_are(tmp_path: Path) -> None:
    """Links in it are removed, not followed."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    tree = tmp_path / "tree"
    (tree / "closed" / "deeper").mkdir(parents=True)
    (tree / "closed" / "deeper" / "file").touch()
    (tree / "link").symlink_to(kept)
    (tree / "closed" / "deeper").chmod(0)
    (tree / "closed").chmod(0)
    remove_tree(tree)
    assert not tree.exists()
    assert (kept / "file").exists()
    remove_tree(tree)
