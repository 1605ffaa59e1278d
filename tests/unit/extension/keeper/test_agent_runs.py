"""Code that is run for clients, against a kernel that the test plays: how it is interrupted, and what is remembered."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast

import pytest

from warmcell.extension.keeper.agents import runs
from warmcell.extension.keeper.agents.kernel_client import KernelClient
from warmcell.extension.keeper.agents.runs import KernelRuns, Run
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.live import LiveSandbox

PATIENCE_S = 60


class Kernel:
    """Takes cells one by one: "wait" until it is let go on; an interrupt is heeded then, and not before."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.go_on = asyncio.Event()
        self.interrupted = asyncio.Event()
        self.interrupts = 0
        self.addressed: list[tuple[str, ...]] = []
        self.ended: list[str] = []

    async def execute(self, code: str, box: object, **how: object) -> AsyncGenerator[dict[str, Any]]:
        self.began.set()
        yield {"msg_type": "stream", "content": {"name": "stdout", "text": "x" * 2**20}, "metadata": {}}
        if code == "wait":
            await self.go_on.wait()
        status = "error" if self.interrupts else "ok"
        yield {"msg_type": "reply", "content": {"status": status, "execution_count": 1}, "metadata": {}}

    async def interrupt(self, *run: str) -> None:
        if run:
            self.addressed.append(run)
        else:
            self.interrupts += 1
        self.interrupted.set()

    async def start(self, context: object, box: object) -> None:
        """Contexts come up at once."""

    async def end(self, context: str) -> None:
        self.ended.append(context)

    async def execute_in(
        self, context: object, code: str, box: object, *, name: str, **how: object
    ) -> AsyncGenerator[dict[str, Any]]:
        async for message in self.execute(code, box):
            if message["msg_type"] == "reply" and any(run == name for _, run in self.addressed):
                message["content"]["status"] = "error"
            yield message


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
async def known(kernel: Kernel) -> AsyncIterator[KernelRuns]:
    async def client() -> KernelClient:
        return cast(KernelClient, kernel)

    made = KernelRuns(lambda: cast(LiveSandbox, None), client, kernel.interrupt, {}, lambda contexts: None)
    yield made
    await made.close()


async def ended(run: Run) -> None:
    assert run.work is not None
    done, _ = await asyncio.wait({run.work}, timeout=PATIENCE_S)
    assert done


async def test_one_that_is_stopped_twice_is_interrupted_once_and_ends_as_such(
    kernel: Kernel, known: KernelRuns
) -> None:
    """Whoever presses again shortens nothing: the cell has its time to end, and the next one waits for that."""
    run = known.start({"code": "wait"})
    await asyncio.wait_for(kernel.began.wait(), PATIENCE_S)
    stops = []
    for _ in range(3):
        stops.append(asyncio.create_task(known.stop(run)))
        await asyncio.wait(stops, timeout=0.02)
    assert run.state == "running"
    assert kernel.interrupts == 1
    kernel.go_on.set()
    await asyncio.wait_for(asyncio.gather(*stops), PATIENCE_S)
    assert (run.status, run.error) == ("interrupted", None)


async def test_one_that_is_stopped_while_its_kernel_starts_never_begins(kernel: Kernel) -> None:
    """Its kernel comes up all the same, and gets the next one."""
    asked, up = asyncio.Event(), asyncio.Event()

    async def client() -> KernelClient:
        asked.set()
        await up.wait()
        return cast(KernelClient, kernel)

    known = KernelRuns(lambda: cast(LiveSandbox, None), client, kernel.interrupt, {}, lambda contexts: None)
    run = known.start({"code": "x"})
    await asyncio.wait_for(asked.wait(), PATIENCE_S)
    stop = asyncio.create_task(known.stop(run))
    await asyncio.wait_for(kernel.interrupted.wait(), PATIENCE_S)
    up.set()
    await asyncio.wait_for(stop, PATIENCE_S)
    assert (run.status, kernel.began.is_set()) == ("interrupted", False)
    await ended(known.start({"code": "x"}))
    assert kernel.began.is_set()
    await known.close()


async def test_one_that_is_stopped_while_its_time_is_over_has_run_out_of_time(
    kernel: Kernel, known: KernelRuns
) -> None:
    """Why it was interrupted first stays so."""
    run = known.start({"code": "wait", "timeout_s": 0.01})
    await asyncio.wait_for(kernel.interrupted.wait(), PATIENCE_S)
    stop = asyncio.create_task(known.stop(run))
    await asyncio.wait({stop}, timeout=0.05)
    assert run.state == "running"
    kernel.go_on.set()
    await asyncio.wait_for(stop, PATIENCE_S)
    assert run.status == "timeout"


async def test_what_has_ended_is_forgotten_though_nothing_new_begins(
    kernel: Kernel, known: KernelRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sixty that wait, and then say a mebibyte each, as much is kept as of those that begin one by one."""
    monkeypatch.setattr(runs, "WAITING_MAX", 60)
    asked = [known.start({"code": "x", "linger_s": 60}) for _ in range(60)]
    for run in asked:
        await ended(run)
    assert [run.status for run in asked] == ["ok"] * 60
    await asyncio.sleep(0)
    assert sum(run.output.size_bytes for run in known.all()) <= 32 * 2**20


async def test_of_a_request_only_as_much_is_remembered_as_tells_it_from_others(known: KernelRuns) -> None:
    """The same request again is the same run; the code, which may be large, is not kept for that."""
    body = {"id": "one", "code": "1" * 10**6}
    run = known.start(body)
    await ended(run)
    assert known.start(body) is run
    assert run.code == ""
    assert len(run.asked) == 32


@pytest.mark.parametrize("env", [{"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "\0"}, {"A": 1}, "A=B"])
def test_variables_that_cannot_be_set_are_refused(env: object) -> None:
    """Before anything runs: in a kernel they would be an error that nobody is told."""
    with pytest.raises(InvalidRequestError):
        Run({"code": "x", "env": env})


async def test_contexts_take_no_turns_and_interrupts_are_addressed(kernel: Kernel, known: KernelRuns) -> None:
    """What runs in one keeps none in another waiting, and stopping it interrupts that very run."""
    for name in ("a", "b"):
        await known.new_context({"id": name, "cwd": "/tmp"}, "")
    waits = known.start({"code": "wait", "context": "a"})
    await asyncio.wait_for(kernel.began.wait(), PATIENCE_S)
    for name in ("b", "default"):
        await ended(known.start({"code": "x", "context": name}))
    behind = known.start({"code": "x", "context": "a"})
    stop = asyncio.create_task(known.stop(waits))
    await asyncio.wait_for(kernel.interrupted.wait(), PATIENCE_S)
    assert (kernel.addressed, kernel.interrupts, behind.state) == ([("a", waits.request)], 0, "waiting")
    kernel.go_on.set()
    await asyncio.wait_for(stop, PATIENCE_S)
    await ended(behind)
    assert (waits.status, behind.status) == ("interrupted", "ok")
    await known.remove_context("a")
    assert (kernel.ended, set(known.contexts)) == (["a"], {"default", "b"})
