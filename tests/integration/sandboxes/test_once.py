"""Whatever connection breaks, what was asked for is done once."""

import json
import os
from pathlib import Path

import httpx
import pytest

from tests.cutting import AsyncCutting, Cutting, count_through, count_through_in_loop
from warmcell import Sandbox
from warmcell.sandbox import errors
from warmcell.sandbox.client.keeper import SyncKeeperClient
from warmcell.sandbox.client.transport import Where

pytestmark = pytest.mark.bubblewrap


def test_what_is_cut_off_is_done_once(box: Sandbox) -> None:
    """A hundred connections break, half of them before any answer; a counter file has one line for each thing done."""
    transport = Cutting(Where.find(None, None), 100)
    count_through(transport, box, 20)
    assert transport.cuts == {"body": 50, "head": 50}


async def test_what_is_cut_off_in_a_loop_is_done_once_too(box: Sandbox) -> None:
    """The same of the SDK for event loops."""
    transport = AsyncCutting(Where.find(None, None), 100)
    await count_through_in_loop(transport, box, 20)
    assert transport.cuts == {"body": 50, "head": 50}


def test_what_has_said_much_is_not_done_again_either(box: Sandbox) -> None:
    """Whose output is no longer kept, whoever asks again learns how it ended, and that the output is lost."""
    box.run("open('large', 'w').close()")
    script = "echo $0 >> large; head -c 7000000 /dev/zero; exit 3"
    bodies = [{"id": f"large{n}", "argv": ["sh", "-c", script, str(n)]} for n in range(6)]
    with SyncKeeperClient.connect() as keeper:
        commands = f"/sandboxes/{box.id}/commands"
        for body in bodies:
            keeper.post(commands, body)
            assert keeper.get(f"{commands}/{body['id']}?wait=60")["exit_code"] == 3
        assert [keeper.post(commands, body)["exit_code"] for body in bodies] == [3] * 6
        first, last = (
            [json.loads(line) for line in b"".join(keeper.download(f"{commands}/large{n}/output")).splitlines()]
            for n in (0, 5)
        )
        assert [list(one) for one in first] == [["lost"], ["ended"]]
        assert first[1]["ended"]["exit_code"] == 3
        assert any("stdout" in one for one in last)
        with pytest.raises(errors.ConflictError):
            keeper.post(commands, {"id": "large0", "argv": ["true"]})
        kept = [one["id"] for one in keeper.get(commands)["commands"]]
        assert "large0" not in kept
        assert "large5" in kept
    assert sorted(box.files.read_text("large").split()) == [str(n) for n in range(6)]


def test_one_key_makes_one_sandbox(at_home: None) -> None:
    """Whoever asks again with it, for the same, gets the same one; for another, a refusal."""
    with Sandbox(preload=(), key="mine-1") as one, Sandbox(preload=(), key="mine-1") as same:
        assert one.id == same.id
        with pytest.raises(errors.ConflictError):
            Sandbox(preload=(), key="mine-1", tags={"another": "one"})
        assert len([info for info in Sandbox.list() if info.id == one.id]) == 1


def test_code_that_nobody_follows_any_more_is_interrupted(box: Sandbox) -> None:
    """It goes on for as long as it may without anybody, and no longer; one with no such bound goes on."""
    with SyncKeeperClient.connect() as keeper:
        runs = f"/sandboxes/{box.id}/runs"
        left = keeper.post(runs, {"code": "import time\ntime.sleep(60)", "linger_s": 0.5})
        stays = keeper.post(runs, {"code": "print('stayed')", "linger_s": None})
        assert keeper.get(f"{runs}/{left['id']}?wait=60")["status"] == "interrupted"
        assert keeper.get(f"{runs}/{stays['id']}?wait=60")["status"] == "ok"
        polled = keeper.download(f"{runs}/{stays['id']}/output?until=now")
        lines = [json.loads(line) for line in b"".join(polled).splitlines()]
        assert lines[0]["content"]["text"] == "stayed\n"
        assert lines[-1]["next"] == 1


SLOW = """
import os, sys, time
while not os.path.exists("go"):
    time.sleep(0.01)
print(len(sys.stdin.buffer.read()))
"""


def test_input_that_was_cut_off_arrives_once(box: Sandbox) -> None:
    """Given up in its middle, by a client that has gone, and sent again: the rest of it is taken, and only that."""
    command = box.spawn("python", "-c", SLOW)
    content = b"x" * 3_000_000
    key = {"Idempotency-Key": "one"}
    transport = httpx.HTTPTransport(uds=str(Path(os.environ["WARMCELL_RUNTIME_DIR"]) / "keeper.sock"))
    with httpx.Client(transport=transport, base_url="http://keeper/warmcell/api/v1", timeout=60) as http:
        url = f"/sandboxes/{box.id}/commands/{command.id}/stdin"
        with pytest.raises(httpx.ReadTimeout):  # Nobody reads it yet, so not all of it can be taken.
            http.post(url, content=content, headers=key, timeout=2)
        box.files.write("go", "")
        assert http.post(url, content=content, headers=key).json() == {"received": len(content)}
        assert http.post(url, content=content, headers=key).json() == {"received": len(content)}
        assert http.post(url, content=b"", headers={"Idempotency-Key": "!"}).status_code == 400
        assert http.post(url, content=b"y", headers=key).status_code == 409
        assert http.post(f"{url}?at=3", content=b"y").status_code == 400
        for _ in range(2):
            assert http.post(f"{url}?close=1", headers={"Idempotency-Key": "end"}).json() == {"received": len(content)}
    assert command.wait().stdout == f"{len(content)}\n"
    box.files.remove("go")
