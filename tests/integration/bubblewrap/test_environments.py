"""Python environments of every kind, and what can be installed into them."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.bubblewrap.boxes import folder, subject_of
from tests.leaks import Places
from warmcell.sandbox.models import Mount
from warmcell.sandbox.testing.contract import Box

pytestmark = pytest.mark.bubblewrap

DEBIAN = Path("/usr/bin/python3")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that can be installed without a network."""
    source = tmp_path_factory.mktemp("wheel")
    module, info = source / "planted.py", source / "planted-1.0.dist-info"
    module.write_text("answer = 42\n")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "RECORD").write_text("planted.py,,\n")
    shutil.make_archive(str(source / "planted"), "zip", source)
    return (source / "planted.zip").rename(source / "planted-1.0-py3-none-any.whl")


def new_environment(path: Path, *flags: str) -> Path:
    """A new virtual environment; its interpreter."""
    made = subprocess.run(
        [sys.executable, "-m", "venv", *flags, path], capture_output=True, text=True, timeout=100, check=False
    )
    if made.returncode:
        pytest.fail(f"no environment can be made: {made.stdout}{made.stderr}")
    return path / "bin" / "python"


@pytest.fixture
def bare(places: Places) -> Path:
    """The interpreter of an environment of the test's own, without pip."""
    return new_environment(places.root / "venv", "--without-pip")


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    """The interpreter of an environment with pip. Tests must leave it as it is, which is what they test."""
    with tempfile.TemporaryDirectory(prefix="wc-") as directory:
        yield new_environment(Path(directory) / "venv")


async def installs(box: Box, python: Path | str, wheel: Path) -> None:
    """Install, import, and remove a package, in a sandbox that has `wheel`."""
    pip = (str(python), "-m", "pip")
    installed = await box.run(*pip, "install", "--no-index", f"/data/{wheel.name}")
    assert installed.exit_code == 0, installed.stderr
    said = await box.run(str(python), "-c", "import planted; print(planted.answer)")
    assert said.stdout == "42\n", said.stderr
    removed = await box.run(*pip, "uninstall", "-y", "planted")
    assert removed.exit_code == 0, removed.stderr
    assert (await box.run(str(python), "-c", "import planted")).exit_code != 0


def given(wheel: Path) -> tuple[Mount, ...]:
    return (Mount(source=str(wheel), target=f"/data/{wheel.name}"),)


async def test_packages_go_into_the_layer_of_a_virtual_environment(places: Places, python: Path, wheel: Path) -> None:
    """`pip install` works and the host's environment stays as it is."""
    before = sorted(path.name for path in python.parent.parent.rglob("*"))
    async with subject_of(places, python=str(python)).box(mounts=given(wheel)) as box:
        await installs(box, python, wheel)
    assert sorted(path.name for path in python.parent.parent.rglob("*")) == before


async def test_a_package_of_the_host_can_be_removed_in_the_layer(places: Places, python: Path) -> None:
    """Upgrades replace what is there."""
    async with subject_of(places, python=str(python)).box() as box:
        removed = await box.run(str(python), "-m", "pip", "uninstall", "-y", "setuptools", "pip")
        assert removed.exit_code == 0, removed.stderr
        assert (await box.run(str(python), "-c", "import pip")).exit_code != 0
    assert subprocess.run([python, "-c", "import pip"], timeout=60, check=False).returncode == 0


async def test_the_systems_python_installs_into_the_home(places: Places, wheel: Path) -> None:
    """It is not written itself, and does not ask for a flag either."""
    if not DEBIAN.exists() or subprocess.run([DEBIAN, "-m", "pip", "--version"], check=False).returncode:
        pytest.skip(f"{DEBIAN} has no pip: apt install python3-pip")
    async with subject_of(places, python=str(DEBIAN)).box(mounts=given(wheel)) as box:
        await installs(box, DEBIAN, wheel)


async def test_without_network_pip_gives_up_at_once(places: Places, python: Path) -> None:
    """Nobody waits for five attempts at reaching nobody."""
    async with subject_of(places, python=str(python)).box(network="none") as box:
        tried = await box.run(str(python), "-m", "pip", "install", "no-such-package", timeout=60)
        assert tried.exit_code != 0
        assert "Retrying" not in tried.stderr + tried.stdout


@pytest.mark.root
async def test_an_environment_of_somebody_else_can_be_added_to(places: Places, python: Path, wheel: Path) -> None:
    """Root's guest is not root, and yet installs into root's environment, as seen inside."""
    assert python.parent.parent.stat().st_uid == 0
    work = folder(places, "work", owner=4242)
    async with subject_of(places, python=str(python)).box(mounts=given(wheel), workspace=work) as box:
        assert await box.says("id -u") == "4242"
        await installs(box, python, wheel)


async def test_an_environment_in_the_workspace_is_layered_too(places: Places) -> None:
    """A project with its .venv: the project is written, its environment is not."""
    work = folder(places, "work")
    python = new_environment(work / ".venv", "--without-pip")
    async with subject_of(places, python=str(python)).box(workspace=work) as box:
        site = (await box.says(f"echo {work}/.venv/lib/python3*/site-packages")).strip()
        await box.says(f"touch {work}/project.txt {site}/inside.py")
    assert (work / "project.txt").exists()
    assert not list(work.rglob("inside.py"))


async def test_a_workspace_that_is_the_environment_stays_the_workspace(places: Places, bare: Path) -> None:
    """What was asked to be written through is written through."""
    prefix = bare.parent.parent
    async with subject_of(places, python=str(bare)).box(workspace=prefix) as box:
        await box.says(f"echo kept > {prefix}/notes.txt")
    assert (prefix / "notes.txt").read_text() == "kept\n"


async def test_an_interpreter_is_found_by_links(places: Places, bare: Path) -> None:
    """As pyenv, uv and conda name theirs."""
    (places.root / "alias").symlink_to(bare.parent.parent)
    named = places.root / "alias" / "bin" / "python"
    async with subject_of(places, python=str(named)).box() as box:
        said = await box.run(str(named), "-c", "import sys; print(sys.prefix)")
        assert said.stdout.strip() == str(places.root / "alias")


async def test_an_interpreter_below_a_closed_home_can_be_run(places: Places) -> None:
    """Its directories are shown, and nothing beside them."""
    home = folder(places, "closed", mode=0o700)
    (home / "secret.txt").write_text("secret")
    python = new_environment(home / "venv", "--without-pip")
    async with subject_of(places, python=str(python)).box() as box:
        assert (await box.run(str(python), "-c", "print('runs')")).stdout == "runs\n"
        assert await box.says(f"ls -A {home}") == "venv"


async def test_this_environment_imports_what_it_has(places: Places) -> None:
    """The libraries of compiled packages are found."""
    async with subject_of(places).box() as box:
        said = await box.run(sys.executable, "-c", "import ssl, sqlite3, ctypes, zmq, numpy; print('all')", timeout=60)
        assert said.stdout == "all\n", said.stderr


async def test_the_keepers_files_do_not_show_in_a_home_that_is_the_workspace(places: Places) -> None:
    """With the keeper's socket a guest could ask for any sandbox."""
    subject = subject_of(places)
    (places.runtime / "keeper.sock").touch()
    try:
        async with subject.box(workspace=places.root) as box:
            assert await box.says(f"ls -A {places.root}") != ""
            assert await box.says(f"ls -A {places.runtime} {places.state} | grep -v : | grep . || true") == ""
            assert (await box.shell(f"touch {places.runtime}/new")).exit_code != 0
    finally:
        os.unlink(places.runtime / "keeper.sock")
