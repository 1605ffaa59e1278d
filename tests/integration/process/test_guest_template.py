"""The fork server: what it imports, what it leaves out and says so, and when kernels start without it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.process.guest import Guest, gone, running_guest
from tests.leaks import Places

MODULES = {
    "fine": "value = 1",
    "broken": "raise ValueError('not today')",
    "unsatisfied": "import nothing_of_that_name",
    "leaving": "import sys; sys.exit(4)",
    "dying": "import os; os._exit(5)",
    "crashing": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "threaded": "import threading, time; threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
    "briefly_threaded": "import threading; t = threading.Thread(target=int); t.start(); t.join()",
    "curious": "from IPython import get_ipython; shell = get_ipython()",
    "chatty": "import sys, logging; print('x' * 100000); stream = sys.stderr; handler = logging.StreamHandler()",
    "setting": "import os; os.environ['SET_BY_IMPORT'] = 'yes'; os.environ.setdefault('GIVEN', 'import')",
    "slow": "import time; time.sleep(1000)",
    "counting": "import os; open(os.environ['COUNT'], 'a').write('.')",
}


@pytest.fixture
async def guest(places: Places) -> AsyncIterator[Guest]:
    modules = places.root / "m"
    modules.mkdir()
    for name, code in MODULES.items():
        (modules / f"{name}.py").write_text(code)
    env = {"PYTHONPATH": str(modules), "COUNT": str(places.root / "count")}
    async with running_guest(places.root, env=env) as running:
        yield running


async def test_modules_are_imported_in_order_and_told(guest: Guest) -> None:
    """Each import is announced when it begins; the kernel finds the modules loaded."""
    ready = await guest.prepared("fine", "json", "colorsys")
    assert ready["state"] == "ready"
    assert ready["imported"] == ["fine", "json", "colorsys"]
    assert ready["failed"] == {}
    assert ready["seconds"] > 0
    begun = [e["importing"] for e in guest.events if e["event"] == "template" and e["importing"]]
    assert begun == ["ipykernel", "fine", "json", "colorsys"]
    kernel = await guest.kernel()
    assert kernel.started.started_from == "template"
    assert await kernel.value("[name in __import__('sys').modules for name in ('fine', 'colorsys')]") == [True, True]


async def test_what_is_not_installed_is_no_failure(guest: Guest) -> None:
    """A module that the environment does not have is left out without a word."""
    ready = await guest.prepared("no_such_module", "no_such.package", "json.no_such", "fine")
    assert ready["state"] == "ready"
    assert ready["imported"] == ["fine"]
    assert ready["failed"] == {}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "ValueError: not today"),
        ("unsatisfied", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("leaving", "SystemExit: 4"),
    ],
)
async def test_a_failing_import_is_named_and_left_out(guest: Guest, name: str, reason: str) -> None:
    """Its error's last line is told, the others are imported, kernels come from the template."""
    ready = await guest.prepared(name, "fine")
    assert ready["state"] == "ready"
    assert ready["failed"] == {name: reason}
    assert ready["imported"] == ["fine"]
    assert (await guest.kernel()).started.started_from == "template"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dying", "ended with exit code 5"),
        ("crashing", "killed by signal 11"),
        ("threaded", "thread"),
        ("curious", "running notebook"),
    ],
)
async def test_an_import_that_spoils_the_process_is_tried_without(guest: Guest, name: str, reason: str) -> None:
    """A module that ends the process, or leaves it unfit for forks, is named; the next try succeeds without it."""
    ready = await guest.prepared("fine", name, "colorsys")
    assert ready["state"] == "ready"
    assert list(ready["failed"]) == [name]
    assert reason in ready["failed"][name]
    assert ready["imported"] == ["fine", "colorsys"]
    states = [e["state"] for e in guest.events if e["event"] == "template"]
    assert "failed" in states
    kernel = await guest.kernel()
    assert kernel.started.started_from == "template"
    assert not await kernel.value(f"{name!r} in __import__('sys').modules")


async def test_several_culprits_are_all_found(guest: Guest) -> None:
    """One after the other is left out until what remains imports."""
    ready = await guest.prepared("dying", "fine", "threaded", "broken", "crashing")
    assert ready["state"] == "ready"
    assert sorted(ready["failed"]) == ["broken", "crashing", "dying", "threaded"]
    assert ready["imported"] == ["fine"]


async def test_a_thread_that_has_ended_is_no_harm(guest: Guest) -> None:
    """Only threads that stay make a process unfit."""
    ready = await guest.prepared("briefly_threaded")
    assert ready["imported"] == ["briefly_threaded"]


async def test_while_it_imports_kernels_start_cold_and_say_why(guest: Guest) -> None:
    """A kernel does not wait for the template."""
    await guest.channel.prepare(["slow"], name="test")
    await guest.event(event="template", importing="slow")
    kernel = await guest.kernel()
    assert kernel.started.started_from == "cold"
    assert "importing" in kernel.started.why


