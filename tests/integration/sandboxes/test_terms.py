"""How sandboxes are found, how they end or sleep when their time is over, and copies of their memory."""

import asyncio
import concurrent.futures
import contextlib
import os
import select
import time

import pytest

from tests.leaks import Places, own_places
from warmcell import Sandbox
from warmcell.sandbox import errors
from warmcell.sandbox.client.keeper import KeeperClient, SyncKeeperClient

pytestmark = pytest.mark.bubblewrap


def test_sandboxes_are_found_by_their_tags_page_by_page(at_home: None) -> None:
    """Tags select, pages follow each other without a gap, and tags can be changed."""
    with (
        Sandbox(preload=(), tags={"job": "7", "n": "0"}) as one,
        Sandbox(preload=(), tags={"job": "7", "n": "1"}) as two,
    ):
        assert [info.id for info in Sandbox.list(tags={"job": "7"})] == [one.id, two.id]
        assert [info.id for info in Sandbox.list(tags={"job": "7", "n": "1"})] == [two.id]
        with SyncKeeperClient.connect() as keeper:
            first = keeper.get("/sandboxes?tag=job%3D7&limit=1")
            second = keeper.get(f"/sandboxes?tag=job%3D7&limit=1&after={first['next']}")
        assert [page["sandboxes"][0]["id"] for page in (first, second)] == [one.id, two.id]
        assert second["next"] is None
        two.set_tags({"job": "8"})
        assert [info.id for info in Sandbox.list(tags={"job": "8"})] == [two.id]
        assert [info.id for info in Sandbox.list(tags={"job": "8"}, states=["running", "suspended"])] == [two.id]
        assert Sandbox.list(tags={"job": "8"}, states=["suspended"]) == []


@pytest.mark.parametrize("query", ["state=asleep", "state=running,on", "limit=0", "limit=x", "after=x"])
def test_a_list_that_makes_no_sense_is_refused(at_home: None, query: str) -> None:
    """Also where there is nothing that could be in it: whoever mistypes a state would think that there is none."""
    with SyncKeeperClient.connect() as keeper, pytest.raises(errors.InvalidRequestError):
        keeper.get(f"/sandboxes?tag=none%3Dthere&{query}")


def test_tags_that_several_change_at_once_are_all_there(at_home: None) -> None:
    """Each says what it changes, and nothing of the others'."""
    with Sandbox(preload=(), tags={"gone": "0", "kept": "1"}) as box:
        names = [f"n{number}" for number in range(40)]
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda name: box.merge_tags({name: name, "gone": None}), names))
        assert box.info().terms is not None
        assert box.info().terms.tags == {"kept": "1", **{name: name for name in names}}


def gone(sandbox_id: str) -> bool:
    return sandbox_id not in [info.id for info in Sandbox.list(owner="")]


def state_of(box: Sandbox, wanted: str) -> None:
    """Wait for a state."""
    deadline = time.monotonic() + 60
    while box.info().state != wanted:
        assert time.monotonic() < deadline, box.info()
        time.sleep(0.02)


def test_one_that_is_to_be_killed_is_gone_in_time(at_home: None) -> None:
    """After its time nothing of it is left; to kill it twice is nothing."""
    with Sandbox(preload=(), timeout=60, on_timeout="kill") as box:
        box.set_timeout(0.3)
        deadline = time.monotonic() + 60
        while not gone(box.id):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(errors.SandboxNotFoundError):
            box.run("1")
        box.kill()


@pytest.mark.criu
def test_one_whose_time_is_over_sleeps_and_wakes_by_use(at_home: None) -> None:
    """Memory and files are as they were; commands have ended and say why; its time begins anew."""
    with Sandbox(preload=(), timeout=60) as box:
        box.run("x = [1, 2]")
        box.files.write("kept", "yes")
        command = box.spawn("sleep", "600")
        box.set_timeout(0.3)
        state_of(box, "suspended")
        with pytest.raises(errors.ConflictError, match="suspended"):
            command.wait()
        box.set_timeout(1)
        with pytest.raises(errors.ConflictError, match="suspended"):  # Nobody is left waiting for what sleeps.
            box.run("import time\nfor _ in range(200): time.sleep(0.01)")
        box.set_timeout(60)  # It begins with its next use.
        assert box.run("x + [3]").text == "[1, 2, 3]"
        assert box.files.read("kept") == b"yes"
        terms = box.info().terms
        assert terms is not None
        assert terms.ends_at is not None
        assert terms.ends_at > time.time() + 30


@pytest.mark.criu
def test_without_auto_resume_it_sleeps_until_it_is_resumed(at_home: None) -> None:
    """Use is a conflict, before anything is done."""
    with Sandbox(preload=(), auto_resume=False) as box:
        box.suspend()
        for use in (lambda: box.run("1"), lambda: box.exec("true"), lambda: box.files.read("x")):
            with pytest.raises(errors.ConflictError):
                use()
        assert box.info().state == "suspended"
        box.resume()
        assert box.run("1").text == "1"


