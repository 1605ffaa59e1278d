"""Containers outlive their keeper, and the next one, or `warmcell clean`, removes them."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from tests.engines import IMAGE, Dockerd
from tests.integration.docker.boxes import paths_of, subject_of
from tests.lanes import TOP
from tests.leaks import Places
from warmcell.extension.cleaning import Cleaning
from warmcell.sandbox.backends.docker import DockerBackend, empty
from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.backends.docker.labels import IMAGE as IMAGE_LABEL
from warmcell.sandbox.backends.docker.labels import KEEPER, OWNER, SANDBOX, is_orphan, ours
from warmcell.sandbox.backends.docker.orphans import remember, remove_orphans
from warmcell.sandbox.backends.leftovers import clean_leftovers
from warmcell.sandbox.errors import OperationTimeoutError
from warmcell.sandbox.models import SandboxId

pytestmark = pytest.mark.docker
TIMEOUT_S = 60.0
LABEL = f"label={IMAGE_LABEL}=warmcell-empty"


async def _orphan(docker: Dockerd, places: Places) -> int:
    """pid of the first process of a sandbox whose keeper was killed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.docker.keeper", docker.host), stdout=asyncio.subprocess.PIPE, cwd=TOP
    )
    assert process.stdout is not None
    pid = int(await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S))
    process.send_signal(signal.SIGKILL)
    await process.wait()
    process._transport.close()  # type: ignore[attr-defined]
    os.kill(pid, 0)
    return pid


@pytest.mark.parametrize("cleans", ["the next keeper", "warmcell clean"])
async def test_a_container_whose_keeper_was_killed_is_removed(docker: Dockerd, places: Places, cleans: str) -> None:
    """It is found by its labels; one whose keeper lives stays."""
    paths = paths_of(places).make()
    pid = await _orphan(docker, places)
    async with subject_of(places, docker).box() as mine:
        if cleans == "the next keeper":
            removed = await asyncio.to_thread(clean_leftovers, paths)
        else:
            removed = list((await asyncio.to_thread(Cleaning(paths).clean)).removed)
        assert sum("container warmcell-" in line for line in removed) == 1
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert await mine.says("echo alive") == "alive"
        assert len(await asyncio.to_thread(docker.engine.labelled, SANDBOX)) == 1


async def test_a_container_that_cannot_be_removed_keeps_no_other(
    docker: Dockerd, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those of keepers that were killed, nor a start, which does not wait for what an earlier one has left."""
    paths = paths_of(places).make()
    gone = {**ours(SandboxId("x")), KEEPER: ours(SandboxId("x"))[KEEPER] + "0"}
    for name in ("warmcell-stuck", "warmcell-left", "warmcell-also"):
        await asyncio.to_thread(docker.engine.create, name, {"Image": IMAGE, "Cmd": ["true"], "Labels": gone})
    really = Engine.remove

    def remove(engine: Engine, container: str) -> None:
        if container in (stuck, "warmcell-stuck"):
            raise OperationTimeoutError("it is being removed")
        really(engine, container)

    made = await asyncio.to_thread(docker.engine.labelled, SANDBOX)
    (stuck,) = (one.id for one in made if one.name == "warmcell-stuck")
    subject = subject_of(places, docker)
    assert isinstance(subject.backend, DockerBackend)
    subject.backend._left |= {"warmcell-stuck", "warmcell-also"}
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "remove", remove)
        async with subject.box() as box:
            assert await box.says("echo up") == "up"
        assert subject.backend._clearing is not None
        await subject.backend._clearing
        assert subject.backend._left == {"warmcell-stuck"}
        assert await asyncio.to_thread(remove_orphans, paths) == ["container warmcell-left"]
    assert await asyncio.to_thread(remove_orphans, paths) == ["container warmcell-stuck"]


async def test_leftovers_are_removed_without_the_engine_as_well(docker: Dockerd, places: Places) -> None:
    """An engine that is away stops nothing else from being cleaned."""
    paths = paths_of(places).make()
    (paths.state / "engines").write_text(f"unix://{places.root}/none\n")
    (paths.sandboxes / "left").mkdir()
    assert await asyncio.to_thread(clean_leftovers, paths) == [f"run directory {paths.sandboxes / 'left'}"]


async def test_the_image_of_agents_is_removed_when_no_container_is_of_it(docker: Dockerd, places: Places) -> None:
    """By `warmcell clean` alone; it says by its label whose it is, and is made again when it is needed."""
    paths = paths_of(places).make()
    remember(paths, docker.host)
    for _ in range(2):
        image = await asyncio.to_thread(empty.image, docker.engine)
        assert await asyncio.to_thread(docker.docker, "images", "--quiet", "--no-trunc", "--filter", LABEL) == image
        name = "warmcell-test-agent"
        await asyncio.to_thread(docker.engine.create, name, {"Image": image, "Cmd": ["none"]})
        assert (await asyncio.to_thread(Cleaning(paths).clean)).removed == ()
        await asyncio.to_thread(docker.engine.remove, name)
        assert await asyncio.to_thread(clean_leftovers, paths) == []
        assert (await asyncio.to_thread(Cleaning(paths).clean)).removed == ("image warmcell-empty:1",)
        assert await asyncio.to_thread(docker.docker, "images", "--quiet", "--filter", LABEL) == ""


async def test_an_image_that_is_only_called_so_is_not_used(docker: Dockerd) -> None:
    """What somebody else has given its name would bring variables and volumes into a container with root's rights."""
    for change in ("ENV LD_PRELOAD=/host/tmp/evil.so", "VOLUME /host/usr", "LABEL other=label"):
        await asyncio.to_thread(
            subprocess.run,
            ["docker", "--host", docker.host, "import", "--change", change, "-", empty.CALLED],
            input=empty.ARCHIVE,
            check=True,
            capture_output=True,
        )
        foreign = await asyncio.to_thread(docker.engine.image_id, empty.CALLED)
        made = await asyncio.to_thread(empty.image, docker.engine)
        assert made != foreign
        assert await asyncio.to_thread(empty.image, docker.engine) == made
        await asyncio.to_thread(docker.docker, "rmi", foreign)
    assert await asyncio.to_thread(empty.remove, docker.engine)
    assert not await asyncio.to_thread(empty.remove, docker.engine)


def test_whose_a_container_is() -> None:
    """Neither a living keeper's nor another user's is an orphan, nor one that says nothing."""
    labels = dict(ours(SandboxId("x")))
    assert not is_orphan(labels)
    assert not is_orphan({})
    assert not is_orphan({**labels, KEEPER: "garbage"})
    assert is_orphan({**labels, KEEPER: labels[KEEPER].replace(".", ".9", 1)})
    assert is_orphan({**labels, KEEPER: labels[KEEPER] + "0"})
    assert not is_orphan({**labels, KEEPER: labels[KEEPER] + "0", OWNER: "12345"})
