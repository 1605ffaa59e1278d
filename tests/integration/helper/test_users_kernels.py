"""Ordinary users' kernels, made and saved through the machine's helper."""

import asyncio
import json
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import end_keeper
from tests.conftest import OrdinaryUser
from tests.engines import IMAGE, PYTHON, Dockerd
from tests.integration.bubblewrap.halting import halted, halting
from tests.integration.helper import system
from tests.integration.helper.system import MOST, SystemHelper, User
from tests.integration.snapshots.notebooks import configure
from tests.leaks import Places, own_places

pytestmark = [pytest.mark.user, pytest.mark.criu]


@pytest.fixture
def wishes(user: User, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """What a kernelspec would say of a sandbox of the kind that the test is for."""
    if request.param != "docker":
        yield {}
        return
    containers: Dockerd = request.getfixturevalue("docker")
    configure(user.places, docker_host=containers.host)
    socket = Path(containers.host.removeprefix("unix://"))
    before = socket.stat().st_uid
    os.chown(socket, user.uid, -1)  # As who is in the group of the engine.
    yield {"backend": "docker", "image": IMAGE, "python": PYTHON}
    end_keeper(user.places)
    os.chown(socket, before, -1)


@pytest.mark.parametrize("wishes", ["bubblewrap", pytest.param("docker", marks=pytest.mark.docker)], indirect=True)
async def test_a_users_kernel_is_suspended_resumed_restored_and_forked(user: User, wishes: dict[str, Any]) -> None:
    """All that root's kernels can an ordinary user's can, with limits that hold."""
    said = await user.run("kernel", told={"workspace": str(user.folder("w")), "spec": wishes}, timeout=300)
    enforced = said[1]["limits"]
    assert enforced == {"memory": True, "pids": True, "cpu": True, "layer": True}
    assert said[2:] == [
        str(user.uid),
        "suspended",
        "42 kept!",
        "suspended",
        "43 kept!!",
        "0",
        "43",
        "44 False",
        "44 False",
        "[43, 44]",
        "3145728 [True]",
    ]


@pytest.mark.parametrize("snapshots", ["auto", "none"])
async def test_what_a_user_writes_has_the_users_umask(user: User, snapshots: str) -> None:
    """In kernels of the helper's sandboxes, in those of a nest, and in such as come from a template or from memory."""
    configure(user.places, snapshots=snapshots, prepared=1)
    told = {"workspace": str(user.folder("w")), "umask": 0o027, "saves": snapshots == "auto"}
    said = await user.run("written", told=told, timeout=300)
    assert said[1:] == [["template", "template"], *["640 640 750"] * (3 if told["saves"] else 2)]


@pytest.mark.timeout(620)
async def test_the_contract_holds_for_sandboxes_of_the_helper(ordinary_user: OrdinaryUser, user: User) -> None:
    """They keep every promise that a user's own sandboxes keep."""
    process = await asyncio.create_subprocess_exec(
        *user.python("-m", "warmcell.sandbox.testing.contract", "helped"),
        stdout=asyncio.subprocess.PIPE,
        env=dict(user.env),
        cwd="/",
    )
    stdout, _ = await asyncio.wait_for(process.communicate(), 600)
    results = [json.loads(line) for line in stdout.splitlines()]
    broken = [f"{result['check']}: {result['why']}" for result in results if not result["ok"]]
    assert not broken, "\n".join(broken)
    assert len(results) >= 60


async def test_two_users_at_once(helper: SystemHelper, user: User) -> None:
    """Each has sandboxes of their own, and neither sees, saves, fills or ends those of the other."""
    with own_places(owner=user.uid + 1) as places:
        home = places.root / "home"
        home.mkdir()
        os.chown(home, user.uid + 1, user.uid + 1)
        env = {**user.env, **places.env, "HOME": str(home)}
        other = User(OrdinaryUser(user.uid + 1, places, home, env), helper)
        mine, theirs = await asyncio.gather(
            *(one.start_box({"wait": True, "scripts": ["id -u; ls /proc | grep -c '^[0-9]'"]}) for one in (user, other))
        )
        assert [mine.said[0]["out"].split()[0], theirs.said[0]["out"].split()[0]] == [str(user.uid), str(other.uid)]
        first = os.pidfd_open(mine.pid)
        try:
            for request in ({"op": "enroll"}, {"op": "dump", "image": "a" * 12, "pid": 2, "then": "stop"}):
                answer = await helper.ask(request, first, uid=other.uid)
                assert answer["code"] == "sandbox_not_found", answer
            answer = await helper.ask({"op": "restore", "image": "a" * 12}, first, uid=other.uid)
            assert answer["code"] == "sandbox_not_found", answer
            assert (await helper.ask({"op": "enroll"}, first, uid=user.uid))["ok"]
        finally:
            os.close(first)
        await mine.hang_up()
        assert Path(f"/proc/{theirs.pid}").exists()
        await theirs.hang_up()


async def test_the_end_of_the_helper_ends_its_sandboxes(helper: SystemHelper, user: User) -> None:
    """Killed with SIGKILL, nothing of a sandbox is left, and its keeper says who had made it."""
    box = await user.start_box({"wait": True, "scripts": ["sleep 300 >/dev/null 2>&1 & echo $!"]})
    assert helper.end(signal.SIGKILL) == -signal.SIGKILL
    ended = await box.line()
    assert ended["ended"] == 137
    assert "helper" in ended["message"]
    await box.hang_up()


async def test_the_end_of_the_keeper_ends_its_sandboxes(helper: SystemHelper, user: User) -> None:
    """Killed with SIGKILL, nothing of its sandboxes is left, and the helper serves the next one."""
    box = await user.start_box({"wait": True, "scripts": ["sleep 300 >/dev/null 2>&1 & echo $!"]})
    box.kill()
    await box.hang_up()
    assert (await user.run("box", told={"scripts": ["true"]}))[1]["code"] == 0


async def test_what_is_being_made_ends_with_who_makes_it(
    helper: SystemHelper, user: User, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is killed with SIGKILL while bubblewrap's inner process waits for the outer one, and neither is left."""
    assert helper.end() == 0
    with halting(places.root) as program:
        monkeypatch.setattr(system, "bwrap", lambda: program)
        helper.start()
        asking = await user.start("box")
        assert asking.stdin is not None
        asking.stdin.write(b"{}")
        asking.stdin.write_eof()
        pids = await halted(os.getpid())
        maker = int(Path(f"/proc/{pids[0]}/status").read_text().partition("PPid:")[2].split()[0])
        handles = [os.pidfd_open(pid) for pid in pids]
        try:
            os.kill(maker, signal.SIGKILL)
            assert (await asyncio.to_thread(select.select, handles[:1], [], [], 60))[0]
            assert select.select(handles, [], [], 0)[0] == handles
        finally:
            for handle in handles:
                os.close(handle)
            await asking.communicate()
            assert helper.end() == 0
            helper.start()  # It removes the control group.
            assert helper.end() == 0


async def test_a_stop_of_the_helper_ends_its_sandboxes(helper: SystemHelper, user: User) -> None:
    """As a service is stopped: SIGTERM ends what it holds, and nothing is left."""
    box = await user.start_box({"wait": True, "scripts": ["true"]})
    assert helper.end() == 0
    await box.hang_up()


async def test_a_user_has_as_many_as_one_may_have(helper: SystemHelper, user: User) -> None:
    """The next one is refused with its cure, and can be had when one has ended."""
    boxes = [await user.start_box({"wait": True}) for _ in range(MOST)]
    (said,) = await user.run("asked", told={"workspace": str(user.folder("w")), "cases": [{}]})
    assert said["code"] == "capacity"
    assert said["hint"]
    await boxes[0].hang_up()
    (said,) = await user.run("asked", told={"workspace": str(user.home / "w"), "cases": [{}]})
    assert said["ok"], said
    for box in boxes[1:]:
        await box.hang_up()
