"""What builds share of packages: later ones have it, and no code of an earlier one has ever written to it."""

import os
from pathlib import Path

import pytest

from tests.integration.images.environments import PLAIN, builder, run_in
from tests.integration.images.index import PACKAGE, holds, plain_wheel, private_index, source_of, wheel_of
from tests.leaks import Places
from warmcell.sandbox.images import environments, pythons
from warmcell.sandbox.images.base import PackageIndex
from warmcell.sandbox.images.environments import SHARED, EnvironmentBuilder
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.models import SandboxSpec

pytestmark = pytest.mark.bubblewrap

TOOLS = pytest.mark.parametrize("uv", [True, False], ids=["uv", "pip"])
POISON = "poison-for-whoever-comes-later"
SPOIL = """
import os, pathlib
for place in (os.environ["PIP_CACHE_DIR"], os.environ["UV_CACHE_DIR"], "SHARED"):
    top = pathlib.Path(place)
    top.mkdir(parents=True, exist_ok=True)
    (top / "POISON").write_text("")
    for path in top.rglob("*"):
        if path.is_file() and not path.is_symlink() and "sdists" not in str(path):
            path.write_text("POISON")
"""
"""Changes all that is cached but what it is built in."""


@pytest.fixture(autouse=True)
def uv_is_there() -> None:
    """It is a dependency of the tests."""
    assert pythons.find_uv() is not None


@pytest.fixture
def shared(places: Places) -> Path:
    return places.state / "environments" / SHARED


def seeds(directory: Path) -> list[Path]:
    """What uv begins an environment of an older Python with."""
    return [*(wheel_of(name, directory) for name in ("pip", "setuptools")), plain_wheel("wheel", "0.45.0", directory)]


async def version_in(places: Places, python: str) -> str:
    return await run_in(places, SandboxSpec(python=python), f"import {PACKAGE}; print({PACKAGE}.version)")


@TOOLS
async def test_what_one_build_has_fetched_the_next_has(places: Places, tmp_path: Path, uv: bool) -> None:
    """Another image with the same package fetches no file again."""
    with private_index(tmp_path) as served:
        served.wheels += seeds(tmp_path) if uv else []
        index = PackageIndex(url=served.url, certificate=served.certificate)
        building = builder(places, uv=uv, index=index)
        await built(building, PLAIN.pip_install(f"{PACKAGE}==2.0").run("true"))
        assert any(path.startswith("/files/") for path in served.requests)
        served.requests.clear()
        python = await built(building, PLAIN.pip_install(f"{PACKAGE}==2.0"))
        assert served.requests
        assert [path for path in served.requests if path.startswith("/files/")] == []
    assert await version_in(places, python) == "2.0"


@TOOLS
@pytest.mark.parametrize("whose", ["command", "package", "address"])
async def test_code_in_a_build_spoils_nothing_for_another(
    places: Places, tmp_path: Path, shared: Path, uv: bool, whose: str
) -> None:
    """Whatever a command or a package's set-up code writes to caches, its own build alone has it."""
    in_two = POISON.replace("-", '" "-', 1)  # Sources that are only kept are no poison.
    spoil = SPOIL.replace("SHARED", str(shared)).replace("POISON", in_two)
    with private_index(tmp_path) as served:
        served.wheels += seeds(tmp_path) if uv else []
        index = PackageIndex(url=served.url, certificate=served.certificate)
        building = builder(places, uv=uv, index=index)
        image = PLAIN.pip_install(f"{PACKAGE}==2.0")
        if whose == "command":
            image = image.run(f"python - <<'END'\n{spoil}\nEND\n", "test -e $PIP_CACHE_DIR/" + POISON)
        else:
            said = "open('/build/tmp/spoiled', 'w').close()"
            source = source_of("wcevil", tmp_path, hook=f"{spoil}\n{said}")
            served.wheels.append(source)
            image = image.pip_install(f"wcevil @ {served.public(source)}" if whose == "address" else "wcevil")
            image = image.run("test -e $TMPDIR/spoiled")
        await built(building, image)
        assert any(path.is_file() for path in shared.rglob("*"))
        assert holds(shared, POISON) == []
        python = await built(building, PLAIN.pip_install(f"{PACKAGE}==2.0"))
    assert await version_in(places, python) == "2.0"


async def test_what_builds_share_is_emptied_where_it_is_too_large(places: Places, tmp_path: Path, shared: Path) -> None:
    """When the last of them is done, and not before: the others have fetched what is there. Images keep theirs."""
    with private_index(tmp_path) as served:
        served.wheels += seeds(tmp_path)
        index = PackageIndex(url=served.url, certificate=served.certificate)
        image = PLAIN.pip_install(f"{PACKAGE}==2.0")
        building = builder(places, uv=True, index=index, cache_bytes=4096)
        building._builds += 1  # Another one is at work.
        await built(building, image)
        assert any(path.is_file() for path in shared.rglob("*"))
        building._builds -= 1
        python = await built(building, image.env(OTHER="yes"))
        assert not shared.exists()
        assert [*shared.parent.glob(".gone-*")] == []
        assert await version_in(places, python) == "2.0"
        await built(builder(places, uv=True, index=index, cache_bytes=2**30), image.env(OTHER="no"))
        assert shared.exists()


async def test_a_build_is_not_failed_by_what_another_does_to_the_cache(
    places: Places, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another begins while it is seen how large the cache is: a file that was listed is gone when it is looked at."""
    building, size = builder(places, uv=True, cache_bytes=0), environments._size

    def while_another_begins(directory: Path) -> int:
        if directory == shared:
            building._builds += 1
            os.lstat(shared / "gone")
        return size(directory)

    monkeypatch.setattr(environments, "_size", while_another_begins)
    python = await built(building, PLAIN)
    assert building._builds == 1
    assert shared.exists()
    assert Path(python).exists()


async def test_what_any_build_could_write_to_earlier_goes(places: Places) -> None:
    """The cache of versions that shared it with all code may be spoiled already."""
    before = places.state / "environments" / ".cache" / "pip"
    before.mkdir(parents=True)
    await builder(places, uv=True).open(())
    assert not before.parent.exists()


async def built(building: EnvironmentBuilder, image: Image) -> str:
    """Its interpreter."""
    return (await building.build(image, tell=lambda line: None)).python
