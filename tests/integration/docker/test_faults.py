"""What goes wrong with an engine is told right each time, and nothing stays behind."""

import asyncio
import json
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.engines import IMAGE, Dockerd
from tests.integration.docker.boxes import paths_of, subject_of
from tests.leaks import Places
from warmcell.sandbox.backends.docker import DockerBackend, volumes
from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.backends.docker.labels import SANDBOX, container_name
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    CapacityError,
    ConflictError,
    InvalidRequestError,
    SandboxStartError,
    WarmcellError,
)
from warmcell.sandbox.models import SandboxId, SandboxSpec

pytestmark = [
    pytest.mark.docker,
    # docker-py leaves the socket of a connection that was refused to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]
END_TIMEOUT_S = 30.0
NOT_SPOKEN = "1.99"
"""An API that the engine refuses, as a newer one does what an older one spoke."""


async def restarted(engine: Dockerd, *, live_restore: bool = False) -> None:
    await asyncio.to_thread(engine.start, live_restore=live_restore)


async def killed(engine: Dockerd) -> None:
    await asyncio.to_thread(engine.kill)


async def only(engine: Dockerd, *names: str) -> None:
    """Wait until there are no other containers: what was left is removed beside a start."""
    async with asyncio.timeout(60):
        while await asyncio.to_thread(containers, engine) != [*names]:
            pass


def containers(engine: Dockerd) -> list[str]:
    return [one.name for one in engine.engine.labelled(SANDBOX)]


async def test_a_sandbox_works_on_while_its_engine_is_gone(mortal: Dockerd, places: Places) -> None:
    """What talks with the guest needs no engine; a stop ends it all the same, and the next start removes its record."""
    subject = subject_of(places, mortal)
    async with subject.box() as box:
        await killed(mortal)
        assert await box.says("echo still there") == "still there"
        ended = await box.instance.stop()
        assert ended.exit_code == 137
        assert not box.instance.processes()
        with pytest.raises(BackendUnavailableError) as failed:
            await subject.create()
        assert "docker" in failed.value.hint
        await restarted(mortal)
        async with subject.box() as other:
            await only(mortal, container_name(SandboxId(other.directory.name)))


async def test_an_end_by_an_engine_that_comes_back_is_told(mortal: Dockerd, places: Places) -> None:
    """Without live-restore a restarted engine kills what runs: that is told, with nothing left."""
    subject = subject_of(places, mortal)
    async with subject.box() as box:
        await killed(mortal)
        await restarted(mortal)
        ended = await asyncio.wait_for(box.instance.wait(), END_TIMEOUT_S)
        assert ended.exit_code in (137, 143)  # It asks first, and kills what does not end.
        assert not ended.oom_killed


async def test_a_sandbox_stays_where_the_engine_takes_its_containers_over(mortal: Dockerd, places: Places) -> None:
    """With live-restore it runs on, and is ended as any other, as the engine that came back knows it."""
    subject = subject_of(places, mortal)
    await killed(mortal)
    await restarted(mortal, live_restore=True)
    async with subject.box() as box, subject.box() as other:
        await killed(mortal)
        await restarted(mortal, live_restore=True)
        assert await box.says("echo still there") == "still there"
        assert len(await asyncio.to_thread(containers, mortal)) == 2
        ended = await box.instance.stop()
        assert (ended.exit_code, ended.message) == (137, "")
        assert await asyncio.to_thread(containers, mortal) == [container_name(SandboxId(other.directory.name))]
        assert await other.says("echo as well") == "as well"


async def test_an_image_that_goes_while_a_sandbox_starts_is_named_with_its_cure(docker: Dockerd) -> None:
    """There is time between the look at it and the container."""
    with pytest.raises(InvalidRequestError, match="nobody/has:this") as failed:
        await asyncio.to_thread(docker.engine.create, "warmcell-none", {"Image": "nobody/has:this"})
    assert "docker pull" in failed.value.hint


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.15])
async def test_an_engine_that_is_killed_while_a_sandbox_starts_leaves_nothing(
    mortal: Dockerd, places: Places, delay_s: float
) -> None:
    """The start fails with the engine's absence as its reason, or has worked; afterwards there is nothing of it."""
    subject = subject_of(places, mortal)
    await (await subject.create()).stop()  # The image is known now.
    place = subject.place()
    start = asyncio.ensure_future(subject.create(place=place))
    await asyncio.sleep(delay_s)
    await killed(mortal)
    try:
        made = await start
    except WarmcellError as error:
        assert error.hint
    else:
        await made.stop()
    subject.nothing_is_left(*place)
    await restarted(mortal)
    await (await subject.create()).stop()
    await only(mortal)
    mortal.end_unstarted()


