"""What a kernel does around a snapshot, asked on its control channel: output kept, randomness new, hooks run."""

import asyncio
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from tests.integration.process.guest import CHANNELS, TIMEOUT_S, Guest, running_guest
from tests.leaks import Places

PRINTER = """
import threading, sys
_on = True
def _count():
    number = 0
    while _on:
        print(number, flush=number % 3 == 0)
        number += 1
        threading.Event().wait(0.002)
threading.Thread(target=_count, daemon=True).start()
"""


class Line:
    """A client of one kernel that can hang up and call again, as the proxy does."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._session = Session(key=b"")
        self.heard: list[dict[str, Any]] = []
        self.call()

    def call(self) -> None:
        """Connect."""
        self._context = zmq.asyncio.Context()
        kinds = {"shell": zmq.DEALER, "control": zmq.DEALER, "iopub": zmq.SUB}
        self._sockets = {name: self._context.socket(kind) for name, kind in kinds.items()}
        self._sockets["iopub"].subscribe(b"")
        self._sockets["iopub"].rcvhwm = 0
        for name, socket in self._sockets.items():
            socket.connect(f"ipc://{self._prefix}-{CHANNELS.index(name) + 1}")
        self._listening = asyncio.create_task(self._listen())

    async def call_again(self) -> None:
        """Connect, and be subscribed: before that a kernel publishes for nobody."""
        welcomes = len(self.of("iopub_welcome"))
        self.call()
        await self.until(lambda: len(self.of("iopub_welcome")) > welcomes)

    def hang_up(self) -> None:
        """Close everything at once."""
        self._listening.cancel()
        self._context.destroy(linger=0)

    async def _listen(self) -> None:
        while True:
            self.heard.append(await self._receive("iopub"))

    async def _receive(self, channel: str) -> dict[str, Any]:
        _, frames = self._session.feed_identities(await self._sockets[channel].recv_multipart())
        return dict(self._session.deserialize(frames))

    async def ask(self, kind: str, content: Mapping[str, Any], *, channel: str = "control") -> dict[str, Any]:
        """The content of the reply, once the kernel is idle again."""
        message = self._session.msg(kind, dict(content))
        self._session.send(self._sockets[channel], message)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                reply = await self._receive(channel)
                if reply["parent_header"]["msg_id"] == message["header"]["msg_id"]:
                    break
            idle = {"execution_state": "idle"}
            parent = message["header"]
            await self.until(
                lambda: any(m["content"] == idle and m["parent_header"] == parent for m in self.of("status"))
            )
        return {"msg_type": reply["msg_type"], **reply["content"]}

    async def run(self, code: str) -> dict[str, Any]:
        content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
        return await self.ask("execute_request", content, channel="shell")

    async def value(self, expression: str) -> Any:
        """The value of an expression, by way of JSON."""
        content = {"code": "import json", "silent": False, "user_expressions": {"it": f"json.dumps({expression})"}}
        reply = await self.ask("execute_request", content, channel="shell")
        return json.loads(reply["user_expressions"]["it"]["data"]["text/plain"].strip("'").replace("\\\\", "\\"))

    def header(self, kind: str) -> Mapping[str, Any]:
        """Of a message that was not sent by itself."""
        header: dict[str, Any] = json.loads(json.dumps(self._session.msg(kind)["header"], default=str))
        return {**header, "msg_type": "execute_request"}

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.heard if message["msg_type"] == kind]

    def printed(self, name: str = "stdout") -> str:
        return "".join(m["content"]["text"] for m in self.of("stream") if m["content"]["name"] == name)

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():  # noqa: ASYNC110 - it depends on another process
                await asyncio.sleep(0.005)

    async def pause(self, token: str) -> dict[str, Any]:
        return await self.ask("warmcell_before_snapshot_request", {"token": token})

    async def welcome(self, token: str, **content: Any) -> dict[str, Any]:
        return await self.ask("warmcell_after_restore_request", {"token": token, "clone": True, "env": {}, **content})

    async def go_on(self) -> dict[str, Any]:
        return await self.ask("warmcell_go_on_request", {})


@pytest.fixture(params=["cold", "template"])
async def line(request: pytest.FixtureRequest, places: Places) -> AsyncIterator[Line]:
    async with running_guest(places.root) as guest, started(guest, request.param) as made:
        yield made


class started:
    """A kernel of that engine and a line to it."""

    def __init__(self, guest: Guest, engine: str) -> None:
        self._guest, self._engine = guest, engine

    async def __aenter__(self) -> Line:
        if self._engine == "template":
            await self._guest.prepared()
        path, _ = self._guest.connection()
        kernel = await self._guest.channel.start_kernel(path, env={}, engine=self._engine)  # type: ignore[arg-type]
        self._line = Line(f"{self._guest.run}/{kernel.sockets}")
        await self._line.until(lambda: self._line.of("iopub_welcome"))
        return self._line

    async def __aexit__(self, *_: object) -> None:
        self._line.hang_up()


async def test_collections_leave_alone_what_a_template_has(line: Line) -> None:
    """No later collection looks at what there is when a template is saved; what a notebook has is collected."""
    await line.run("import gc, weakref\nclass Ring: pass\nring = Ring(); ring.own = ring; seen = weakref.ref(ring)")
    frozen = await line.value("gc.get_freeze_count()")
    await line.pause("t1")
    await line.go_on()
    assert await line.value("gc.get_freeze_count()") == frozen
    await line.run("del ring; gc.collect()")
    assert await line.value("seen() is None")
    await line.ask("warmcell_before_snapshot_request", {"token": "t2", "template": True})
    await line.go_on()
    assert await line.value("gc.get_freeze_count()") > frozen + 1000
    assert await line.value("len(gc.get_objects())") < 5000


async def test_output_while_nobody_listens_comes_once_and_in_order(line: Line) -> None:
    """What a thread prints through a pause without any connection has neither gap nor duplicate."""
    await line.run(PRINTER)
    for number in range(3):
        token = f"t{number}"
        assert (await line.pause(token))["status"] == "ok"
        before = line.printed()
        await asyncio.sleep(0.05)
        assert line.printed() == before  # It is kept from the reply on, though somebody still listens.
        line.hang_up()
        await asyncio.sleep(0.1)
        await line.call_again()
        assert await line.welcome(token) == {"msg_type": "warmcell_after_restore_reply", "status": "ok", "token": token}
        enough = len(before) + 200
        await line.until(lambda enough=enough: len(line.printed()) > enough)
    await line.run("_on = False")
    await line.run("print('end')")
    numbers = [int(word) for word in re.findall(r"^\d+$", line.printed(), re.M)]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 50


async def test_a_snapshot_that_did_not_stop_it_lets_the_output_go_on(line: Line) -> None:
    """`go_on` lets out what was kept, to the same client."""
    await line.run(PRINTER)
    await line.pause("a")
    before = line.printed()
    await line.go_on()
    await line.until(lambda: len(line.printed()) > len(before) + 50)
    await line.run("_on = False")
    numbers = [int(word) for word in re.findall(r"^\d+$", line.printed(), re.M)]
    assert numbers == list(range(len(numbers)))


async def test_more_than_a_thousand_messages_wait(line: Line, places: Places) -> None:
    """Neither libzmq's mark while nobody reads nor the flood at the end of a pause loses one."""
    await line.pause("a")
    note = places.root / "note"
    running = asyncio.create_task(line.run(f"for n in range(5000): display(n)\nopen({str(note)!r}, 'w').close()"))
    await line.until(note.exists)
    await line.go_on()
    await running
    await line.until(lambda: len(line.of("display_data")) >= 5000)
    shown = [message["content"]["data"]["text/plain"] for message in line.of("display_data")]
    assert shown == [str(number) for number in range(5000)]


