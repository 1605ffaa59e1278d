"""Contexts of a sandbox, through the SDK and a real keeper: each is a process of its own below the kernel."""

import asyncio
import contextlib
import time
from collections.abc import Iterator

import pytest

from warmcell import AsyncSandbox, Sandbox
from warmcell.extension.server.e2b.languages import as_python
from warmcell.sandbox import errors

pytestmark = pytest.mark.bubblewrap

MEET = """
import os, time
open({mine!r}, "w").close()
deadline = time.monotonic() + 60
while not os.path.exists({other!r}) and time.monotonic() < deadline:
    time.sleep(0.01)
os.path.exists({other!r})
"""
"""Ends when the other one runs, too."""


@pytest.fixture
def context(box: Sandbox) -> Iterator[str]:
    made = box.create_context(cwd="/tmp")
    yield made
    with contextlib.suppress(errors.NotFoundError):
        box.remove_context(made)


def test_contexts_have_variables_of_their_own(box: Sandbox, context: str) -> None:
    """Names of one are unknown in the others, directories and processes are its own, and a removed one is gone."""
    box.run("name = 1")
    box.run("name = 2\ndef double(): return 2 * name", context=context)
    assert box.run("name").text == "1"
    assert box.run("double(), __import__('os').getcwd()", context=context).text == "(4, '/tmp')"
    unknown = box.run("double()")
    assert unknown.error is not None
    assert unknown.error.name == "NameError"
    assert set(box.contexts()) == {"default", context}
    pid = int(box.run("__import__('os').getpid()", context=context).text or 0)
    alive = f"__import__('os').path.exists('/proc/{pid}')"
    assert (box.run("__import__('os').getpid()").text != str(pid), box.run(alive).text) == (True, "True")
    box.remove_context(context)
    assert box.run(alive).text == "False"
    with pytest.raises(errors.NotFoundError):
        box.run("name", context=context)
    assert box.run("name").text == "1"


def test_all_that_a_kernel_shows_is_shown_by_a_context(box: Sandbox, context: str) -> None:
    """Both streams as they come, what programs and forked children print, displays, errors, and the environment."""
    code = (
        "import os, sys\nprint('out')\nos.system('echo sub')\nprint('err', file=sys.stderr)\ndisplay('shown')\n21 * 2"
    )
    said: list[str] = []
    done = box.run(code, context=context, on_stdout=said.append)
    assert (done.text, done.stderr, done.error) == ("42", "err\n", None)
    assert sorted(done.stdout.split()) == ["out", "sub"]
    assert [result.text for result in done.results] == ["'shown'", "42"]
    assert "".join(said) == done.stdout
    forked = "if not os.fork():\n    print('child', flush=True); os._exit(0)\nos.wait()[1]"
    assert "child\n" in box.run(forked, context=context).stdout
    failed = box.run("1 / 0", context=context)
    assert failed.error is not None
    assert failed.error.name == "ZeroDivisionError"
    assert "1 / 0" in str(failed.error)
    env = "import os; os.environ['SAID'], os.environ['GIVEN']"
    assert box.run(env, context=context, env={"GIVEN": "now"}).text == "('to all', 'now')"
    flood = box.run("for i in range(200): print('x' * 10_000)", context=context)
    assert len(flood.stdout) == 200 * 10_001


async def test_two_contexts_run_at_once(at_home: None, shared_box: Sandbox) -> None:
    """Each waits for the other, and neither could end if they took turns; the default one as well."""
    async with contextlib.AsyncExitStack() as stack:
        box = await AsyncSandbox.connect(shared_box.id)
        stack.push_async_callback(box.close)
        contexts = ["default"]
        for _ in range(2):
            contexts.append(await box.create_context())
            stack.push_async_callback(box.remove_context, contexts[-1])
        names = [f"/tmp/met-{context}" for context in contexts]
        pairs = zip(contexts, names, [*names[1:], names[0]], strict=True)
        ran = await asyncio.gather(
            *(box.run(MEET.format(mine=mine, other=other), context=one) for one, mine, other in pairs)
        )
        assert [one.text for one in ran] == ["True"] * 3


def test_one_that_ends_itself_leaves_the_others(box: Sandbox, context: str) -> None:
    """That is told with its exit code; the next run there begins anew, and all else is as it was."""
    other = box.create_context()
    for one in ("default", other, context):
        box.run("kept = 'yes'", context=one)
    with pytest.raises(errors.SandboxDiedError, match="exit code 3"):
        box.run("__import__('os')._exit(3)", context=context)
    with pytest.raises(errors.SandboxDiedError, match="SIGKILL"):
        box.run("import os; os.kill(os.getpid(), 9)", context=context)
    assert box.run("'kept' in globals(), __import__('os').getcwd()", context=context).text == "(False, '/tmp')"
    assert [box.run("kept", context=one).text for one in ("default", other)] == ["'yes'"] * 2
    box.remove_context(other)


async def test_an_interrupt_reaches_one_context_only(at_home: None, shared_box: Sandbox) -> None:
    """What runs out of time in one is interrupted there, with its variables kept; others end by themselves."""
    box = await AsyncSandbox.connect(shared_box.id)
    hurried, steady = await box.create_context(), await box.create_context()
    await box.run("kept = 'yes'", context=hurried)
    wait = "import os, time\nwhile not os.path.exists('/tmp/interrupted'): time.sleep(0.01)\n'ended'"
    beside = [asyncio.create_task(box.run(wait, context=one)) for one in ("default", steady)]
    late = await box.run("import time\ntime.sleep(60)", context=hurried, timeout=0.5)
    assert late.error is not None
    assert late.error.name == "TimeoutError"
    assert (await box.run("kept; open('/tmp/interrupted', 'w').close(); kept", context=hurried)).text == "'yes'"
    assert [(await one).text for one in beside] == ["'ended'"] * 2
    for one in (hurried, steady):
        await box.remove_context(one)
    await box.close()


