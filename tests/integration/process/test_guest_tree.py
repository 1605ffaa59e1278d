"""The tree that sandboxes have mounted: complete, compiled, named by its content."""

import asyncio
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.process.guest import TREE, running_guest
from tests.leaks import Places
from warmcell.sandbox import guest_tree as module
from warmcell.sandbox.guest_tree import guest_tree
from warmcell.sandbox.paths import Paths


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """What another test has made is not remembered."""
    module._made.clear()


def test_it_has_every_module_compiled_and_readable_for_everyone(places: Places) -> None:
    """Each of our sources is there with its compiled file, and other uids can read all of it."""
    tree = guest_tree(Paths.default())
    assert tree.parent == places.state / "guest"
    sources = {str(path.relative_to(TREE)) for path in TREE.rglob("*.py")}
    copied = {str(path.relative_to(tree)) for path in tree.rglob("*.py")}
    assert sources <= copied
    for name in copied:
        path = tree / name
        assert list((path.parent / "__pycache__").glob(f"{path.stem}.{sys.implementation.cache_tag}.pyc")), name
    for path in (tree, *tree.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_the_same_content_is_made_once_and_another_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second keeper finds the first one's tree; after an upgrade the old one stays for who uses it."""
    first = guest_tree(Paths.default())
    stamp = (first / "init.py").stat().st_mtime_ns
    module._made.clear()
    assert guest_tree(Paths.default()) == first
    assert (first / "init.py").stat().st_mtime_ns == stamp
    other = tmp_path / "guest"
    other.mkdir()
    (other / "init.py").write_text("print('new')\n")
    monkeypatch.setattr(module, "SOURCE", other)
    module._made.clear()
    second = guest_tree(Paths.default())
    assert second != first
    assert (first / "init.py").exists()
    assert (second / "init.py").read_text() == "print('new')\n"


def test_many_at_once_make_one_tree() -> None:
    """Keepers that start together neither fail nor leave halves behind."""
    paths = Paths.default()
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: module._make(paths.state / "guest"), range(8)))
    assert len(made) == 1
    assert [path.name for path in (paths.state / "guest").iterdir()] == [made.pop().name]


def test_a_tree_that_was_removed_is_made_again() -> None:
    """Somebody may clean up while a keeper runs."""
    tree = guest_tree(Paths.default())
    subprocess.run(["rm", "-r", str(tree)], check=True)
    assert (guest_tree(Paths.default()) / "init.py").exists()


async def test_values_travel_without_cloudpickle_in_the_environment(places: Places) -> None:
    """Where an environment lacks it, the carried copy serves, with its licence beside it."""
    tree = await asyncio.to_thread(guest_tree, Paths.default())
    assert "Redistribution" in (tree / "carried" / "cloudpickle" / "LICENSE").read_text()
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p];"
        "package = type(sys)('warmcell_guest'); package.__path__ = [sys.argv[1]];"
        "sys.modules['warmcell_guest'] = package; from warmcell_guest.values import dumps, loads;"
        "print(loads(dumps({'f': lambda n: n + 1}))['f'](1));"
        "print(sys.modules['cloudpickle'].__file__, 'carried' in sys.path[-1])"
    )
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-I", "-c", code, str(tree)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ran.stdout.split() == ["2", str(tree / "carried" / "cloudpickle" / "__init__.py"), "False"]


async def test_init_is_quick_and_small(places: Places) -> None:
    """As sandboxes start it, init takes less than 5 MiB of its own and imports none of the dear modules."""
    tree = await asyncio.to_thread(guest_tree, Paths.default())
    async with running_guest(places.root, tree=tree) as guest:
        rollup = Path(f"/proc/{guest.process.pid}/smaps_rollup").read_text()
        private = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
        assert private < 5 * 1024
    imported = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-I", "-S", "-X", "importtime", str(tree / "init.py")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    names = {line.rpartition("|")[2].strip() for line in imported.stderr.splitlines() if "import time" in line}
    assert "warmcell_guest.supervisor.server" in names
    assert not names & {"re", "enum", "json", "typing", "socket", "selectors", "signal", "subprocess", "collections"}