async def test_a_container_that_somebody_removes_is_told_to_be_gone(docker: Dockerd, places: Places) -> None:
    """Its sandbox has ended, and the reason is said."""
    subject = subject_of(places, docker)
    async with subject.box() as box:
        name = container_name(SandboxId(box.directory.name))
        await asyncio.to_thread(docker.docker, "rm", "--force", name)
        ended = await asyncio.wait_for(box.instance.wait(), END_TIMEOUT_S)
        assert (ended.exit_code, ended.message) == (137, "The container was removed by somebody else")


async def test_a_name_that_is_taken_is_a_conflict_and_its_container_stays(docker: Dockerd, places: Places) -> None:
    """Nobody else's container is removed for ours."""
    subject = subject_of(places, docker)
    sandbox_id, directory = subject.place()
    name = container_name(sandbox_id)
    await asyncio.to_thread(docker.docker, "create", "--name", name, IMAGE, "true")
    try:
        with pytest.raises(ConflictError, match=name):
            await subject.create(place=(sandbox_id, directory))
        assert name in await asyncio.to_thread(docker.docker, "ps", "--all", "--format", "{{.Names}}")
        subject.nothing_is_left(sandbox_id, directory)
    finally:
        await asyncio.to_thread(docker.docker, "rm", name)


async def test_an_image_that_is_not_there_is_named_with_its_cure(docker: Dockerd, places: Places) -> None:
    """Nothing is fetched behind anybody's back."""
    with pytest.raises(InvalidRequestError, match="nobody/has:this") as failed:
        await subject_of(places, docker).create(image="nobody/has:this")
    assert "docker pull nobody/has:this" in failed.value.hint


async def test_an_image_without_python_says_so(docker: Dockerd, places: Places, tmp_path: Path) -> None:
    """An image needs nothing of ours but a Python, and its lack is told before anything starts."""
    archive = tmp_path / "empty.tar"
    await asyncio.to_thread(_write_archive, archive)
    await asyncio.to_thread(docker.docker, "import", str(archive), "warmcell-test:empty")
    try:
        with pytest.raises(InvalidRequestError, match="has no interpreter python3"):
            await subject_of(places, docker).create(image="warmcell-test:empty", python="")
    finally:
        await asyncio.to_thread(docker.docker, "rmi", "warmcell-test:empty")


async def test_an_engine_that_is_not_there_is_told_with_its_cure(places: Places) -> None:
    """Neither a missing socket nor one of another machine is taken for an engine."""
    for host, words in ((f"unix://{places.root}/none", "listens"), ("tcp://192.0.2.1:2375", "not on this machine")):
        with pytest.raises(BackendUnavailableError, match=words) as failed:
            await asyncio.to_thread(Engine(host).info)
        assert failed.value.hint


async def test_an_engine_that_has_been_upgraded_is_asked_what_it_speaks(docker: Dockerd, places: Places) -> None:
    """Newer ones refuse the API that an older one spoke: starts go on as if nothing had been, and at most one other
    question fails.
    """
    subject = subject_of(places, docker)
    backend = subject.backend
    assert isinstance(backend, DockerBackend)
    engine = backend.engine
    known = await asyncio.to_thread(backend.fingerprint, subject.spec())
    engine._api = NOT_SPOKEN
    assert await asyncio.to_thread(backend.fingerprint, subject.spec()) == known
    await asyncio.to_thread(engine.info)
    engine._api, engine._said_at = NOT_SPOKEN, 0.0
    async with subject.box() as box:
        assert await box.says("echo up") == "up"
        engine._api = NOT_SPOKEN
        with pytest.raises(SandboxStartError, match="too new"):
            await asyncio.to_thread(engine.labelled, SANDBOX)
        assert len(await asyncio.to_thread(engine.labelled, SANDBOX)) == 1