async def test_a_restart_ends_what_runs_in_that_context(at_home: None, shared_box: Sandbox) -> None:
    """Also what heeds no interrupt: it ends as interrupted, and the context is there again without its variables."""
    box = await AsyncSandbox.connect(shared_box.id)
    context = await box.create_context()
    await box.run("kept = 'yes'")
    stubborn = (
        "import signal, time\nsignal.signal(2, signal.SIG_IGN)\nprint('began', flush=True)\nwhile True: time.sleep(1)"
    )
    began = asyncio.Event()
    running = asyncio.create_task(box.run(stubborn, context=context, on_stdout=lambda text: began.set()))
    await asyncio.wait_for(began.wait(), 60)
    await box.restart_context(context)
    ended = await running
    assert ended.error is not None
    assert ended.error.name == "Interrupted"
    assert (await box.run("'signal' in globals()", context=context)).text == "False"
    assert (await box.run("kept")).text == "'yes'"
    await box.restart_context("default")
    assert (await box.run("'kept' in globals()")).text == "False"
    await box.remove_context(context)
    await box.close()


def test_one_that_cannot_begin_is_not_there(box: Sandbox) -> None:
    """A directory that is none is told as such, and nothing is left of the attempt."""
    before = set(box.contexts())
    with pytest.raises(errors.InvalidRequestError, match="/no/such"):
        box.create_context(cwd="/no/such")
    assert set(box.contexts()) == before


@pytest.mark.criu
def test_they_are_suspended_and_forked_with_all_they_have(at_home: None) -> None:
    """Variables, those of another language too, an open file; clones have their own from then on."""
    with contextlib.ExitStack() as stack:
        box = stack.enter_context(Sandbox(preload=(), timeout=None))
        context = box.create_context(cwd="/tmp")
        set_up = "import os, random\nkept = [1]\nfile = open('/tmp/kept', 'w+'); pid = os.getpid()"
        assert box.run(set_up, context=context).error is None
        assert box.run(as_python("shell=kept", "bash"), context=context).error is None
        box.suspend()
        assert box.run(as_python("echo $shell; shell=again", "bash"), context=context).stdout == "kept\n"
        assert box.run("kept.append(2); kept, pid == os.getpid(), os.getcwd()", context=context).text == (
            "([1, 2], True, '/tmp')"
        )
        box.run("kept = 'default'")
        clones = [stack.enter_context(clone) for clone in box.fork(2)]
        for number, one in enumerate((box, *clones)):
            assert one.run(f"kept.append({number}); file.write('x'); kept", context=context).text == f"[1, 2, {number}]"
            assert one.run("kept").text == "'default'"
            assert one.run(as_python("echo $shell", "bash"), context=context).stdout == "again\n"
        numbers = {one.run("random.random()", context=context).text for one in (box, *clones)}
        assert len(numbers) == 3
        with pytest.raises(errors.SandboxDiedError):
            clones[0].run("os._exit(1)", context=context)
        assert clones[1].run("len(kept)", context=context).text == "3"
        clones[1].remove_context(context)
        assert box.run("len(kept)", context=context).text == "3"


FLOOD = "for n in range(4000):\n    print('x' * 10_000)\nopen('/tmp/flooded', 'w').close()"
PIECES = FLOOD.replace("10_000)", "10_000, flush=True)")


async def test_who_reads_slowly_holds_up_nobody_else(at_home: None, shared_box: Sandbox) -> None:
    """A run whose output of 40 MB nobody takes: what the others print comes whole, and so do their ends."""
    box = await AsyncSandbox.connect(shared_box.id)
    one, two = [await box.create_context() for _ in range(2)]
    stands, go_on = asyncio.Event(), asyncio.Event()

    async def stand_still(text: str) -> None:
        stands.set()
        await go_on.wait()

    flooding = asyncio.create_task(box.run(PIECES, context=one, on_stdout=stand_still))
    try:
        await stands.wait()
        for number in range(20):
            for where in (two, "default"):
                done = await box.run(f"print('here', {number})", context=where)
                assert (done.stdout, done.stderr, done.error) == (f"here {number}\n", "", None)
        while not await box.files.exists("/tmp/flooded"):  # It was read on, and goes to its end.
            assert (await box.run("print('on')")).stdout == "on\n"
        go_on.set()
        flooded = await flooding
        assert flooded.error is None
        assert "pieces of output were lost" in flooded.stderr
        assert flooded.stdout.startswith("x" * 10_000)
    finally:
        go_on.set()
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        await asyncio.gather(*(box.remove_context(each) for each in (one, two)))
        await box.close()


def test_who_reads_slowly_alone_misses_nothing(box: Sandbox, context: str) -> None:
    """The kernel is read no faster than its one follower reads, so all of 40 MB is there."""
    seen: list[int] = []

    def dawdle(text: str) -> None:
        seen.append(len(text))
        if len(seen) % 500 == 0:
            time.sleep(0.05)

    done = box.run(FLOOD, context=context, on_stdout=dawdle)
    assert (len(done.stdout), done.stderr) == (4000 * 10_001, "")
    assert sum(seen) == len(done.stdout)