@pytest.mark.criu
def test_copies_have_the_memory_and_go_their_own_ways(at_home: None) -> None:
    """Forks share what was, not what comes; a snapshot is gone back to, and started from, contexts included."""
    with Sandbox(preload=(), tags={"a": "b"}) as box:
        context = box.create_context()
        box.run("x = 1")
        box.run("x = 'other'", context=context)
        box.files.write("file", "1")
        with contextlib.ExitStack() as stack:
            clones = [stack.enter_context(clone) for clone in box.fork(2)]
            for number, clone in enumerate(clones):
                clone.run(f"x += {number + 1}")
                clone.files.write("file", f"clone {number}")
            assert [clone.run("x").text for clone in clones] == ["2", "3"]
            assert [clone.run("x", context=context).text for clone in clones] == ["'other'"] * 2
            assert (box.run("x").text, box.files.read("file")) == ("1", b"1")
            assert all(clone.tags == {"a": "b"} for clone in clones)
        saved = box.snapshot("one")
        box.run("x = 99")
        box.files.write("file", "99")
        with Sandbox(snapshot=saved.id, env={"NEW": "1"}) as later:
            assert later.run("x, __import__('os').environ['NEW']").text == "(1, '1')"
            assert later.run("x", context=context).text == "'other'"
            assert later.files.read("file") == b"1"
        box.restore("one")
        assert (box.run("x").text, box.files.read("file")) == ("1", b"1")
    with SyncKeeperClient.connect() as keeper:
        keeper.delete(f"/snapshots/{saved.id}")


def test_what_it_uses_is_measured(box: Sandbox) -> None:
    """Memory and processor time grow with use."""
    before = box.metrics()
    box.run("hog = bytearray(50_000_000)\nsum(range(3_000_000))")
    after = box.metrics()
    assert after.memory_bytes > before.memory_bytes + 30_000_000
    assert after.cpu_s > before.cpu_s
    assert after.processes >= 2
    box.run("del hog")


