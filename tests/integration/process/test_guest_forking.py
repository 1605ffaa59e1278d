"""`warmcell.fork`, `%snapshot` and `%restore` in a real kernel; the test is the keeper at the other end."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.integration.process.guest import TIMEOUT_S, Guest, Kernel, running_guest
from tests.leaks import Places


@dataclass
class Keeper:
    """Answers on `api.sock`, one request per connection, with what the test has laid out."""

    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    asked: list[tuple[str, bytes]] = field(default_factory=list)
    open: int = 0
    taken: dict[str, int] = field(default_factory=dict)
    """How many questions of each kind the test has looked at."""

    def of(self, what: str) -> list[bytes]:
        """The bodies of what was asked so far, of one kind."""
        return [body for asked, body in self.asked if asked == what]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                (int(line[15:]) for line in head.splitlines() if line.lower().startswith("content-length")), 0
            )
            what = " ".join(head.split()[:2]).replace("/warmcell/api/v1", "")
            self.asked.append((what, await reader.readexactly(length)))
            status, body = self.answers.get(what, (404, b'{"code": "not_found", "message": "no such thing"}'))
            writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            assert not await reader.read()  # It hangs up at once.
        finally:
            writer.close()
            self.open -= 1


@pytest.fixture
async def guest(places: Places) -> AsyncIterator[Guest]:
    async with running_guest(places.root) as running:
        yield running


@pytest.fixture
async def keeper(guest: Guest) -> AsyncIterator[Keeper]:
    made = Keeper()
    server = await asyncio.start_unix_server(made.serve, guest.run / "api.sock")
    yield made
    server.close()
    (guest.run / "api.sock").unlink(missing_ok=True)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - it has no event for us
            await asyncio.sleep(0.002)


FORK, SNAPSHOT = "POST /sandboxes/self/fork", "POST /sandboxes/self/snapshot"


async def question(keeper: Keeper, what: str = FORK) -> Mapping[str, Any]:
    """What a kernel asks next, with the token of where it looks for the answer."""
    keeper.answers.setdefault(what, (202, b"{}"))
    seen = keeper.taken
    await until(lambda: len(keeper.of(what)) > seen.get(what, 0))
    seen[what] = seen.get(what, 0) + 1
    asked: Mapping[str, Any] = json.loads(keeper.of(what)[seen[what] - 1])
    return asked


def answer(run: Path, token: str, said: Mapping[str, Any]) -> None:
    (run / f"answer-{token}.json").write_text(json.dumps(said) + "\n")


async def outcome(run: Path, token: str) -> bytes:
    """What a clone hands over."""
    await until((run / f"result-{token}").exists)
    return (run / f"result-{token}").read_bytes()


async def forked(kernel: Kernel, keeper: Keeper, run: Path, code: str, said: Mapping[str, Any]) -> tuple[str, Any]:
    """Run a cell that forks, with that answer: the token, and the task of the cell."""
    keeper.answers[FORK] = (202, b"{}")
    running = asyncio.create_task(kernel.run(f"import warmcell\n{code}"))
    asked = await question(keeper)
    token = asked["token"]
    assert set(asked) == {"token", "n"}
    await until(lambda: keeper.open == 0)
    (run / f"answer-{token}.json").write_text('{"ok": tr')  # As a writer is seen that is not done yet.
    await asyncio.sleep(0.02)
    assert not running.done()
    answer(run, token, said)
    return token, running


@pytest.mark.parametrize(
    ("code", "expression"),
    [
        ("f = warmcell.fork(2)\nf.done([f.rank, 'given'])\n'not this'", "[0, 'given']"),
        ("f = warmcell.fork()\n{'last': f.rank}", "{'last': 0}"),
        ("f = warmcell.fork()\nx = 1", "None"),
    ],
    ids=["done", "last expression", "none"],
)
async def test_the_original_gets_what_a_clone_hands_over(
    guest: Guest, keeper: Keeper, code: str, expression: str
) -> None:
    """The value given to `done`, else the cell's last one; no connection stays open while the original waits."""
    clone, original = await guest.kernel("cold"), await guest.kernel("cold")
    token, running = await forked(clone, keeper, guest.run, code, {"ok": True, "rank": 0})
    assert (await running).status == "ok"
    result = await outcome(guest.run, token)
    keeper.answers["GET /sandboxes/abc/result"] = (204, b"")
    waiting = f"{code.splitlines()[0]}\nprint(f.rank, [c.id for c in f.clones]); print(f.clones[0].result())"
    _, running = await forked(original, keeper, guest.run, waiting, {"ok": True, "rank": None, "clones": ["abc"]})
    await until(lambda: len(keeper.of("GET /sandboxes/abc/result")) >= 3)
    assert keeper.open <= 1
    keeper.answers["GET /sandboxes/abc/result"] = (200, result)
    output = await running
    assert output.text == f"None ['abc']\n{expression}\n", output
    assert not list(guest.run.glob("answer-*"))
    keeper.answers["DELETE /sandboxes/abc"] = (204, b"")
    assert (await original.run("f.clones[0].kill()")).status == "ok"
    assert keeper.asked[-1][0] == "DELETE /sandboxes/abc"


