"""Images that a real engine builds: what is declared is in them, and nothing of the operator's."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import IMAGE, Dockerd
from tests.integration.images.index import PACKAGE, PASSWORD, PrivateIndex, private_index
from tests.leaks import Places
from warmcell.sandbox.backends.docker.driver import DockerBackend
from warmcell.sandbox.channel import GuestChannel
from warmcell.sandbox.errors import CapacityError, ConflictError, ImageBuildError
from warmcell.sandbox.ids import new_sandbox_id
from warmcell.sandbox.images.base import Output, PackageIndex
from warmcell.sandbox.images.cache import ImageCache
from warmcell.sandbox.images.containers import ContainerImageBuilder
from warmcell.sandbox.images.dockerfile import PYTHON
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths

pytestmark = pytest.mark.docker

PLAIN = Image.python("3.11", kernel=False)
INSTALL = """
import os, subprocess, sys, zipfile
with zipfile.ZipFile("/tmp/late-1.0-py3-none-any.whl", "w") as wheel:
    for name, text in (
        ("late.py", "value = 42"),
        ("late-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: late\\nVersion: 1.0\\n"),
        ("late-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"),
        ("late-1.0.dist-info/RECORD", ""),
    ):
        wheel.writestr(name, text)
said = subprocess.run([sys.executable, "-m", "pip", "install", "--no-index", wheel.filename], capture_output=True)
assert said.returncode == 0, said.stderr
import late
print(late.value)
"""
"""pip in a sandbox, whose packages a process sees that was there before, as a template's kernels were."""
NASTY = 'it\'s "quoted" $HOME `id` \\n \\ #no <<EOF é'


@pytest.fixture
def served(tmp_path: Path) -> Iterator[PrivateIndex]:
    with private_index(tmp_path) as index:
        yield index


def builder(docker: Dockerd, served: PrivateIndex | None = None) -> ContainerImageBuilder:
    index = PackageIndex() if served is None else PackageIndex(url=served.url, certificate=served.certificate)
    return ContainerImageBuilder(engine=docker.engine, index=index, python_image=IMAGE)


def said(docker: Dockerd, image: str, *argv: str) -> str:
    return docker.docker("run", "--rm", "--network", "none", image, *argv)


async def test_what_is_declared_is_in_the_image_and_nothing_else(
    docker: Dockerd, served: PrivateIndex, tmp_path: Path
) -> None:
    """Packages, commands and variables, whatever letters they have; later packages take the place of earlier ones.

    Of the operator's index, its password and its certificate there is nothing in it.
    """
    image = (
        PLAIN.env(NASTY=NASTY)
        .pip_install(f"{PACKAGE}==1.0")
        .run(
            f"printf '%s' \"$NASTY\" > /made\necho {PACKAGE} is $(python -c 'import {PACKAGE} as p; print(p.version)')"
        )
        .pip_install(f"{PACKAGE}==2.0")
    )
    lines: list[str] = []
    building = builder(docker, served)
    try:
        built = await building.build(image, tell=lines.append)
        assert f"{PACKAGE} is 1.0" in "\n".join(lines)
        code = (
            f"import glob, json, os, {PACKAGE} as p; print(json.dumps([p.version, open('/made').read(), "
            "os.environ['NASTY'], len(glob.glob('/opt/venv/lib/*/site-packages/wctiny-*'))]))"
        )
        assert json.loads(said(docker, built.reference, built.python, "-c", code)) == ["2.0", NASTY, NASTY, 1]
        assert built.python == PYTHON
        assert await building.find(image.digest) == built
        nothing_of_the_operators(docker, served, built.reference, tmp_path / "image.tar")
    finally:
        await building.remove(image.digest)
    assert await building.find(image.digest) is None


def nothing_of_the_operators(docker: Dockerd, served: PrivateIndex, image: str, file: Path) -> None:
    """Neither index nor password nor certificate, in no layer, no history and no configuration of it."""
    docker.docker("save", "--output", str(file), image)
    whole = file.read_bytes()
    for secret in (PASSWORD.encode(), served.url.encode(), served.certificate.read_bytes().splitlines()[3]):
        assert secret not in whole
    history = docker.docker("history", "--no-trunc", image)
    assert "127.0.0.1" not in history
    assert "PIP_" not in docker.docker("inspect", image)


async def test_what_is_there_is_had_without_an_index(docker: Dockerd, served: PrivateIndex, places: Places) -> None:
    """The engine has it, so nothing is built and nothing is asked for; a name finds it for a sandbox's spec."""
    image = PLAIN.pip_install(f"{PACKAGE}==1.0")
    cache = ImageCache(places.state / "known", {"docker": builder(docker, served)})
    await cache.open()
    first = await cache.build(image, backend="docker", name="tiny")
    served.close()
    lines: list[str] = []
    again = await cache.build(image, backend="docker", tell=lines.append)
    assert (again.reference, lines) == (first.reference, [])
    spec = await cache.resolve(SandboxSpec(python="", image="tiny", backend="docker", preload=()), "docker")
    assert (spec.image, spec.python) == (first.reference, PYTHON)
    try:
        assert await run_in(docker, places, spec, f"import {PACKAGE} as p; print(p.version)") == "1.0"
        assert await run_in(docker, places, spec, INSTALL) == "42"
        docker.docker("create", "--name", "holds-it", first.reference, "true")
        with pytest.raises(ConflictError):
            await cache.remove("tiny")
        assert cache.info("tiny").reference == first.reference
        docker.docker("rm", "holds-it")
    finally:
        await cache.remove("tiny")


