"""Whatever connection breaks, what was asked for is done once."""

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from warmcell import Sandbox
from warmcell.sandbox import errors
from warmcell.sandbox.client.core import Core
from warmcell.sandbox.client.keeper import SyncKeeperClient
from warmcell.sandbox.client.transport import Stream, SyncTransport, Where, now

pytestmark = pytest.mark.bubblewrap


class Cutting(SyncTransport):
    """A connection that breaks after the request was sent, each time but the last of three."""

    def __init__(self) -> None:
        super().__init__(Where.find(None, None))
        self.cuts = 0
        self._times: dict[str, int] = {}

    def _cut(self, path: str) -> bool:
        self._times[path] = self._times.get(path, 0) + 1
        cut = self._times[path] % 3 != 0
        self.cuts += cut
        return cut

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds / 100)

    async def request(self, method: str, path: str, **how: Any) -> httpx.Response:
        if self._cut(method + path):
            content = how.pop("content", None)
            body = b"".join(content()) if callable(content) else content
            with self._http.stream(method, path, content=body, **how):
                raise httpx.ReadError("cut")
        return await super().request(method, path, **how)

    @contextlib.asynccontextmanager
    async def stream(self, method: str, path: str, **how: Any) -> AsyncGenerator[Stream]:
        async with super().stream(method, path, **how) as stream:
            if self._cut(method + path):
                raise httpx.ReadError("cut")
            yield stream


def test_what_is_cut_off_is_done_once(box: Sandbox) -> None:
    """Two of three connections break between request and answer; a counter file has one line for each thing done."""
    transport = Cutting()
    cut = Core(transport, box.info())
    nothing: dict[str, Any] = {"on_stdout": None, "on_stderr": None}
    box.run("open('runs', 'w').close(); open('commands', 'w').close()")
    for number in range(17):
        code = f"print({number}, file=open('runs', 'a')); print({number})"
        ran = now(cut.run(code, context="default", timeout_s=60, env=None, on_result=None, **nothing))
        assert ran.stdout == f"{number}\n"
        argv = ["sh", "-c", f"echo {number} >> commands; echo {number}"]
        done = now(cut.exec(argv, cwd="", env=None, input=b"", timeout_s=60, **nothing))
        assert done.stdout == f"{number}\n"
    command = now(cut.spawn(["cat"], cwd="", env=None, timeout_s=60, pty=None, tag=""))
    sent = 0
    for number in range(9):
        sent = now(cut.write(command.id, f"{number}".encode(), sent, False))
    now(cut.write(command.id, b"", sent, True))
    assert now(cut.wait(command.id, None, None)).stdout == "012345678"
    now(transport.close())
    expected = "".join(f"{number}\n" for number in range(17))
    assert box.files.read_text("runs") == expected
    assert box.files.read_text("commands") == expected
    assert transport.cuts >= 90


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


def test_input_that_overlaps_arrives_once_and_gaps_are_refused(box: Sandbox) -> None:
    """Where the first request was cut off in its middle, the rest of it counts; nothing is taken out of turn."""
    command = box.spawn("cat")
    with SyncKeeperClient.connect() as keeper:
        stdin = f"/sandboxes/{box.id}/commands/{command.id}/stdin"
        assert keeper.upload(f"{stdin}?at=0", iter([b"abc"])) == {"received": 3}
        assert keeper.upload(f"{stdin}?at=1", iter([b"bcde"])) == {"received": 5}
        with pytest.raises(errors.ConflictError):
            keeper.upload(f"{stdin}?at=9", iter([b"z"]))
        assert keeper.upload(f"{stdin}?at=5&close=1", iter([b""])) == {"received": 5}
    assert command.wait().stdout == "abcde"