async def test_an_error_in_a_clone_is_raised_in_the_original(guest: Guest, keeper: Keeper) -> None:
    """With its name and traceback; a value that cannot be pickled, and a clone that died, are errors too."""
    kernel = await guest.kernel("cold")
    token, running = await forked(kernel, keeper, guest.run, "f = warmcell.fork(); 1 / 0", {"ok": True, "rank": 0})
    assert (await running).status == "error"
    failed = await outcome(guest.run, token)
    token, running = await forked(
        kernel, keeper, guest.run, "f = warmcell.fork(); __import__('threading').Lock()", {"ok": True, "rank": 0}
    )
    await running
    cannot = await outcome(guest.run, token)
    _, running = await forked(
        kernel, keeper, guest.run, "f = warmcell.fork(3)", {"ok": True, "clones": ["a", "b", "c"]}
    )
    assert (await running).status == "ok"
    gone = b'{"code": "sandbox_died", "message": "It ran out of memory", "hint": "Ask for more."}'
    for name, content in (("a", (200, failed)), ("b", (200, cannot)), ("c", (409, gone))):
        keeper.answers[f"GET /sandboxes/{name}/result"] = content
    assert (await kernel.run("f.clones[0].result()")).error == "CloneError: ZeroDivisionError: division by zero"
    assert (await kernel.run("f.clones[1].result()")).error.startswith("CannotTravelError: value cannot be sent")
    assert (await kernel.run("f.clones[2].wait()")).error == "KeeperError: It ran out of memory. Ask for more."
    keeper.answers["GET /sandboxes/a/result"] = (204, b"")
    _, running = await forked(kernel, keeper, guest.run, "f = warmcell.fork()", {"ok": True, "clones": ["a"]})
    await running
    assert await kernel.value("f.clones[0].wait(0.1)") is False
    assert (await kernel.run("f.clones[0].result(timeout=0)")).error.startswith("TimeoutError")


async def test_a_clone_draws_other_numbers_than_its_siblings(guest: Guest, keeper: Keeper) -> None:
    """By the time that `fork` returns; in the original the numbers go on as they would have."""
    kernel = await guest.kernel("cold")
    code = "import random; random.seed(1); f = warmcell.fork(); print(random.random())"
    said = []
    for content in ({"rank": 0}, {"rank": 1}, {"rank": None, "clones": ["a"]}):
        _, running = await forked(kernel, keeper, guest.run, code, {"ok": True, **content})
        said.append((await running).text)
    assert len(set(said)) == 3
    assert said[2] == "0.13436424411240122\n"


async def test_a_refused_fork_says_why(guest: Guest, keeper: Keeper) -> None:
    """The keeper's words and cure; nonsense is refused before it is asked; an interrupted cell leaves no clones."""
    kernel = await guest.kernel("cold")
    refusal = {"ok": False, "code": "capacity", "message": "No room for 9 clones", "hint": "Ask for fewer."}
    _, running = await forked(kernel, keeper, guest.run, "warmcell.fork(9)", refusal)
    assert (await running).error == "ForkError: No room for 9 clones. Ask for fewer."
    for bad in ("0", "-1", "True", "'2'", "1.0", "10**9"):
        assert (await kernel.run(f"warmcell.fork({bad})")).error.startswith("ValueError"), bad
    keeper.answers[FORK] = (409, b'{"code": "unsupported", "message": "Memory cannot be saved", "hint": "Use root."}')
    assert (await kernel.run("warmcell.fork()")).error == "ForkError: Memory cannot be saved. Use root."
    await question(keeper)
    keeper.answers[FORK] = (202, b"{}")
    running = asyncio.create_task(kernel.run("warmcell.fork()"))
    token = (await question(keeper))["token"]
    await guest.channel.signal(kernel.pid, 2)
    keeper.answers["DELETE /sandboxes/late"] = (204, b"")
    answer(guest.run, token, {"ok": True, "rank": None, "clones": ["late"]})
    assert (await running).error.startswith("KeyboardInterrupt")
    assert keeper.asked[-1][0] == "DELETE /sandboxes/late"
    assert not list(guest.run.glob("answer-*"))