async def test_past_the_bound_the_oldest_goes_and_it_is_said(line: Line, places: Places) -> None:
    """States stay, the latest output stays, and a line says how much is missing."""
    await line.pause("a")
    note = places.root / "note"
    code = f"for n in range(90): print(str(n) + ':' + 'x' * 2**20, flush=True)\nopen({str(note)!r}, 'w').close()"
    running = asyncio.create_task(line.run(code))
    await line.until(note.exists)
    await line.go_on()
    assert (await running)["status"] == "ok"
    assert re.search(r"left out \d\d MiB of output", line.printed("stderr"))
    numbers = [int(number) for number in re.findall(r"(\d+):x", line.printed())]
    assert numbers == list(range(numbers[0], 90))
    assert 20 <= numbers[0] <= 60


async def test_it_is_done_while_a_cell_runs(line: Line, places: Places) -> None:
    """The control channel answers in the middle of a cell."""
    note = places.root / "note"
    code = f"import os, time\nwhile not os.path.exists({str(note)!r}): time.sleep(0.02)\nprint('over')"
    running = asyncio.create_task(line.run(code))
    await line.until(lambda: line.of("execute_input"))
    assert (await line.pause("a"))["status"] == "ok"
    assert not running.done()
    assert (await line.welcome("a"))["status"] == "ok"
    note.touch()
    await running
    assert line.printed() == "over\n"