async def run_in(docker: Dockerd, places: Places, spec: SandboxSpec, code: str) -> str:
    paths = Paths(places.runtime, places.state, places.leases).make()
    sandbox_id = new_sandbox_id()
    directory = paths.sandboxes / sandbox_id
    directory.mkdir(mode=0o700)
    backend = DockerBackend(paths=paths, host=docker.host)
    instance = await backend.create(spec, sandbox_id=sandbox_id, directory=directory)
    try:
        channel = await GuestChannel.open(instance.run_directory)
        done = await channel.exec([spec.python, "-c", code], timeout=60)
        await channel.close()
    finally:
        await instance.stop()
        directory.rmdir()
    assert done.exit_code == 0, done.stderr
    return done.stdout.strip()


async def test_a_step_that_fails_is_shown_and_nothing_is_kept(docker: Dockerd) -> None:
    """The error has the step, its exit code and its output; no image has the name."""
    image = Image.from_registry(IMAGE).run("echo to stdout; echo to stderr >&2; exit 7")
    with pytest.raises(ImageBuildError) as caught:
        await builder(docker).build(image, tell=lambda line: None)
    assert caught.value.details["exit_code"] == 7
    assert {"to stdout", "to stderr"} <= set(str(caught.value.details["output"]).splitlines())
    assert await builder(docker).find(image.digest) is None


async def test_who_gives_up_ends_the_build(docker: Dockerd) -> None:
    """In the middle of a step: its container goes, and no image has the name."""
    image = Image.from_registry(IMAGE).run("echo begun; exec sleep 1000")
    begun = asyncio.Event()
    events = subprocess.Popen(
        ["docker", "--host", docker.host, "events", "--filter", "event=destroy", "--format", "{{.Type}}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        task = asyncio.create_task(
            builder(docker).build(image, tell=lambda line: begun.set() if line == "begun" else None)
        )
        async with asyncio.timeout(60):
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert events.stdout is not None
            assert await asyncio.to_thread(events.stdout.readline) == "container\n"
    finally:
        events.kill()
        events.communicate()
    assert docker.docker("ps", "--all", "--quiet") == ""
    assert await builder(docker).find(image.digest) is None


async def test_a_dockerfile_with_its_files_and_steps_above_it(docker: Dockerd, tmp_path: Path) -> None:
    """Contents, links and the right to be run arrive; what is ignored does not."""
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY . /context/\nENV A=1\n")
    (tmp_path / ".dockerignore").write_text("*.log\n")
    (tmp_path / "x.log").write_text("no")
    (tmp_path / "tool").write_text("#!/bin/sh\necho tool\n")
    (tmp_path / "tool").chmod(0o755)
    (tmp_path / "link").symlink_to("tool")
    image = Image.from_dockerfile(tmp_path / "Dockerfile", context_dir=tmp_path).run("/context/link > /made").env(B="2")
    building = builder(docker)
    built = await building.build(image, tell=lambda line: None)
    try:
        assert built.python == ""
        shown = said(docker, built.reference, "/bin/sh", "-c", "cat /made; ls /context; echo $A $B")
        assert shown.split() == ["tool", "Dockerfile", "link", "tool", "1", "2"]
    finally:
        await building.remove(image.digest)


async def test_a_dockerfile_is_built_again_with_no_step_of_the_first_time(docker: Dockerd, tmp_path: Path) -> None:
    """What lies above it begins with what was just built, for which no registry is asked."""
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /made\n")
    image = Image.from_dockerfile(tmp_path / "Dockerfile", context_dir=tmp_path).env(B="2")
    building = builder(docker)
    try:
        first = await building.build(image, tell=lambda line: None)
        again = await building.build(image, tell=lambda line: None, again=True)
        assert again.reference != first.reference
    finally:
        await building.remove(image.digest)
        docker.docker("image", "prune", "--force")


async def test_a_base_that_nobody_has_is_named(docker: Dockerd) -> None:
    """Where no registry can be asked the engine's own words are in the error."""
    with pytest.raises(ImageBuildError, match=r"no\.such\.example"):
        await builder(docker).build(Image.from_registry("no.such.example/image").run("true"), tell=lambda line: None)


def test_an_engines_full_disk_is_a_full_disk() -> None:
    """As engines and tools say it."""
    output = Output(lambda line: None)
    output.line("write /layer: no space left on device")
    assert isinstance(output.error("RUN", "The command returned a non-zero code: 1", exit_code=1), CapacityError)
