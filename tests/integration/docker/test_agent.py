"""Ordinary users who may use the engine, on a machine without a helper: a container that they start saves memory."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.server import end_keeper
from tests.conftest import OrdinaryUser
from tests.engines import IMAGE, PYTHON, Dockerd
from tests.integration.docker.boxes import paths_of
from tests.integration.helper.system import SystemHelper, User
from tests.integration.snapshots.notebooks import configure
from tests.leaks import Places
from warmcell.sandbox.backends.docker import DockerBackend
from warmcell.sandbox.backends.docker.labels import SANDBOX
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.snapshots.agent import IMAGES_VARIABLE, AgentHelper

pytestmark = [pytest.mark.docker, pytest.mark.criu, pytest.mark.user, pytest.mark.timeout(240)]

SHORT_S = 20.0
"""Less than any request to an engine may take."""
WISHES = {"backend": "docker", "image": IMAGE, "python": PYTHON}


@pytest.fixture
def user(places: Places, ordinary_user: OrdinaryUser, mortal: Dockerd) -> Iterator[User]:
    """Somebody in the group of the engine; nobody has started a helper."""
    absent = SystemHelper(places)
    made = User(ordinary_user, absent)
    made.env[IMAGES_VARIABLE] = str(absent.images)
    configure(made.places, docker_host=mortal.host)
    let_in(made, mortal)
    yield made
    end_keeper(made.places)


def let_in(user: User, engine: Dockerd) -> None:
    """As who is in the engine's group."""
    os.chown(engine.host.removeprefix("unix://"), user.uid, -1)


async def test_memory_is_saved_by_an_agent_that_can_be_killed(user: User, mortal: Dockerd) -> None:
    """Suspended, resumed, restored and forked as with a helper; another agent comes where one was killed, one that runs
    needs no engine, and none outlives its keeper.
    """
    await asyncio.to_thread(mortal.stop)
    await asyncio.to_thread(mortal.start, live_restore=True)
    let_in(user, mortal)
    folder = user.folder("w")
    told = {"workspace": str(folder), "spec": WISHES, "host": mortal.host}
    said = await user.run("kernel", told=told, timeout=200)
    assert said[2:] == [
        *(str(user.uid), "suspended", "42 kept!", "suspended", "43 kept!!"),
        *("0", "43", "44 False", "44 False", "[43, 44]", "3145728 [True]"),
    ]
    process = await user.start("agent")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(told).encode())
    process.stdin.write_eof()
    heard: list[Any] = []
    async with asyncio.timeout(200):
        async for line in process.stdout:
            heard.append(json.loads(line))
            if heard[-1] == "kill the engine":
                await asyncio.to_thread(mortal.kill)
                (folder / "killed").touch()
            elif heard[-2:] == ["kill the engine", "suspended"]:
                await asyncio.to_thread(mortal.start, live_restore=True)
                let_in(user, mortal)
                (folder / "back").touch()
        assert await process.wait() == 0
    assert heard == [
        [["docker", "an agent container"]],
        *("suspended", "41", True),
        *("kill the engine", "suspended", "42"),
        *(True, []),
    ]


async def test_a_start_that_somebody_gives_up_goes_on(mortal: Dockerd, places: Places) -> None:
    """An engine may take longer than who asks has time; who asks next finds what was begun, and only that."""
    paths = paths_of(places).make()
    helper = AgentHelper(paths, DockerBackend(paths=paths, host=mortal.host), quiet=True)
    try:
        with mortal.paused():
            began = time.monotonic()
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(helper.connect(), 0.3)
            assert time.monotonic() - began < SHORT_S
        (await helper.connect()).close()
        names = [one.name for one in await asyncio.to_thread(mortal.engine.labelled, SANDBOX)]
        assert len(names) == 1
        assert names[0].startswith("warmcell-agent-")
    finally:
        await helper.close()
    assert await asyncio.to_thread(mortal.engine.labelled, SANDBOX) == []


async def test_a_system_that_refuses_is_a_reason_with_a_cure(places: Places) -> None:
    """As when there is no room for a socket: it is told as an engine's refusal is, and never passes as it is."""
    paths = paths_of(places)
    helper = AgentHelper(paths, DockerBackend(paths=paths, host=f"unix://{places.root}/none"), quiet=True)
    places.runtime.rmdir()
    with pytest.raises(BackendUnavailableError, match="no agent can be started") as refused:
        await helper.connect()
    assert "warmcell helper install" in refused.value.hint
    places.runtime.mkdir(mode=0o700)
