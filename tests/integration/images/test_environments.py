"""Environments that are built for real: by uv and by pip, from PyPI and from a private index, in sandboxes."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.images.environments import PLAIN, PYPI, builder, left, paths_of, run_in
from tests.integration.images.index import PACKAGE, PASSWORD, holds, private_index
from tests.leaks import Places
from warmcell.sandbox.backends.leftovers import clean_leftovers
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    CapacityError,
    ImageBuildError,
    UnsupportedOperationError,
)
from warmcell.sandbox.images import pythons
from warmcell.sandbox.images.base import PackageIndex
from warmcell.sandbox.images.cache import ImageCache
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.models import SandboxSpec

pytestmark = pytest.mark.bubblewrap

TOOLS = pytest.mark.parametrize("uv", [True, False], ids=["uv", "pip"])
WAITING = "echo begun; sleep 1000"


@pytest.fixture(autouse=True)
def uv_is_there() -> None:
    """It is a dependency of the tests."""
    assert pythons.find_uv() is not None


@TOOLS
async def test_packages_commands_and_variables_are_there_in_sandboxes(places: Places, uv: bool) -> None:
    """From PyPI, by either tool: what was installed is imported, what was run has left its file, pip is there."""
    image = PLAIN.env(A='x "y" $z').pip_install("iniconfig").run('printf "%s" "$A" > $VIRTUAL_ENV/made')
    cache = ImageCache(places.state / "known", {"bubblewrap": builder(places, uv=uv)})
    await cache.open()
    lines: list[str] = []
    info = await cache.build(image, backend="bubblewrap", name="tiny", tell=lines.append)
    assert info.size_bytes > 2**20
    assert [line for line in lines if line.startswith("[")][1] == "[2/3] pip_install iniconfig"
    spec = await cache.resolve(SandboxSpec(python="", image="tiny"), "bubblewrap")
    code = "import os, pip, sys, iniconfig; print(open(sys.prefix + '/made').read() + os.environ['A'])"
    assert await run_in(places, spec, code) == 'x "y" $z' * 2


async def test_an_index_with_a_password_and_a_certificate_of_its_own(places: Places, tmp_path: Path) -> None:
    """Packages come from the operator's index, of which nothing is in the image; commands reach it too.

    When the index is gone, and builds may reach nothing, the same declaration is answered at once.
    """
    image = PLAIN.pip_install(f"{PACKAGE}>=1").run(f"pip install {PACKAGE}==1.0")
    with private_index(tmp_path) as served:
        index = PackageIndex(url=served.url, certificate=served.certificate)
        cache = ImageCache(places.state / "known", {"bubblewrap": builder(places, uv=False, index=index)})
        await cache.open()
        first = await cache.build(image, backend="bubblewrap")
        assert {f"/files/{PACKAGE}-{version}-py3-none-any.whl" for version in ("1.0", "2.0")} <= set(served.requests)
    assert first.digest == image.digest
    assert holds(places.state / "environments" / image.digest[7:23], PASSWORD) == []
    found = await run_in(places, SandboxSpec(python=first.python), f"import {PACKAGE}; print({PACKAGE}.version)")
    assert found == "1.0"
    offline = builder(places, uv=False, index=index, network="none")
    cache = ImageCache(places.state / "known", {"bubblewrap": offline})
    await cache.open()
    lines: list[str] = []
    again = await cache.build(image, backend="bubblewrap", tell=lines.append)
    assert (again.digest, again.created_at, lines) == (first.digest, first.created_at, [])


async def test_one_image_that_two_want_is_built_once(places: Places) -> None:
    """Both get it, and both are told the output of the one build."""
    cache = ImageCache(places.state / "known", {"bubblewrap": builder(places, uv=True)})
    await cache.open()
    image = PLAIN.run("echo once; date +%N >> $VIRTUAL_ENV/times")
    told: tuple[list[str], list[str]] = ([], [])
    one, other = await asyncio.gather(*(cache.build(image, backend="bubblewrap", tell=lines.append) for lines in told))
    assert one.digest == other.digest
    assert told[0] == told[1]
    assert "once" in told[0]
    times = places.state / "environments" / image.digest[7:23] / "times"
    assert len(times.read_text().splitlines()) == 1


async def test_a_step_that_fails_is_shown_and_nothing_is_kept(places: Places) -> None:
    """The error has the step, its exit code and its output; what is left is what was there before."""
    building = builder(places, uv=True)
    image = PLAIN.run("echo to stdout; echo to stderr >&2; exit 7")
    with pytest.raises(ImageBuildError) as caught:
        await building.build(image, tell=lambda line: None)
    assert caught.value.details["exit_code"] == 7
    assert {"to stdout", "to stderr"} <= set(str(caught.value.details["output"]).splitlines())
    assert left(places) == []
    assert await building.find(image.digest) is None


async def test_who_gives_up_leaves_nothing(places: Places) -> None:
    """A build that is cancelled in the middle of a step: its processes end, and it counts as never begun."""
    building = builder(places, uv=True)
    image = PLAIN.run(WAITING)
    begun = asyncio.Event()
    task = asyncio.create_task(building.build(image, tell=lambda line: begun.set() if line == "begun" else None))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left(places) == []
    assert await building.find(image.digest) is None


async def test_what_a_killed_keeper_was_building_is_none(places: Places) -> None:
    """Its processes end with it, and the next one finds no image and clears the rest away."""
    code = (
        "import asyncio\n"
        "from tests.integration.images.test_environments import *\n"
        "from tests.leaks import Places\n"
        f"places = Places(Path({str(places.root)!r}))\n"
        "tell = lambda line: print(line, flush=True)\n"
        "asyncio.run(builder(places, uv=True).build(PLAIN.run(WAITING), tell=tell))\n"
    )
    top = Path(__file__).resolve().parents[3]
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=top)
    assert process.stdout is not None
    with process.stdout as output:
        said = [line.strip() for line in iter(output.readline, "begun\n") if line]
        assert said, "it ended before it began"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert any(name.startswith(".new-") for name in left(places))
    (places.state / "environments" / ("0" * 16)).mkdir()  # as if it had been killed before it could note that down
    building = builder(places, uv=True)
    await building.open(())
    assert left(places) == []
    assert await building.find(PLAIN.run(WAITING).digest) is None
    clean_leftovers(paths_of(places))  # As the next keeper does.


@pytest.mark.parametrize(
    "image",
    [PLAIN.apt_install("ffmpeg"), Image.from_registry("debian:12"), Image.from_registry("debian:12").run("true")],
    ids=str,
)
async def test_what_only_containers_can_is_refused_before_anything_is_made(places: Places, image: Image) -> None:
    """The error names the backend that can."""
    building = builder(places, uv=False)
    with pytest.raises(UnsupportedOperationError) as caught:
        await building.build(image, tell=lambda line: None)
    assert "docker" in caught.value.hint
    assert left(places) == []


async def test_a_python_that_is_not_there_is_named_with_the_cure(places: Places) -> None:
    """Without uv, which could fetch it."""
    with pytest.raises(BackendUnavailableError, match=r"no Python 3\.99") as caught:
        await builder(places, uv=False).build(Image.python("3.99", kernel=False), tell=lambda line: None)
    assert "uv" in caught.value.hint


async def test_a_certificate_that_is_not_there_is_named(places: Places) -> None:
    """The operator is told which setting to mend."""
    index = PackageIndex(certificate=Path("/no/such.pem"))
    with pytest.raises(BackendUnavailableError, match=r"/no/such\.pem") as caught:
        await builder(places, uv=False, index=index).build(PLAIN, tell=lambda line: None)
    assert "index_certificate" in caught.value.hint


async def test_steps_see_nothing_of_the_host_but_what_they_make(places: Places, tmp_path: Path) -> None:
    """Code of a package runs as it is installed: no file, process or other image of the user's is in its sight.

    Nor is there a network, where the operator allows none: not even this machine's own services.
    """
    secret = tmp_path / "secret"
    secret.write_text("s")
    other = places.state / "environments" / "other"
    other.mkdir(parents=True)
    checks = [
        f"test ! -e {secret}",
        f"test ! -e {other}",
        f"test ! -e {places.state}/environments/.known",
        f"! touch {places.state}/here",
        f"! touch /usr/made-by-a-step-{os.getpid()}",
        "test $(id -u) -ne 0",
        "test $(ls -d /proc/[0-9]* | wc -l) -lt 10",
        "touch $VIRTUAL_ENV/allowed",
    ]
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        image = PLAIN.run(*checks, f'! python -c "{connect}"')
        built = await builder(places, uv=False, network="none").build(image, tell=lambda line: None)
    assert (Path(built.python).parent.parent / "allowed").exists()
    assert not Path("/usr", f"made-by-a-step-{os.getpid()}").exists()


@pytest.mark.root
@pytest.mark.parametrize("size", ["8m", "96m"], ids=["environment", "step"])
async def test_a_full_disk_is_said_to_be_full(places: Places, size: str) -> None:
    """Whoever ran out of space: the error is that of a full disk, with its cure, and no half image is left."""
    environments = places.state / "environments"
    environments.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", environments], check=True, timeout=10)
    try:
        building = builder(places, uv=False)
        with pytest.raises(CapacityError, match="disk is full") as caught:
            await building.build(PLAIN.run("head -c 128M /dev/zero > $VIRTUAL_ENV/large"), tell=lambda line: None)
        assert "images rm" in caught.value.hint
        assert left(places) == []
    finally:
        subprocess.run(["umount", environments], check=True, timeout=10)


def test_this_python_is_found_and_named_by_its_place() -> None:
    """The interpreter proper, not the virtual environment's."""
    found = pythons.find_python(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert found is not None
    assert not found.is_symlink()
    assert pythons.find_python("3.99") is None
    assert PYPI.url == os.environ.get("PIP_INDEX_URL", "")


@pytest.mark.parametrize("left", ["link", "fifo"])
async def test_what_a_step_leaves_leads_nowhere(places: Places, tmp_path: Path, left: str) -> None:
    """A step puts links to the host's files, or what nobody ever reads, where the host writes in this and later builds.

    Nothing of the host's is written, read by others or waited for, and both images are there.
    """
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("precious")
    file.chmod(0o600)
    folder.mkdir(mode=0o700)
    put = {"link": f"ln -s {file}", "fifo": "mkfifo"}[left]
    steps = [
        *(f"{put} {name}" for name in ("$VIRTUAL_ENV/.warmcell-image.json", "/build/tmp/requirements-2.txt")),
        f"! {put} /build/asked/requirements-2.txt",
        f"rm -rf /build/cache/pip && ln -s {folder} /build/cache/pip",
    ]
    building = builder(places, uv=True)
    async with asyncio.timeout(60):
        for image in (PLAIN.run(" && ".join(steps)).pip_install("iniconfig"), PLAIN.run("true")):
            built = await building.build(image, tell=lambda line: None)
            assert await building.find(image.digest) == built
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("precious", 0o600)
    assert (list(folder.iterdir()), folder.stat().st_mode & 0o777) == ([], 0o700)