async def test_where_torch_cannot_move_what_it_has_all_goes_on(line: Line, places: Places) -> None:
    """A cell runs, so the main thread does not come to rest: what was held until then is let go of."""
    await line.run("import torch, os, time")
    begun, end = places.root / "begun", places.root / "end"
    waits = f"open({str(begun)!r}, 'w').close()\nwhile not os.path.exists({str(end)!r}): time.sleep(0.01)"
    running = asyncio.create_task(line.run(f"{waits}\nprint('all of it')"))
    await line.until(begun.exists)
    refused = await line.ask("warmcell_before_snapshot_request", {"token": "a", "offload": "cpu"})
    assert (refused["status"], refused["evalue"]) == ("error", "The kernel's main thread works")
    end.touch()
    assert (await running)["status"] == "ok"
    assert line.printed() == "all of it\n"


async def test_who_is_not_the_one_that_was_saved_is_refused(line: Line) -> None:
    """Another token, or none that was ever given, is an error; the right one works, once."""
    assert (await line.welcome("a"))["status"] == "error"
    await line.pause("a")
    refused = await line.welcome("b")
    assert (refused["status"], refused["ename"]) == ("error", "RefusedError")
    assert (await line.welcome("a"))["status"] == "ok"
    assert (await line.welcome("a"))["status"] == "error"
    for token in ("", 5, None, "x" * 1000):
        reply = await line.ask("warmcell_before_snapshot_request", {"token": token})
        assert reply["status"] == "error"


async def test_randomness_and_variables_are_new(line: Line) -> None:
    """The same memory draws other numbers; variables are changed as told, for children too."""
    draws = (
        "[random.random(), numpy.random.rand(), torch.rand(1).item(), tempfile._get_candidate_names().rng.random(),"
        " uuid.getnode(), multiprocessing.current_process().authkey.hex()]"
    )
    await line.run("import random, numpy, torch, tempfile, uuid, multiprocessing, ssl, os, subprocess; uuid.getnode()")
    await line.run("os.environ['GOES'] = '1'")
    seed = "random.seed(1); numpy.random.seed(1); torch.manual_seed(1)"
    await line.run(seed)
    first = await line.value(draws)
    await line.run(seed)
    again = await line.value(draws)
    assert first[:3] == again[:3]
    await line.run(seed)
    await line.pause("a")
    changes = {"env": {"GOES": None, "COMES": "é"}, "cwd": "/usr"}
    assert (await line.welcome("a", **changes))["status"] == "ok"
    second = await line.value(draws)
    same = [n for n, (a, b) in enumerate(zip(first, second, strict=True)) if a == b]
    assert same in ([], [4])  # A machine's own address is the same each time.
    assert await line.value("[os.getcwd(), os.environ.get('GOES'), subprocess.getoutput('echo $COMES$GOES')]") == [
        "/usr",
        None,
        "é",
    ]


async def test_hooks_run_and_one_that_fails_forbids(line: Line) -> None:
    """`before_snapshot` and `after_restore` run in order; a failing one is named, and then nothing is kept back."""
    await line.run(
        "import warmcell; log = []\n"
        "for _ in range(2):\n"
        "    @warmcell.before_snapshot\n"
        "    def save(): log.append('before')\n"
        "@warmcell.after_restore\n"
        "def back(): log.append('after')"
    )
    await line.pause("a")
    await line.welcome("a")
    assert await line.value("log") == ["before", "after"]
    await line.run("@warmcell.before_snapshot\ndef broken(): 1 / 0")
    refused = await line.pause("b")
    assert refused["status"] == "error"
    assert "broken" in refused["evalue"]
    assert "ZeroDivisionError" in refused["evalue"]
    await line.run("print('heard')")
    await line.until(lambda: line.printed() == "heard\n")