async def test_a_runtime_that_the_engine_has_not_is_told_with_those_it_has(docker: Dockerd, places: Places) -> None:
    """A misspelt runtime is no other one."""
    from warmcell.sandbox.backends.docker import DockerBackend

    backend = DockerBackend(paths=paths_of(places).make(), host=docker.host, image=IMAGE, runtime="runk")
    sandbox_id, directory = subject_of(places, docker).place()
    with pytest.raises(BackendUnavailableError, match="runk") as failed:
        await backend.create(SandboxSpec(python=""), sandbox_id=sandbox_id, directory=directory)
    assert "runc" in failed.value.hint


async def test_an_image_whose_python_ends_at_once_is_a_failed_start(docker: Dockerd, places: Places) -> None:
    """What it has said is part of the error."""
    with pytest.raises((SandboxStartError, InvalidRequestError), match="/bin/cat"):
        await subject_of(places, docker).create(python="/bin/cat")


GOOD = json.dumps(
    {
        "version": [3, 12],
        "python": "/usr/local/bin/strange",
        "lacks": "",
        "user_site": True,
        "volumes": {},
        "filled": [],
        "links": [],
    }
)
STRANGE = """
FROM {image}
COPY strange /usr/local/bin/strange
"""


@pytest.mark.parametrize(
    "program",
    [
        "print([])",
        'import json; print(json.dumps({"version": "new", "python": 1}))',
        'import json; print(json.dumps({"version": [3, 12], "python": "/usr/bin/python3", "lacks": "", "volumes": 3}))',
        f"kept = bytearray(10**9); print({GOOD!r})",
    ],
)
async def test_an_image_whose_python_is_none_is_refused(
    docker: Dockerd, places: Places, tmp_path: Path, program: str
) -> None:
    """Whatever it says of itself, and however much memory it would take to say it."""
    (tmp_path / "Dockerfile").write_text(STRANGE.format(image=IMAGE))
    (tmp_path / "strange").write_text(f"#!/usr/bin/python3\n{program}\n")
    (tmp_path / "strange").chmod(0o755)
    await asyncio.to_thread(docker.docker, "build", "--quiet", "--tag", "warmcell-test:strange", str(tmp_path))
    try:
        with pytest.raises(InvalidRequestError, match="is no Python of use") as failed:
            await subject_of(places, docker).create(image="warmcell-test:strange", python="/usr/local/bin/strange")
        assert "docker run" in failed.value.hint
    finally:
        await asyncio.to_thread(docker.docker, "rmi", "--force", "warmcell-test:strange")


@pytest.mark.root
def test_what_the_host_lacks_is_not_told_as_the_engines_absence(
    docker: Dockerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its room for what an image has in a volume, nor what goes wrong once that is there."""
    name = "warmcell-test-volumes"
    docker.engine.create(name, {"Image": IMAGE, "Cmd": ["true"]})
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True, timeout=10)
    try:
        with (
            pytest.raises(OSError, match="of the host") as passed,
            volumes.taken(docker.engine, name, "/etc", most_bytes=2**24),
        ):
            raise OSError("of the host")
        assert type(passed.value) is OSError
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with (
            pytest.raises(CapacityError, match="no room in"),
            volumes.taken(docker.engine, name, "/usr/lib/python3.11", most_bytes=2**30),
        ):
            pass
    finally:
        subprocess.run(["umount", tmp_path], check=True, timeout=10)
        docker.engine.remove(name)


def _write_archive(path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(path, "w") as archive:
        for name in ("tmp", "home", "dev", "etc", "proc", "sys"):
            made = tarfile.TarInfo(name)
            made.type = tarfile.DIRTYPE
            archive.addfile(made, io.BytesIO())