async def test_without_a_keeper_there_is_no_fork(guest: Guest) -> None:
    """It says so at once and asks nobody."""
    kernel = await guest.kernel("cold")
    assert "nobody to ask" in (await kernel.run("import warmcell; warmcell.fork()")).error


async def test_magics_ask_for_snapshots(guest: Guest, keeper: Keeper) -> None:
    """`%snapshot NAME` asks at the end of its cell and waits, `%snapshot` lists, a bad line asks nothing."""
    kernel = await guest.kernel("cold")
    taken = {"id": "abcdefabcdef", "name": "before training", "created_at": 0, "memory_bytes": 3 * 2**20}
    for said, words in (
        ({"ok": True, "snapshot": taken}, "end\nSnapshot before training  1970-01-01 00:00:00  3 MiB\n"),
        ({"ok": True, "snapshot": None}, "end\n"),
        (
            {"ok": False, "message": "The disk is full.", "hint": "Make room."},
            "end\nNo snapshot was taken. The disk is full. Make room.\n",
        ),
    ):
        running = asyncio.create_task(kernel.run("%snapshot 'before training'\nprint('end')"))
        asked = await question(keeper, SNAPSHOT)
        assert asked == {"name": "before training", "token": asked["token"]}
        await until(lambda: keeper.open == 0)
        assert not running.done()
        answer(guest.run, asked["token"], said)
        assert (await running).text == words
    keeper.answers["GET /snapshots"] = (200, json.dumps({"snapshots": [taken]}).encode())
    assert (await kernel.run("%snapshot")).text == "before training  1970-01-01 00:00:00  3 MiB\n"
    before = len(keeper.asked)
    for bad in ("%snapshot a b", "%snapshot name=a", "%snapshot /etc", "%restore", "%snapshot 'a"):
        assert (await kernel.run(bad)).text.startswith("UsageError"), bad
    assert len(keeper.asked) == before
    refused = b'{"code": "snapshot_not_found", "message": "There is no snapshot of that name", "hint": "Look."}'
    keeper.answers["POST /sandboxes/self/restore"] = (404, refused)
    assert (await kernel.run("%restore a")).error == "KeeperError: There is no snapshot of that name. Look."


async def test_a_cell_that_restores_waits_for_its_end(guest: Guest, keeper: Keeper) -> None:
    """Nothing after `%restore` runs."""
    kernel = await guest.kernel("cold")
    keeper.answers["POST /sandboxes/self/restore"] = (202, b"{}")
    running = asyncio.create_task(kernel.run("%restore a\nprint('still here')"))
    await until(lambda: bool(keeper.asked))
    await asyncio.sleep(0.2)
    assert not running.done()
    await guest.channel.signal(kernel.pid, 2)
    output = await running
    assert (output.text, output.error.split(":")[0]) == ("", "KeyboardInterrupt")


async def test_the_module_is_there_where_no_package_is(guest: Guest) -> None:
    """`import warmcell` finds the sandbox's own; a package of that name in the environment comes first."""
    kernel = await guest.kernel("cold")
    code = (
        "import sys\n"
        "class Without:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def find_spec(self, name, *rest):\n"
        "        return None if name == 'warmcell' else self.finder.find_spec(name, *rest)\n"
        "sys.meta_path[:-1] = [Without(finder) for finder in sys.meta_path[:-1]]\n"
        "import warmcell; print(sorted(warmcell.__all__), warmcell.__spec__.origin)\n"
        "import warmcell_guest.kernel.hooks as hooks; print(warmcell.fork is hooks.fork)\n"
        "sys.meta_path[:-1] = [each.finder for each in sys.meta_path[:-1]]; del sys.modules['warmcell']\n"
        "import warmcell; print(warmcell.__version__ > '', warmcell.before_snapshot is hooks.before_snapshot)\n"
    )
    output = await kernel.run(code)
    assert output.text == "['after_restore', 'before_snapshot', 'fork', 'remote'] the sandbox\nTrue\nTrue True\n", (
        output
    )
