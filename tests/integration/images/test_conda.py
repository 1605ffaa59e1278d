"""Images of conda's packages, solved, fetched and linked for real from a channel that is made here."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import IMAGE, Dockerd
from tests.integration.images.channel import OWN, SEEN, make_channel
from tests.integration.images.environments import builder, left, run_in
from tests.integration.images.index import PACKAGE, PASSWORD, PrivateIndex, holds, private_index, wheel_of
from tests.integration.images.test_docker_images import nothing_of_the_operators, said
from tests.jupyter.warmcell_kernels import configure, connected, kernelspec, started
from tests.jupyter.warmcell_kernels import said as said_in
from tests.leaks import Places
from warmcell.extension.cli import main
from warmcell.sandbox.errors import BackendUnavailableError, ImageBuildError
from warmcell.sandbox.images import environments
from warmcell.sandbox.images.base import PackageIndex
from warmcell.sandbox.images.containers import ContainerImageBuilder
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.models import SandboxSpec

FILE = f"""
name: work
channels: [own, nodefaults]
dependencies:
  - own::python={OWN}
  - wchello
  - pip:
    - {PACKAGE}==1.0
variables:
  GREETING: hi
"""
LOOK = (
    f"import os, subprocess, sys, wchello, {PACKAGE} as p; greet = subprocess.check_output(['greet'], text=True); "
    "print(wchello.n, p.version, os.environ['GREETING'], greet.strip(), sys.prefix)"
)


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_channel(tmp_path_factory.mktemp("channel") / "own")


@pytest.fixture
def served(tmp_path: Path, channel: Path) -> Iterator[PrivateIndex]:
    """The operator's index and channel, which want a password and have a certificate of their own."""
    with private_index(tmp_path) as index:
        index.channels.mkdir()
        (index.channels / "own").symlink_to(channel)
        yield index


def index_of(served: PrivateIndex, alias: str = "") -> PackageIndex:
    environ = {"CONDA_CHANNEL_ALIAS": alias or served.channel_alias}
    return PackageIndex.from_environment(environ, url=served.url, certificate=str(served.certificate))


def declared(folder: Path) -> Image:
    (folder / "environment.yml").write_text(FILE)
    return Image.from_environment(folder / "environment.yml", kernel=False)


@pytest.mark.bubblewrap
@pytest.mark.parametrize(("uv", "token"), [(True, False), (False, True)], ids=["uv, password", "pip, token"])
async def test_an_environment_of_condas_and_pips_packages(
    places: Places, served: PrivateIndex, tmp_path: Path, uv: bool, token: bool
) -> None:
    """What is needed is chosen, programs know where they are, pip adds to it; of the operator's there is nothing."""
    image = declared(tmp_path).run("! env | grep CONDA_")
    lines: list[str] = []
    alias = served.token_alias if token else served.channel_alias
    built = await builder(places, uv=uv, index=index_of(served, alias)).build(image, tell=lines.append)
    assert {"wchello 1.0 0", "greeting 1.0 0"} <= set(lines)
    prefix = Path(built.python).parent.parent
    found = await run_in(places, SandboxSpec(python=built.python, env=dict(image.variables)), LOOK)
    assert found == f"42 1.0 hi hello 1.0 from {prefix} {prefix}"
    assert b"PREFIX=" in (prefix / SEEN).read_bytes()
    assert holds(prefix, PASSWORD) == []
    assert holds(prefix, served.channel_alias.rpartition("@")[2].removesuffix("/conda")) == []
    assert PASSWORD not in "".join(lines)
    assert left(places) == [prefix.name]


@pytest.mark.bubblewrap
@pytest.mark.parametrize(
    ("packages", "says"),
    [(["wchello", "greeting=2"], "greeting <2"), (["nothing-of-that-name"], "nothing-of-that-name")],
)
async def test_packages_that_cannot_be_had_are_named(
    places: Places, served: PrivateIndex, packages: list[str], says: str
) -> None:
    """With the solver's reason, and nothing is kept."""
    image = Image.conda(packages, channels=["own"], kernel=False)
    with pytest.raises(ImageBuildError) as caught:
        await builder(places, uv=True, index=index_of(served)).build(image, tell=lambda line: None)
    assert says in str(caught.value.details["output"])
    assert PASSWORD not in f"{caught.value}{caught.value.details}"
    assert left(places) == []


@pytest.mark.bubblewrap
@pytest.mark.parametrize("alias", ["someone:{}@127.0.0.1:9", "some/one:{}@127.0.0.1:9", "127.0.0.1:9/t/{}/conda"])
async def test_channels_that_cannot_be_reached_are_told(places: Places, alias: str) -> None:
    """Without the password or the token that may be in their address."""
    index = PackageIndex(conda={"CONDA_CHANNEL_ALIAS": f"http://{alias.format(PASSWORD)}"})
    with pytest.raises(ImageBuildError) as caught:
        await builder(places, uv=True, index=index).build(Image.conda("six", kernel=False), tell=lambda line: None)
    assert "Error: " in str(caught.value.details["output"])
    assert PASSWORD not in f"{caught.value}{caught.value.details}"


async def test_without_its_tool_the_cure_is_told(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made."""
    monkeypatch.setattr(environments, "RATTLER", "no_such_rattler")
    with pytest.raises(BackendUnavailableError, match="py-rattler") as caught:
        await builder(places, uv=True).build(Image.conda("six"), tell=lambda line: None)
    assert "warmcell[conda]" in caught.value.hint
    assert left(places) == []


@pytest.mark.bubblewrap
async def test_a_kernel_runs_on_condas_packages(places: Places, served: PrivateIndex, tmp_path: Path) -> None:
    """Built by the command line from the operator's channel, which has ipykernel too, and named by a kernelspec."""
    configure(
        places,
        index_url=served.url,
        index_certificate=str(served.certificate),
        conda_channel_alias=served.channel_alias,
    )
    (tmp_path / "environment.yml").write_text(FILE)
    build = ["images", "build", str(tmp_path / "environment.yml"), "--name", "work"]
    assert await asyncio.to_thread(main, build) == 0
    kernelspec(places, image="work")
    async with started(cwd=str(tmp_path)) as manager, connected(manager) as client:
        assert (await said_in(client, LOOK)).startswith("42 1.0 hi hello 1.0 from ")
    assert await asyncio.to_thread(main, ["images", "rm", "work"]) == 0


@pytest.mark.docker
async def test_docker_builds_an_image_of_condas_packages(docker: Dockerd, served: PrivateIndex, tmp_path: Path) -> None:
    """The same of an engine's, whose tool comes from the operator's index as well."""
    image = declared(tmp_path)
    served.wheels.append(wheel_of("py-rattler", tmp_path))
    building = ContainerImageBuilder(engine=docker.engine, index=index_of(served), python_image=IMAGE)
    try:
        built = await building.build(image, tell=lambda line: None)
        found = said(docker, built.reference, built.python, "-c", LOOK)
        assert found == "42 1.0 hi hello 1.0 from /opt/venv /opt/venv"
        nothing_of_the_operators(docker, served, built.reference, tmp_path / "image.tar")
    finally:
        await building.remove(image.digest)