def test_without_an_engine_it_is_frozen_in_memory_and_says_so(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time over it stands still, told as frozen; use wakes it; copies are refused before anything is done."""
    with own_places() as home:
        config = home.root / "jupyter" / "config"
        config.mkdir(parents=True)
        lines = ["c.Warmcell.backend = 'bubblewrap'", "c.Warmcell.prepared = 0", "c.Warmcell.keeper_idle_s = 0.2"]
        (config / "jupyter_warmcell_config.py").write_text("\n".join([*lines, "c.Warmcell.snapshots = 'none'"]))
        for name, value in home.env.items():
            monkeypatch.setenv(name, value)
        with Sandbox(preload=(), timeout=60) as box:
            box.run("x = 1")
            counting = box.spawn("sh", "-c", "while :; do echo; sleep 0.01; done")
            for refused in (lambda: box.fork(2), lambda: box.suspend(), lambda: box.snapshot("x")):
                with pytest.raises(errors.UnsupportedOperationError):
                    refused()
            assert [info.id for info in Sandbox.list()] == [box.id]
            box.set_timeout(0.2)
            deadline = time.monotonic() + 60
            while not (terms := box.info().terms) or not terms.frozen:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert box.info().state == "running"
            assert terms.ends_at is None
            stood = counting.info().output
            with pytest.raises(errors.UnsupportedOperationError):
                box.fork(2)
            assert counting.info().output == stood
            box.set_timeout(60)
            assert box.run("x").text == "1"
            woken = box.info().terms
            assert woken is not None
            assert not woken.frozen
            while counting.info().output == stood:
                assert time.monotonic() < deadline
            box.set_timeout(0.05)
            while not (terms := box.info().terms) or not terms.frozen:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert Sandbox.list() == []  # One that stands still can be killed.


@pytest.mark.criu
def test_one_that_sleeps_outlives_the_keeper_and_goes_when_it_has_slept_for_long(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next keeper has it with its tags, memory and contexts; with a bound on sleep it is removed."""
    with own_places() as home:
        config = home.root / "jupyter" / "config"
        config.mkdir(parents=True)
        lines = ["c.Warmcell.backend = 'bubblewrap'", "c.Warmcell.prepared = 0", "c.Warmcell.keeper_idle_s = 0.2"]
        (config / "jupyter_warmcell_config.py").write_text("\n".join(lines))
        for name, value in home.env.items():
            monkeypatch.setenv(name, value)

        def keeper() -> int:
            with SyncKeeperClient.connect() as client:
                return int(client.get("/status")["pid"])

        def ended(pid: int) -> None:
            with contextlib.suppress(ProcessLookupError):
                watched = os.pidfd_open(pid)
                assert select.select([watched], [], [], 60)[0]
                os.close(watched)

        box = Sandbox(preload=(), tags={"kept": "yes"})
        context = box.create_context()
        box.run("x = 'here'", context=context)
        first = keeper()
        box.suspend()
        box.close()
        ended(first)
        found = Sandbox.list(tags={"kept": "yes"})
        assert [(info.id, info.state) for info in found] == [(box.id, "suspended")]
        with contextlib.closing(Sandbox.connect(box.id)) as again:
            assert again.run("x", context=context).text == "'here'"
            second = keeper()
            again.suspend()
        ended(second)
        lines.append("c.Warmcell.snapshot_ttl = 1e-7")
        (config / "jupyter_warmcell_config.py").write_text("\n".join(lines))
        with SyncKeeperClient.connect() as client:
            deadline = time.monotonic() + 60
            while client.get("/sandboxes")["sandboxes"]:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert client.get("/snapshots")["snapshots"] == []


async def test_one_that_is_frozen_goes_when_it_has_been_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes memory, so it has a bound of its own, which may be shorter than that of one on disk."""
    with own_places() as home:
        config = home.root / "jupyter" / "config"
        config.mkdir(parents=True)
        lines = ["backend = 'bubblewrap'", "prepared = 0", "keeper_idle_s = 0.2", "snapshots = 'none'"]
        lines += [f"frozen_ttl = {0.5 / 86400}", "snapshot_ttl = 7.0"]
        (config / "jupyter_warmcell_config.py").write_text("\n".join(f"c.Warmcell.{line}" for line in lines))
        for name, value in home.env.items():
            monkeypatch.setenv(name, value)
        seen = []
        async with await KeeperClient.connect() as keeper, contextlib.aclosing(keeper.events()) as events:
            await anext(events)
            body = {"spec": {"preload": []}, "terms": {"timeout_s": 0.1}}
            made = await keeper.post("/sandboxes", body)
            async with asyncio.timeout(60):
                async for name, data in events:
                    if name == "sandbox" and data["id"] == made["id"]:
                        seen.append((data["state"], data["terms"] is not None and data["terms"]["frozen"]))
                        if data["state"] == "stopped":
                            break
            assert ("running", True) in seen
            assert (await keeper.get("/sandboxes"))["sandboxes"] == []


@pytest.mark.criu
def test_one_that_is_killed_as_its_time_is_over_is_gone(at_home: None) -> None:
    """Whatever has begun with its memory: to kill it works, at once, and leaves nothing."""
    for pause in (0.0, 0.1, 0.2):
        box = Sandbox(preload=(), timeout=60)
        box.set_timeout(0.05)
        time.sleep(0.05 + pause)
        box.kill()
        box.close()
        assert gone(box.id)


def test_one_that_was_killed_is_gone_however_often(at_home: None) -> None:
    """Again, after `with`, and by another object: nothing happens; other verbs say that it is no more."""
    with Sandbox(preload=()) as box:
        other = Sandbox.connect(box.id)
        box.kill()
        box.kill()
        with pytest.raises(errors.SandboxNotFoundError):
            box.run("1")
        with pytest.raises(errors.SandboxNotFoundError):
            box.files.read("x")
    box.kill()
    other.kill()
    other.close()
    with pytest.raises(errors.ConflictError, match="closed"):
        box.run("1")


def test_one_that_never_came_up_says_why_to_whoever_asks(at_home: None) -> None:
    """It is listed for a while, so that its error can be seen; to connect to it raises that error."""
    with pytest.raises(errors.WarmcellError) as first:
        Sandbox(preload=(), gpu="H900", tags={"fails": "1"})
    failed = Sandbox.list(tags={"fails": "1"})[0]
    assert failed.state == "failed"
    with pytest.raises(type(first.value), match="H900"):
        Sandbox.connect(failed.id)
    with SyncKeeperClient.connect() as keeper:
        with pytest.raises(type(first.value), match="H900"):
            keeper.post(f"/sandboxes/{failed.id}/commands", {"argv": ["true"]})
        keeper.delete(f"/sandboxes/{failed.id}")
    assert Sandbox.list(tags={"fails": "1"}) == []


@pytest.mark.criu
def test_a_name_that_is_taken_is_refused_before_anything_stops(at_home: None) -> None:
    """The code's own functions before a snapshot do not run for one that cannot be."""
    with Sandbox(preload=()) as box:
        box.run("import warmcell\nran = []\n@warmcell.before_snapshot\ndef note():\n    ran.append(1)")
        kept = box.snapshot("named")
        assert box.run("len(ran)").text == "1"
        with pytest.raises(errors.ConflictError, match="named"):
            box.snapshot("named")
        with pytest.raises(errors.InvalidRequestError):
            box.snapshot(" no name ")
        assert box.run("len(ran)").text == "1"
        with SyncKeeperClient.connect() as keeper:
            keeper.delete(f"/snapshots/{kept.id}")
        box.snapshot("named")
        assert box.run("len(ran)").text == "2"
