"""The kernel that is up before it is asked for: when there is one, and that nobody can tell."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.process.guest import Guest, gone, running_guest
from tests.leaks import Places

SETTING = "c.InteractiveShellApp.exec_lines = ['configured = 5']"


@pytest.fixture
async def guest(places: Places) -> AsyncIterator[Guest]:
    async with running_guest(places.root) as running:
        yield running


async def spare(guest: Guest, *, other_than: int = 0) -> int:
    """The pid of the kernel that waits, once it does: all five of its sockets are bound then."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        names = [name for name in os.listdir(guest.run) if name.startswith(".e") and name.endswith("-5")]
        for name in names:
            if (pid := int(name[2:-2])) != other_than and not list(guest.run.glob(f".e{pid}.json")):
                return pid
        await asyncio.sleep(0.02)
    pytest.fail("no kernel came up in advance")


def profile(places: Places) -> Path:
    made = places.root / "ipython" / "profile_default" / "startup"
    made.mkdir(parents=True, exist_ok=True)
    return made.parent


async def test_the_next_kernel_is_there_already(guest: Guest) -> None:
    """After the template is ready, and again after each kernel's end, the next start only takes it."""
    await guest.prepared()
    waiting = await spare(guest)
    first = await guest.kernel()
    assert first.pid == waiting
    assert first.started.sockets == f".e{waiting}"  # A renamed socket could not be saved with its kernel.
    content = json.loads((guest.run / "k1.json").read_text())
    assert content["ip"] == str(guest.run / first.started.sockets)
    second = await guest.kernel()  # While one lives no other waits.
    assert await second.value("1 + 1") == 2
    for kernel in (first, second):
        await guest.channel.signal(kernel.pid, signal.SIGKILL)
    waiting = await spare(guest, other_than=first.pid)
    assert (await guest.kernel()).pid == waiting


async def test_it_knows_its_names_directory_and_session(guest: Guest, places: Places) -> None:
    """Connection file, working directory, history of directories, session name and variables are the request's."""
    await guest.prepared()
    waiting = await spare(guest)
    work = places.root / "w"
    work.mkdir()
    kernel = await guest.kernel(env={"JPY_SESSION_NAME": "/a/b.ipynb", "MINE": "x"}, cwd=str(work))
    assert kernel.pid == waiting
    code = (
        "import ipykernel, os; shell = get_ipython()\n"
        "print([ipykernel.get_connection_file(), shell.config.IPKernelApp.connection_file, os.getcwd(),"
        " shell.starting_dir, str(_dh[0]), __session__, os.environ['MINE'], os.environ['PAGER']])"
    )
    output = await kernel.run(code)
    file = str(guest.run / "k1.json")
    assert output.text.strip() == str([file, file, str(work), str(work), str(work), "/a/b.ipynb", "x", "cat"])
    assert "k1.json" in (await kernel.run("%connect_info")).text
    assert "__session__" not in (await kernel.run("%who")).text


async def test_startup_files_run_in_the_kernel_that_they_are_for(guest: Guest, places: Places) -> None:
    """Where the user has some, no kernel comes up in advance: they run once, with the request's variables."""
    note = places.root / "note"
    code = f"import os; open({str(note)!r}, 'a').write(os.environ.get('MINE', 'none') + os.getcwd())"
    (profile(places) / "startup" / "0.py").write_text(code)
    await guest.prepared()
    kernel = await guest.kernel(env={"MINE": "x"}, cwd="/usr")
    assert kernel.started.started_from == "template"
    assert note.read_text() == "x/usr"


async def test_configuration_that_comes_later_is_heeded(guest: Guest, places: Places) -> None:
    """A kernel that was made before the user wrote a configuration is not used."""
    await guest.prepared()
    waiting = await spare(guest)
    (profile(places) / "ipython_config.py").write_text(SETTING)
    kernel = await guest.kernel()
    assert kernel.pid != waiting
    assert kernel.started.started_from == "template"
    assert await kernel.value("configured") == 5
    assert gone(waiting)


async def test_another_ipython_directory_is_heeded(guest: Guest, places: Places) -> None:
    """What IPython reads on its way up decides whether the waiting kernel fits."""
    other = places.root / "other" / "profile_default"
    other.mkdir(parents=True)
    (other / "ipython_config.py").write_text(SETTING)
    await guest.prepared()
    waiting = await spare(guest)
    kernel = await guest.kernel(env={"IPYTHONDIR": str(other.parent)})
    assert kernel.pid != waiting
    assert await kernel.value("configured") == 5


async def test_without_it_kernels_start_as_well(guest: Guest) -> None:
    """When the waiting kernel is killed the next one is forked anew, and nothing waits any more."""
    await guest.prepared()
    waiting = await spare(guest)
    os.kill(waiting, signal.SIGKILL)
    assert gone(waiting)
    kernel = await guest.kernel()
    assert kernel.started.started_from == "template"
    assert await kernel.value("1 + 1") == 2
    assert not list(guest.run.glob(f".e{waiting}*"))


async def test_it_goes_with_its_template(guest: Guest) -> None:
    """When the template is replaced, the kernel that waited ends and takes its sockets along."""
    await guest.prepared()
    waiting = await spare(guest)
    await guest.prepared("json")
    assert gone(waiting)
    assert not list(guest.run.glob(f".e{waiting}*"))
    assert await spare(guest, other_than=waiting) != waiting


async def test_a_request_that_comes_while_it_grows_waits_for_it(guest: Guest) -> None:
    """The start that follows `ready` at once is served by it too."""
    for _ in range(3):
        await guest.prepared()
        kernel = await guest.kernel()
        assert kernel.started.started_from == "template"
        assert await kernel.value("1 + 1") == 2
        await guest.channel.signal(kernel.pid, signal.SIGKILL)
        await guest.event(event="kernel", pid=kernel.pid, state="exited")
