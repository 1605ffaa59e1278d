"""Whatever a sandbox's kernel says to a request: an answer, or an error of ours, and the next cell runs."""

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest
import zmq
import zmq.asyncio
from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from tests.leaks import Places
from warmcell.extension.keeper.agents import kernel_client
from warmcell.extension.keeper.agents.kernel_client import KernelClient
from warmcell.extension.keeper.kernel import Kernel
from warmcell.sandbox.live import LiveSandbox

PATIENCE_S = 60
SHOWS: Final = ("stream", "display_data", "error", "status", "execute_reply", "warmcell_context_reply", "other")
CONTENT: Final[dict[str, Any]] = {
    **{"status": "ok", "execution_count": 1, "execution_state": "idle", "name": "stdout", "text": "x"},
    **{"payload": [{"source": "ask_exit"}], "exit_code": 3, "why": "no room", "ename": "ConflictError", "evalue": "v"},
}
CONTENTS: Final = st.one_of(changed(CONTENT, {**CONTENT, "status": "died"}), JSON)
DEEP: Final = b'{"msg_id": ' + b"[" * 985 + b"]" * 985 + b"}"


def frame(said: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return st.one_of(said.map(lambda one: json.dumps(one).encode()), st.binary(max_size=9), st.just(DEEP))


def header(kind: str) -> st.SearchStrategy[bytes]:
    return frame(st.one_of(st.just({"msg_type": kind, "msg_id": "m"}), changed({"msg_type": kind, "msg_id": "m"})))


PARTS: Final = st.sampled_from(SHOWS).flatmap(
    lambda kind: st.tuples(header(kind), st.booleans(), frame(st.one_of(st.just({}), JSON)), frame(CONTENTS))
)
"""Header, whether it belongs to what was asked, metadata, content."""
SAID: Final = st.lists(st.tuples(st.sampled_from(("shell", "control", "iopub")), PARTS), max_size=4)
VERBS: Final = ("execute", "execute_in", "start", "interrupt", "end")
CHANNELS: Final = {"shell": zmq.ROUTER, "iopub": zmq.XPUB, "control": zmq.ROUTER}


class Guest:
    """Sockets of a kernel that says to the next request what it was told to, and then ends it as it should."""

    def __init__(self, place: str, context: "zmq.asyncio.Context") -> None:
        self.says: list[tuple[str, tuple[bytes, bool, bytes, bytes]]] = []
        self._sockets = {name: context.socket(kind) for name, kind in CHANNELS.items()}
        for number, name in ((1, "shell"), (2, "iopub"), (4, "control")):
            self._sockets[name].bind(f"ipc://{place}-{number}")
        self._tasks = [asyncio.create_task(self._answer(name)) for name in ("shell", "control")]

    async def _answer(self, name: str) -> None:
        while True:
            route, *_, request, _, _, content = await self._sockets[name].recv_multipart()
            kind, asked = json.loads(request)["msg_type"], json.loads(content)
            if kind in ("execute_request", "warmcell_context_request"):
                for channel, (header, mine, metadata, told) in self.says:
                    parent = request if mine else b"{}"
                    if mine and kind == "warmcell_context_request" and "header" in asked:
                        parent = json.dumps(asked["header"], default=str).encode()
                    await self._say(channel, route, header, parent, metadata, told)
            reply = kind.replace("_request", "_reply")
            await self._say(name, route, json.dumps({"msg_type": reply, "msg_id": "r"}).encode(), request, b"{}", OK)
            parent = json.dumps(asked["header"], default=str).encode() if "header" in asked else request
            if "header" in asked:  # What a cell of a context comes to is published.
                await self._say("iopub", route, b'{"msg_type": "execute_reply", "msg_id": "r"}', parent, b"{}", OK)
            await self._say("iopub", route, b'{"msg_type": "status", "msg_id": "s"}', parent, b"{}", IDLE)

    async def _say(self, channel: str, route: bytes, *parts: bytes) -> None:
        to = [] if channel == "iopub" else [route]
        await self._sockets[channel].send_multipart([*to, b"<IDS|MSG>", b"", *parts])

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


REFUSAL = b'{"msg_type": "warmcell_context_reply", "msg_id": "r"}'
OK, IDLE = b'{"status": "ok", "execution_count": 1}', b'{"execution_state": "idle"}'
BOX = cast(LiveSandbox, SimpleNamespace(oom_kills=lambda: 0, spec=SimpleNamespace(limits=SimpleNamespace())))


async def ask(client: KernelClient, verb: str) -> list[dict[str, Any]]:
    """What comes of it."""
    context = {"context": "c", "cwd": ""}
    if verb == "execute":
        return [one async for one in client.execute("1", BOX)]
    if verb == "execute_in":
        return [one async for one in client.execute_in(context, "1", BOX, name="", env={})]
    await {
        "start": lambda: client.start(context, BOX),
        "interrupt": lambda: client.interrupt("c", "n"),
        "end": lambda: client.end("c"),
    }[verb]()
    return []


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """One loop for all inputs of a test."""
    with asyncio.Runner() as made:
        yield made


@pytest.mark.timeout(1800)
@LENGTHS
def test_whatever_a_kernel_says_ends_the_request_and_no_other(
    examples: int, runner: asyncio.Runner, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over real sockets: the last word is a reply with a status, or why there is none."""
    monkeypatch.setattr(kernel_client, "EXIT_S", 0.001)
    monkeypatch.setattr(kernel_client, "SILENCE_S", 0.5)

    async def connected() -> tuple["zmq.asyncio.Context", Guest, KernelClient]:
        context, place = zmq.asyncio.Context(), str(places.root / "k")
        ports = {f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
        request = SimpleNamespace(connection={**ports, "ip": place, "key": ""})
        process = SimpleNamespace(exited=asyncio.Event(), exit_code=None)
        kernel = cast(Kernel, SimpleNamespace(request=request, process=process))
        guest, client = Guest(place, context), KernelClient(context, kernel)
        await asyncio.wait_for(client.ready(), PATIENCE_S)
        return context, guest, client

    context, guest, client = runner.run(connected())

    async def speak(drawn: tuple[str, list[tuple[str, tuple[bytes, bool, bytes, bytes]]]]) -> None:
        verb, guest.says = drawn
        async with asyncio.timeout(PATIENCE_S):
            try:
                shown = await ask(client, verb)
                if verb.startswith("execute"):
                    assert shown[-1]["msg_type"] == "reply"
                    assert isinstance(shown[-1]["content"]["status"], str)
                assert all(isinstance(one["content"], dict) for one in shown)
            finally:
                guest.says = []
                following = "execute" if verb == "execute" else "execute_in"
                assert (await ask(client, following))[-1]["content"] == json.loads(OK)

    try:
        give_anything(
            st.tuples(st.sampled_from(VERBS), SAID),
            lambda drawn: runner.run(speak(drawn)),
            examples=examples,
            sound=[(verb, []) for verb in VERBS],
            broken=[
                ("interrupt", [("control", (REFUSAL, True, b"{}", b'{"status": "error", "ename": "ConflictError"}'))])
            ],
        )
    finally:
        client.close()
        runner.run(guest.close())
        context.destroy(linger=0)
