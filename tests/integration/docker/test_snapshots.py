"""Kernels in containers are saved, brought back, put back and forked like any other."""

import asyncio
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import end_keeper
from tests.engines import IMAGE, Dockerd
from tests.integration.docker.boxes import paths_of, subject_of
from tests.integration.snapshots.notebooks import clones, end_all, keeper, notebook, page
from tests.integration.snapshots.test_faults_storage import gone
from tests.integration.snapshots.test_fork import FORK, PART
from tests.integration.snapshots.test_host_name import NAME
from tests.integration.snapshots.test_warm_pool import says, started, templates, until_prepared, until_renewed
from tests.lanes import ordinary_uid
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import BackendUnavailableError, InvalidRequestError, WarmcellError

pytestmark = [pytest.mark.docker, pytest.mark.criu, pytest.mark.timeout(240)]

WAIT_S = 60.0
MOVING = "warmcell-test:moving"
OURS: dict[str, Any] = {"backend": "docker", "image": IMAGE, "python": ""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A workspace of somebody who is let into a container."""
    os.chown(tmp_path, ordinary_uid(), ordinary_uid())
    return tmp_path


@pytest.fixture(autouse=True)
def ended(places: Places, docker: Dockerd) -> Iterator[None]:
    """The keeper ends before its containers are looked for, and before its engine is back for other tests."""
    yield
    end_keeper(places)


def containers(docker: Dockerd) -> list[str]:
    """All that there are, whether they run or not."""
    return docker.docker("ps", "--all", "--quiet", "--no-trunc").split()


HOLDS = """
import os, subprocess, threading
private = [open(path, "w+") for path in ("/tmp/kept", "/dev/shm/kept", os.path.expanduser("~/kept"))]
shared = open("kept", "w+")
for each in (*private, shared): each.write("0123456789"); each.flush(); each.seek(4)
child = subprocess.Popen(["cat"], stdin=-1, stdout=-1, text=True, bufsize=1)
ticks, count = 0, 0
def tick():
    global ticks
    while True: ticks += 1; stopped.wait(0.005)
stopped = threading.Event(); threading.Thread(target=tick, daemon=True).start()
"""
LOOK = """
count += 1
seen = ticks
while ticks < seen + 3: stopped.wait(0.005)
child.stdin.write(f"{count}\\n")
print(count, child.stdout.readline().strip(), [each.read(1) for each in (*private, shared)])
"""


async def test_what_it_holds_goes_on(places: Places, docker: Dockerd, folder: Path) -> None:
    """Memory, threads, children and open files, again and again, in the next keeper too; containers go each time."""
    async with keeper(places, docker_host=docker.host) as client, notebook(client, folder, **OURS) as made:
        assert await made.run(HOLDS) == ""
        for turn in range(1, 4):
            assert await made.run(LOOK) == f"{turn} {turn} {4 * [str(turn + 3)]}"
            had = containers(docker)
            await made.do("suspend")
            assert (await made.info())["state"] == "suspended"
            assert not set(had) & set(containers(docker))
        await made.run("x = 1; private[0].seek(0); private[0].write('then'); private[0].flush()")
        assert (await made.run("%snapshot then")).startswith("Snapshot then ")
        await made.run("x = 2; private[0].write(' and more'); private[0].flush()")
        await made.do("restore", snapshot="then")
        assert await made.run("print(x, open('/tmp/kept').read()[:6])") == "1 then45"
        name = await made.run(NAME)
        assert name.endswith(" True")
        await made.until_idle()
        await made.do("suspend")
        await gone(client, signum=15)
        assert containers(docker) == []
        async with await KeeperClient.connect() as second, page(made.body["connection"]) as opened:
            assert await opened.run("print(x, open('/tmp/kept').read()[:6], child.poll())") == "1 then45 None"
            assert await opened.run(NAME) == name
            await end_all(second)


async def test_a_kernel_forks_itself_and_is_forked(places: Places, docker: Dockerd, folder: Path) -> None:
    """Clones go on in the cell, with randomness, names and files of their own, those of the folder included."""
    async with keeper(places, docker_host=docker.host) as client, notebook(client, folder, **OURS) as made:
        assert await made.run(FORK) == "said before\nTrue 4 4"
        await made.run("[each.kill() for each in f.clones]; mine = 0")
        assert len(containers(docker)) == 1
        said = await made.run(f"%%remote fork n=2 get=part\n{PART}")
        assert said.startswith("Remote: 2 clones of this kernel, forked in "), said
        assert await made.run("print(sum(part) == sum(data))") == "True"
        assert len(containers(docker)) == 1
        await made.run("files = [open(path, 'w+') for path in ('/tmp/mine', 'ours')]")
        await made.run("for each in files: each.write('by'); each.flush()")
        look = "print(mine, open('/tmp/mine').read(), open('ours').read())"
        async with clones(made, 2) as forked:
            for number, each in enumerate((made, *forked)):
                await each.run(f"mine += {number}\nfor each in files: each.write(' {number}'); each.flush()")
            for number, each in enumerate((made, *forked)):
                assert await each.run(look) == f"{number} by {number} by {number}"
            await forked[0].do("suspend")
            assert await forked[0].run(look) == "1 by 1 by 1"
            assert (folder / "ours").read_text() == "by 0"
            for each in forked:
                await client.delete(f"/kernels/{each.kernel_id}")
        assert len(containers(docker)) == 1


@pytest.fixture
def moving(docker: Dockerd) -> Iterator[str]:
    """A name of the test image that a test may give to another one."""
    docker.docker("tag", IMAGE, MOVING)
    yield MOVING
    docker.docker("rmi", "--force", MOVING)


def renew(docker: Dockerd, name: str) -> None:
    """Have another image be called so, with a variable in it."""
    made = docker.docker("create", IMAGE, "true")
    docker.docker("commit", "--change", "ENV RENEWED=yes", made, name)
    docker.docker("rm", made)


async def test_starts_and_restarts_come_from_a_template(
    places: Places, docker: Dockerd, folder: Path, moving: str
) -> None:
    """Prepared in a container, or restored in the one that has files; never from a template of an older image."""
    spec = {**OURS, "image": moving, "preload": ["decimal"]}
    look = "import os; print('x' in globals(), os.path.exists('/tmp/left'), os.environ.get('RENEWED'))"
    async with keeper(places, docker_host=docker.host, prepared=1) as client, notebook(client, folder, **spec):
        await until_prepared(client, 1)
        info, asked = await started(client, folder, **spec)
        assert (info["started_from"], "pool" in info["phases_ms"]) == ("template", True)
        assert await says(asked, "import sys; print('decimal' in sys.modules)") == "True"
        for files, step in (("", "pool"), ("left = open('/tmp/left', 'w')", "restore")):
            await until_prepared(client, 1)
            assert await says(asked, f"x = 1; {files}") == ""
            await client.post(f"/kernels/{asked['kernel_id']}/end", {"grace_s": 0})
            info = await client.post("/kernels", asked, timeout=120)
            assert (info["started_from"], step in info["phases_ms"]) == ("template", True)
            assert await says(asked, look) == f"False {bool(files)} None"
        await until_prepared(client, 1)
        (before,) = await templates(client)
        renew(docker, moving)
        info, asked = await started(client, folder, **spec)
        assert info["started_from"] == "cold"
        assert await says(asked, look) == "False False yes"
        await until_renewed(client, before)
        info, asked = await started(client, folder, **spec)
        assert info["started_from"] == "template"
        assert await says(asked, look) == "False False yes"


async def until_there_are(count: int, engine: Dockerd, *, unless: "asyncio.Task[object] | None" = None) -> None:
    """Wait until there are so many containers, or a task has ended."""
    async with asyncio.timeout(WAIT_S):
        while len(await asyncio.to_thread(containers, engine)) != count:
            if unless is not None and unless.done():
                return
            await asyncio.sleep(0.01)


async def until_it_is_saved(places: Places, *, unless: "asyncio.Task[object]") -> None:
    """Wait until a snapshot is in the making, or all of it is made."""
    store = paths_of(places).snapshots
    async with asyncio.timeout(WAIT_S):
        while not unless.done():
            if await asyncio.to_thread(lambda: [*store.glob(".*/layer")]):
                return
            await asyncio.sleep(0.002)


async def test_an_engine_that_is_gone_loses_no_kernel(places: Places, mortal: Dockerd, folder: Path) -> None:
    """It is saved without, also where the engine goes meanwhile; what needs a container fails by name and changes
    nothing, and works when it is back.
    """
    for step in (mortal.kill, partial(mortal.start, live_restore=True)):
        await asyncio.to_thread(step)
    async with keeper(places, docker_host=mortal.host) as client, notebook(client, folder, **OURS) as made:
        await made.run("import os; x = 1; much = os.urandom(100_000_000)")
        saving = asyncio.create_task(made.run("%snapshot then"))
        await until_it_is_saved(places, unless=saving)
        await asyncio.to_thread(mortal.kill)
        assert (await saving).startswith("Snapshot then ")
        assert (await made.info())["state"] == "running"
        await made.run("x = 2")
        with pytest.raises(BackendUnavailableError, match="engine"):
            await made.do("restore", snapshot="then")
        assert await made.run("print(x)") == "2"
        await made.until_idle()
        await made.do("suspend")
        with pytest.raises(BackendUnavailableError, match="engine"):
            await made.do("resume")
        assert (await made.info())["state"] == "suspended"
        await asyncio.to_thread(mortal.start, live_restore=True)
        assert await made.run("print(x)") == "2"
        await until_there_are(1, mortal)

        restoring = asyncio.create_task(made.do("restore", snapshot="then"))
        await until_there_are(2, mortal, unless=restoring)
        await asyncio.to_thread(mortal.kill)
        (failed,) = await asyncio.gather(restoring, return_exceptions=True)
        x = await made.run("print(x)")
        assert x == "2" if isinstance(failed, WarmcellError) else x == "1", failed
        await asyncio.to_thread(mortal.start, live_restore=True)
        await made.do("restore", snapshot="then")
        assert await made.run("print(x)") == "1"
        await until_there_are(1, mortal)


# docker-py leaves the socket of a connection that was refused to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
async def test_an_image_is_the_one_it_was_while_the_engine_is_away(mortal: Dockerd, places: Places) -> None:
    """Its kernels start anew from their template; of one that was never asked for nothing is known."""
    subject, other = subject_of(places, mortal), subject_of(places, mortal)
    spec = subject.spec()
    known = await asyncio.to_thread(subject.backend.fingerprint, spec)
    await asyncio.to_thread(mortal.kill)
    assert await asyncio.to_thread(subject.backend.fingerprint, spec) == known
    with pytest.raises(BackendUnavailableError):
        await asyncio.to_thread(other.backend.fingerprint, spec)
    await asyncio.to_thread(mortal.start)
    with pytest.raises(InvalidRequestError, match="nobody/has:this"):
        await asyncio.to_thread(subject.backend.fingerprint, subject.spec(image="nobody/has:this"))