async def test_children_hold_nothing_of_the_kernel_and_print(line: Line) -> None:
    """A forked child has no socket of the kernel's open; what it prints comes through; its own pipes work."""
    await line.run(
        "import multiprocessing, os, subprocess\n"
        "def targets():\n"
        "    found = []\n"
        "    for name in os.listdir('/proc/self/fd'):\n"
        "        try: found.append(os.readlink('/proc/self/fd/' + name))\n"
        "        except FileNotFoundError: pass\n"
        "    return found\n"
        "def child(pipe, parents):\n"
        "    print('child prints', flush=True)\n"
        "    mine = targets()\n"
        "    pipe.send(len([name for name in parents if name in mine]) + mine.count('anon_inode:[eventpoll]'))\n"
        "    pipe.recv()\n"
    )
    await line.run(
        "lines = map(str.split, open('/proc/net/unix'))\n"
        "bound = [words[6] for words in lines if len(words) > 7 and words[7][-2] == '-']\n"
        "ours = [name for name in targets() if name in {f'socket:[{inode}]' for inode in bound}]"
    )
    assert await line.value("len(ours)") >= 9
    await line.run(
        "context = multiprocessing.get_context('fork'); here, there = context.Pipe()\n"
        "one = context.Process(target=child, args=(there, ours)); one.start()\n"
        "count = here.recv(); here.send(0); one.join()"
    )
    assert await line.value("[count, one.exitcode]") == [0, 0]
    await line.until(lambda: "child prints" in line.printed())
    assert await line.value("subprocess.check_output(['echo', 'hi']).decode()") == "hi\n"


class Context:
    """A context of a kernel: a process of its own below it."""

    def __init__(self, line: Line) -> None:
        self._line = line

    async def __aenter__(self) -> "Context":
        await self.do("start")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._line.ask("warmcell_context_request", {"action": "end", "context": "c"})

    async def run(self, code: str) -> None:
        await self.do("run", content={"code": code, "silent": False, "store_history": False})

    async def do(self, action: str, **content: Any) -> None:
        """Ask for that, and wait until it is done."""
        header = self._line.header(action)
        asked = {"action": action, "context": "c", "header": header, **content}
        assert (await self._line.ask("warmcell_context_request", asked))["status"] == "ok"
        replies: list[Any] = []

        def replied() -> bool:
            all_of = self._line.of("execute_reply")
            replies.extend(m["content"] for m in all_of if m["parent_header"].get("msg_id") == header["msg_id"])
            return bool(replies)

        await self._line.until(replied)
        assert replies[0]["status"] == "ok", replies


WAITS = "import warmcell_guest.kernel.contexts as contexts; contexts.REST_TIMEOUT_S = {seconds}"
SLOW = """
import time, warmcell
@warmcell.before_snapshot
def slow():
    time.sleep(1.5)
    with open({note!r}, "a") as note:
        note.write("rested,")
"""


async def test_a_late_answer_of_a_context_is_not_the_next_ones(line: Line, places: Places) -> None:
    """Who asks again after a hook was too slow waits until that hook has run again."""
    note = places.root / "note"
    async with Context(line) as context:
        await context.run(SLOW.format(note=str(note)))
        await line.run(WAITS.format(seconds=0.3))
        assert "does not answer" in (await line.pause("a"))["evalue"]
        await line.run(WAITS.format(seconds=20))
        assert (await line.pause("b"))["status"] == "ok"
        assert note.read_text() == "rested,rested,"
        await line.go_on()


async def test_a_context_that_does_not_answer_holds_up_no_other(line: Line, places: Places) -> None:
    """A kernel that goes on with other variables speaks again, and says which context has not taken them over."""
    note = places.root / "pid"
    async with Context(line) as context:
        await context.run(f"import os; open({str(note)!r}, 'w').write(str(os.getpid()))")
        await line.run(WAITS.format(seconds=2))
        assert (await line.pause("a"))["status"] == "ok"
        stopped = Path(f"/proc/{note.read_text()}")
        os.kill(int(stopped.name), signal.SIGSTOP)
        # Until the first thread has heard of it, the others go on, and may answer.
        await line.until(lambda: all(b") T " in one.read_bytes() for one in stopped.glob("task/*/stat")))
        assert (await line.ask("warmcell_go_on_request", {"env": {"NEW": "1"}}))["status"] == "ok"
        await line.run("import os; print(os.environ['NEW'])")
        assert line.printed() == "1\n"
        await line.until(lambda: "The context c does not answer" in line.printed("stderr"))
        os.kill(int(note.read_text()), signal.SIGCONT)