async def test_without_a_template_kernels_start_cold(guest: Guest) -> None:
    """That is so from the beginning, and `cold` can be asked for at any time."""
    first = await guest.kernel()
    assert first.started.started_from == "cold"
    await guest.prepared()
    second = await guest.kernel("cold")
    assert (second.started.started_from, second.started.why) == ("cold", "")
    assert (await guest.kernel()).started.started_from == "template"


async def test_another_prepare_replaces_the_template(guest: Guest) -> None:
    """The new one serves; kernels of the old one live on, and their end is still told."""
    await guest.prepared("fine")
    old = await guest.kernel()
    servers = guest.children()
    await guest.prepared("colorsys")
    for pid in servers:
        assert gone(pid)
    new = await guest.kernel()
    assert await new.value("'fine' in __import__('sys').modules") is False
    assert await old.value("'fine' in __import__('sys').modules") is True
    await guest.channel.signal(old.pid, signal.SIGKILL)
    assert (await guest.event(event="kernel", pid=old.pid, state="exited"))["exit_code"] == 137


async def test_a_template_that_dies_later_leaves_its_kernels(guest: Guest) -> None:
    """When the ready fork server is killed the state says so and the next kernel starts cold."""
    await guest.prepared("fine")
    kernel = await guest.kernel()
    (server,) = (pid for pid in guest.children() if pid != kernel.pid)
    os.kill(server, signal.SIGKILL)
    failed = await guest.event(event="template", state="failed")
    assert "killed by signal 9" in failed["failed"]["fork server"]
    assert await kernel.value("1 + 1") == 2
    assert (await guest.kernel()).started.started_from == "cold"
    await guest.channel.signal(kernel.pid, signal.SIGTERM)
    assert (await guest.event(event="kernel", pid=kernel.pid, state="exited"))["exit_code"] == 143


async def test_a_listener_that_comes_later_is_told_the_present(guest: Guest) -> None:
    """`events` begins with the template's state and the living kernels."""
    await guest.prepared("fine")
    kernel = await guest.kernel()
    seen = []
    async with asyncio.timeout(60):
        async for event in guest.channel.events():
            seen.append(event)
            if len(seen) == 2:
                break
    assert (seen[0]["event"], seen[0]["state"], seen[0]["imported"]) == ("template", "ready", ["fine"])
    assert seen[1] == {"event": "kernel", "pid": kernel.pid, "state": "running"}


async def test_streams_kept_by_an_import_are_the_kernel_s(guest: Guest) -> None:
    """A module that has kept sys.stderr at import writes into the notebook, and its own noise goes nowhere."""
    await guest.prepared("chatty")
    kernel = await guest.kernel()
    output = await kernel.run(
        "import chatty, logging; print('a', file=chatty.stream); chatty.handler.stream.write('b')"
    )
    assert output.text == "a\nb"


async def test_variables_set_by_an_import_are_set_in_the_kernel(guest: Guest) -> None:
    """What an import sets is there afterwards, and does not overrule what the kernel was given."""
    await guest.prepared("setting")
    kernel = await guest.kernel(env={"GIVEN": "kernel"})
    assert await kernel.value("[__import__('os').environ[n] for n in ('SET_BY_IMPORT', 'GIVEN')]") == ["yes", "kernel"]


async def test_a_variable_that_is_read_at_start_needs_its_own_interpreter(guest: Guest) -> None:
    """A kernel with another PYTHONHASHSEED than the template's starts cold, by name; with the same one it does not."""
    await guest.prepared("fine", env={"PYTHONHASHSEED": "7", "OTHER": "x"})
    assert (await guest.kernel(env={"PYTHONHASHSEED": "7", "OTHER": "y"})).started.started_from == "template"
    other = await guest.kernel(env={"PYTHONHASHSEED": "8"})
    assert other.started.started_from == "cold"
    assert "PYTHONHASHSEED" in other.started.why
    assert await other.value("__import__('os').environ['PYTHONHASHSEED']") == "8"


async def test_each_module_is_imported_once_for_all_kernels(guest: Guest, places: Places) -> None:
    """Three kernels from one template run a module's code once."""
    await guest.prepared("counting")
    for _ in range(3):
        await (await guest.kernel()).run("import counting")
    assert (places.root / "count").read_text() == "."


async def test_an_environment_without_ipykernel_is_said(places: Places) -> None:
    """The template fails by name of the module; a kernel gives an error with the cure, and nothing is left."""
    bare = places.root / "bare"
    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=60
    )
    async with running_guest(places.root, python=str(bare / "bin" / "python")) as guest:
        failed = await guest.prepared("json")
        assert failed["state"] == "failed"
        assert "ipykernel" in str(failed["failed"])
        with pytest.raises(Exception, match="ipykernel") as caught:
            await guest.kernel()
        assert "pip install ipykernel" in str(caught.value)


def test_the_kernel_s_own_modules_leave_the_user_s_alone() -> None:
    """What every template imports brings neither numpy nor matplotlib nor pandas along."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from kernel import stack; stack.load();"
        "print([m for m in ('numpy', 'matplotlib', 'pandas', 'torch') if m in sys.modules])"
    )
    tree = Path(__file__).resolve().parents[3] / "sandbox" / "guest"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tree)], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.strip() == "[]"
