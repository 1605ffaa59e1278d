"""The provisioner in jupyter_client's hands: each of its promises, and each pitfall that others fell into."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import AsyncKernelManager, KernelManager, start_new_kernel

from benchmarks.server import end_keeper
from tests.jupyter.warmcell_kernels import (
    TIMEOUT_S,
    configure,
    connected,
    kernelspec,
    provisioner_of,
    said,
    started,
    until,
)
from tests.leaks import Places
from warmcell.extension.server.keeper_link import KeeperLink as ServerLink
from warmcell.kernel_provisioner import provisioner as provisioner_module
from warmcell.kernel_provisioner.keeper_link import KeeperLink
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import InvalidRequestError, WarmcellError
from warmcell.sandbox.paths import Paths

pytestmark = pytest.mark.bubblewrap


@pytest.fixture(autouse=True)
def keeper(places: Places) -> Iterator[None]:
    """A keeper that prepares nothing, for this test alone."""
    configure(places)
    kernelspec(places)
    yield
    end_keeper(places)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    made = tmp_path / "work"
    made.mkdir()
    return str(made)


class Calls:
    """What the provisioner asks of the keeper, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        request = KeeperClient._request

        async def noting(client: KeeperClient, method: str, path: str, *rest: Any) -> Any:
            if path != "/status":
                self.seen.append(
                    f"{method} {path.split('?')[0].rpartition('/')[2] if method == 'POST' else ''}".strip()
                )
            return await request(client, method, path, *rest)

        monkeypatch.setattr(KeeperClient, "_request", noting)

    def take(self) -> list[str]:
        """Those since the last time."""
        found, self.seen = self.seen, []
        return found


def keeper_pid(places: Places) -> int:
    return int(json.loads((places.runtime / "keeper.lock").read_text())["pid"])


async def sandboxes(places: Places) -> list[dict[str, Any]]:
    async with await KeeperClient.connect(start=False) as client:
        found: list[dict[str, Any]] = (await client.get("/sandboxes"))["sandboxes"]
        return found


async def test_a_kernel_lives_in_its_notebooks_folder(folder: str, places: Places) -> None:
    """It runs, sees its folder under the same path and no other file of the user, and is gone at the end."""
    marker = places.root / "marker"
    marker.write_text("secret")
    async with started(cwd=folder) as manager, connected(manager) as client:
        assert await said(client, "import os; print(os.getcwd())") == folder
        assert await said(client, f"open({str(marker)!r})") == "FileNotFoundError"
        await said(client, "open('made', 'w').write('x')")
        assert os.path.exists(f"{folder}/made")
        (info,) = await sandboxes(places)
        assert (info["kernel_id"], info["network"], info["isolated"]) == (manager.kernel_id, "none", True)
    assert await sandboxes(places) == []
    assert not list((places.runtime / "k").iterdir())


async def test_what_each_action_asks_of_the_keeper(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart ends and starts; only the end deletes, so a restart releases no lease; nothing is polled in vain."""
    calls = Calls(monkeypatch)
    async with started(cwd=folder) as manager:
        assert calls.take() == ["POST kernels"]
        await manager.restart_kernel(now=False)
        assert calls.take() == ["POST end", "POST kernels"]
        await manager.restart_kernel(now=True)
        assert calls.take() == ["POST end", "POST kernels"]
        await manager.interrupt_kernel()
        assert calls.take() == []
        await manager.shutdown_kernel()
        assert calls.take() == ["POST end", "DELETE"]
        provisioner = provisioner_of(manager)
        await provisioner.cleanup(restart=False)
        await provisioner.cleanup(restart=False)
        assert not provisioner.has_process


@pytest.mark.parametrize("now", [False, True])
async def test_a_restart_keeps_sandbox_connection_and_clients(folder: str, now: bool) -> None:
    """The same sandbox, ports and key; memory begins anew; clients notice nothing (JC#1061: `kill` does not know)."""
    async with started(cwd=folder) as manager, connected(manager) as client:
        before, box = manager.get_connection_info(), provisioner_of(manager).sandbox
        await said(client, "x = 1")
        await manager.restart_kernel(now=now)
        after = provisioner_of(manager).sandbox
        assert box is not None
        assert after is not None
        assert (after.id, after.generation) == (box.id, box.generation + 1)
        assert manager.get_connection_info() == before
        assert await said(client, "print(x)") == "NameError"
        async with connected(manager) as new:
            assert await said(new, "print('new')") == "new"


async def test_interrupts_are_messages(folder: str) -> None:
    """Whatever the kernelspec says: a signal from outside would have to find its way into the sandbox."""
    async with started(cwd=folder) as manager, connected(manager) as client:
        assert manager.kernel_spec is not None
        assert manager.kernel_spec.interrupt_mode == "message"
        begun = asyncio.Event()
        running = asyncio.create_task(
            client.execute_interactive(
                "print(1, flush=True)\nimport time; time.sleep(60)",
                output_hook=lambda message: begun.set() if message["msg_type"] == "stream" else None,
                timeout=TIMEOUT_S,
                stop_on_error=False,
            )
        )
        await asyncio.wait_for(begun.wait(), TIMEOUT_S)
        began = time.monotonic()
        await manager.interrupt_kernel()
        assert (await running)["content"]["ename"] == "KeyboardInterrupt"
        assert time.monotonic() - began < 5
        await provisioner_of(manager).send_signal(signal.SIGINT)
        assert await said(client, "print('alive')") == "alive"


async def test_poll_is_honest(folder: str) -> None:
    """None while it runs, then its own exit code; `wait` returns it and has_process is false afterwards."""
    async with started(cwd=folder) as manager, connected(manager) as client:
        provisioner = provisioner_of(manager)
        assert await provisioner.poll() is None
        client.execute("import os; os._exit(7)")
        assert await asyncio.wait_for(provisioner.wait(), TIMEOUT_S) == 7
        assert await provisioner.poll() == 7
        assert not provisioner.has_process


async def test_a_keeper_that_does_not_answer_says_nothing_of_the_kernel(
    folder: str, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown is None, not dead: otherwise each hiccup would be a storm of restarts."""
    monkeypatch.setattr(provisioner_module, "POLL_TIMEOUT_S", 0.3)
    async with started(cwd=folder) as manager:
        pid = keeper_pid(places)
        os.kill(pid, signal.SIGSTOP)
        try:
            assert await provisioner_of(manager).poll() is None
        finally:
            os.kill(pid, signal.SIGCONT)
        assert await manager.is_alive()


async def test_a_keeper_that_is_gone_takes_the_kernel_along(folder: str, places: Places) -> None:
    """Then dead is the truth; a restart finds a new keeper and the clients' connections again."""
    async with started(cwd=folder) as manager, connected(manager) as client:
        os.kill(keeper_pid(places), signal.SIGKILL)
        await until(lambda: _not(manager.is_alive()))
        await manager.restart_kernel(now=True)
        await client.wait_for_ready(timeout=TIMEOUT_S)
        assert await said(client, "print('again')") == "again"


async def test_a_restarter_that_asks_during_a_shutdown_hears_of_no_death(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its poll may be answered after the shutdown; a death told then would start the kernel again."""
    monkeypatch.setattr(provisioner_module, "FRESH_S", 0.0)
    async with started(cwd=folder) as manager:
        provisioner = provisioner_of(manager)
        asked, answer = asyncio.Event(), asyncio.Event()
        ask = KeeperLink.ask

        async def late(link: KeeperLink, request: Any, **kwargs: Any) -> Any:
            if asyncio.current_task() is not polling:
                return await ask(link, request, **kwargs)
            asked.set()
            await answer.wait()
            return await ask(link, request, **kwargs)

        monkeypatch.setattr(KeeperLink, "ask", late)
        polling = asyncio.create_task(provisioner.poll())
        await asked.wait()
        await provisioner.shutdown_requested(restart=False)
        answer.set()
        assert await polling is None
        assert await provisioner.poll() is not None


async def test_a_kernel_that_dies_is_restarted(folder: str) -> None:
    """jupyter_client's restarter does it, with the same connection; a client hears the next kernel."""
    made = {"config": _config(KernelRestarter={"time_to_dead": 0.2})}
    async with started(cwd=folder, watched=True, made=made) as manager, connected(manager) as client:
        box = provisioner_of(manager).sandbox
        restarted = asyncio.Event()
        manager.add_restart_callback(restarted.set)
        client.execute("import os; os.kill(os.getpid(), 9)")
        await asyncio.wait_for(restarted.wait(), TIMEOUT_S)
        assert await said(client, "print('back')") == "back"
        await until(lambda: _is(provisioner_of(manager).sandbox is not box))
        await manager.ready
        assert box is not None
        now = provisioner_of(manager).sandbox
        assert now is not None
        assert (now.id, now.generation) == (box.id, box.generation + 1)


async def test_new_ports_are_served(folder: str) -> None:
    """The restarter asks for them when a kernel died early; with ipc nothing changes, with tcp all five do."""
    async with started(cwd=folder) as manager:
        before = manager.ports
        await manager.restart_kernel(newports=True)
        assert manager.ports == before
    async with started(cwd=folder, made={"config": _config(KernelManager={"transport": "tcp"})}) as manager:
        before = manager.ports
        await manager.restart_kernel(newports=True)
        assert not set(manager.ports) & set(before)
        async with connected(manager) as client:
            assert await said(client, "print(manager := 1)") == "1"


@pytest.mark.parametrize("made", [{"config": "tcp"}, {"ip": "0.0.0.0"}])
async def test_who_insists_on_tcp_gets_it(folder: str, made: dict[str, Any]) -> None:
    """Also at an address that plain Jupyter refuses; the key still protects it."""
    if made.get("config") == "tcp":
        made = {"config": _config(KernelManager={"transport": "tcp"})}
    async with started(cwd=folder, made=made) as manager:
        assert manager.transport == "tcp"
        async with connected(manager) as client:
            assert await said(client, "print('tcp')") == "tcp"


async def test_a_long_path_of_the_connection_file_does_not_matter(folder: str, tmp_path: Path) -> None:
    """Sockets do not lie beside it; without one nothing is relative to whoever's directory."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    for file in (str(deep / "kernel.json"), ""):
        async with started(cwd=folder, made={"transport": "ipc", "connection_file": file}) as manager:
            assert Path(manager.ip).is_absolute()
            async with connected(manager) as client:
                assert await said(client, "print(1)") == "1"


async def test_a_hung_kernel_is_ended_soon(folder: str) -> None:
    """One that holds the GIL answers nothing; neither its restart nor its end takes jupyter_client's five seconds.

    A machine that does something else meanwhile gets three attempts.
    """
    hang = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    slowest = []
    for _ in range(3):
        took = []
        async with started(cwd=folder) as manager, connected(manager) as client:
            for action in (manager.restart_kernel, manager.shutdown_kernel):
                client.execute(hang)
                await asyncio.sleep(0.3)
                began = time.monotonic()
                await action()
                took.append(time.monotonic() - began)
                if action == manager.restart_kernel:
                    assert await said(client, "print('new')") == "new"
        slowest.append(max(took))
        if slowest[-1] < 4:
            break
    assert min(slowest) < 4, slowest


async def test_only_allowed_variables_reach_the_kernel(folder: str, places: Places) -> None:
    """Jupyter hands over its whole environment, tokens included."""
    kernelspec(places, name="allow", env=["ALLOWED"])
    env = {**os.environ, "ALLOWED": "yes", "JUPYTER_TOKEN": "no", "AWS_SECRET_ACCESS_KEY": "no"}
    async with started(name="allow", cwd=folder, env=env) as manager, connected(manager) as client:
        found = await said(client, "import os; print(dict(os.environ))")
        assert "'ALLOWED': 'yes'" in found
        assert "TOKEN" not in found
        assert "AWS" not in found
        manager.update_env(env={"ALLOWED": "changed"})
        await manager.restart_kernel()
        assert await said(client, "import os; print(os.environ['ALLOWED'])") == "changed"


async def test_the_key_shows_nowhere(folder: str) -> None:
    """On no command line, in no environment of a process of ours, and not inside the sandbox."""
    async with started(cwd=folder) as manager, connected(manager) as client:
        key = manager.session.key
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                for what in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        assert key not in (entry / what).read_bytes()
        code = "import glob; print([open(f).read() for f in glob.glob('/run/warmcell/*.json')])"
        assert key.decode() not in await said(client, code)


async def test_the_interpreter_is_the_kernelspecs(folder: str, places: Places) -> None:
    """Not that of whoever starts it, which jupyter_client puts into the command."""
    kernelspec(places, name="other", python=sys.executable.replace("/python", "/./python"))
    async with started(name="other", cwd=folder) as manager:
        box = provisioner_of(manager).sandbox
        assert box is not None
        assert "/./" in box.python


async def test_a_notebooks_choice_is_applied_and_the_pages_goes_over_it(folder: str, places: Places) -> None:
    """From the file's metadata at the start, from the page at a restart; what shapes a sandbox makes a new one."""
    notebook = Path(folder) / "a.ipynb"
    notebook.write_text(json.dumps({"metadata": {"warmcell": {"memory": "2GiB"}}}))
    env = {**os.environ, "JPY_SESSION_NAME": str(notebook)}
    async with started(cwd=folder, env=env) as manager, connected(manager) as client:
        first = provisioner_of(manager).sandbox
        assert first is not None
        assert first.limits["memory"].value == 2 * 2**30
        assert first.notebook == str(notebook)
        provisioner_of(manager).settings = {"memory": "3GiB"}
        await manager.restart_kernel()
        second = provisioner_of(manager).sandbox
        assert second is not None
        assert second.limits["memory"].value == 3 * 2**30
        assert second.id != first.id
        assert await said(client, "print('here')") == "here"
        assert len(await sandboxes(places)) == 1


async def test_a_launch_that_fails_says_why_and_how_to_cure_it(folder: str, places: Places) -> None:
    """Message and hint in one sentence, as the page shows it; nothing is left, and the next start works."""
    notebook = Path(folder) / "a.ipynb"
    manager = AsyncKernelManager(kernel_name="bare")
    for choice, says in (({"gpu": "A100"}, "A100"), ({"gpu": 7}, str(notebook)), ({"memory": "1KiB"}, "memory")):
        notebook.write_text(json.dumps({"metadata": {"warmcell": choice}}))
        with pytest.raises(WarmcellError) as caught:
            await manager.start_kernel(cwd=folder, env={**os.environ, "JPY_SESSION_NAME": str(notebook)})
        assert says in str(caught.value)
        assert caught.value.hint
        assert str(caught.value).endswith(caught.value.hint)
        assert not manager.has_kernel
    await manager.start_kernel(cwd=folder)
    await manager.shutdown_kernel()


async def test_a_restart_that_fails_leaves_a_dead_kernel_that_can_be_started_again(folder: str) -> None:
    """With another choice it comes back, for the same clients."""
    async with started(cwd=folder) as manager, connected(manager) as client:
        provisioner = provisioner_of(manager)
        provisioner.settings = {"gpu": "no such kind"}
        with pytest.raises(WarmcellError):
            await manager.restart_kernel()
        assert not await manager.is_alive()
        provisioner.settings = {}
        await manager.restart_kernel()
        assert await said(client, "print('back')") == "back"


async def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    """Its name is in the message."""
    with pytest.raises(InvalidRequestError, match="nowhere"):
        await AsyncKernelManager(kernel_name="bare").start_kernel(cwd=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("mode", "says"), [("ro", "OSError"), ("none", "FileNotFoundError")])
async def test_how_the_folder_is_given(folder: str, places: Places, mode: str, says: str) -> None:
    """Read-only, or not at all."""
    kernelspec(places, name=mode, workspace=mode)
    async with started(name=mode, cwd=folder) as manager, connected(manager) as client:
        assert await said(client, f"open({folder + '/x'!r}, 'w')") == says
        inside = provisioner_of(manager).resolve_path("x")
        assert inside is None


async def test_paths_of_the_kernel_are_resolved_in_its_folder(folder: str) -> None:
    """For the debugger and go-to-file; never outside of the folder."""
    (Path(folder) / "a.py").write_text("")
    async with started(cwd=folder) as manager:
        assert manager.resolve_path("a.py") == f"{folder}/a.py"
        assert manager.resolve_path("missing.py") is None
        assert manager.resolve_path("../../../etc/passwd") is None
        assert manager.resolve_path("/etc/passwd") is None


async def test_two_kernels_share_no_connection(folder: str) -> None:
    """The base class keeps one dictionary for all provisioners."""
    async with started(cwd=folder) as one, started(cwd=folder) as other:
        first, second = provisioner_of(one), provisioner_of(other)
        assert first.connection_info is not second.connection_info
        assert one.ip != other.ip
        async with connected(one) as client, connected(other) as stranger:
            await said(client, "open('/tmp/mine', 'w')")
            assert await said(stranger, "open('/tmp/mine')") == "FileNotFoundError"


async def test_kernels_of_one_process_share_their_connection_to_the_keeper() -> None:
    """It stays while one of them needs it, and each finds the next keeper."""
    one, other = KeeperLink(Paths.default()), KeeperLink(Paths.default())
    used: list[KeeperClient] = []

    async def pid(client: KeeperClient) -> int:
        used.append(client)
        found: int = (await client.get("/status"))["pid"]
        return found

    first = await one.ask(pid, start=True)
    assert await other.ask(pid) == first
    await one.close()
    assert await other.ask(pid) == first
    assert await one.ask(pid) == first
    assert used == [used[0]] * 4
    os.kill(first, signal.SIGKILL)
    second = await other.ask(pid, start=True)
    assert second != first
    assert await one.ask(pid, start=True) == second
    await one.close()
    await other.close()


async def test_the_kernels_of_a_server_use_the_connection_that_its_pages_have() -> None:
    """A kernel that is started beside an open page connects to nobody; the end of either leaves it to the other."""
    page, kernel = ServerLink(), KeeperLink(Paths.default())
    pid = (await page.get("/status"))["pid"]
    of_page, of_kernel = await page._connected(), await kernel.client()
    assert of_kernel is of_page
    await page.close()
    assert (await (await kernel.client()).get("/status"))["pid"] == pid
    assert (await page.get("/status"))["pid"] == pid
    await kernel.close()
    assert (await of_page.get("/status"))["pid"] == pid
    await page.close()


async def test_a_kernel_that_was_just_started_is_not_asked_for(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A websocket that opens right after a start costs no request; whoever has ended the kernel hears that it ended."""
    calls = Calls(monkeypatch)
    monkeypatch.setattr(provisioner_module, "FRESH_S", TIMEOUT_S)
    async with started(cwd=folder) as manager:
        calls.seen.clear()
        assert await manager.is_alive()
        assert calls.seen == []
        await manager.signal_kernel(signal.SIGKILL)
        await until(lambda: _not(manager.is_alive()))
        assert calls.seen


def test_a_synchronous_manager_works(folder: str) -> None:
    """papermill's way: no event loop of the caller's, so calls come from loops that change."""
    manager, client = start_new_kernel(kernel_name="bare", cwd=folder)
    try:
        assert isinstance(manager, KernelManager)
        client.execute("x = 1")
        assert client.get_shell_msg(timeout=TIMEOUT_S)["content"]["status"] == "ok"
        manager.restart_kernel()
        client.wait_for_ready(timeout=TIMEOUT_S)
        assert manager.is_alive()
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    assert not manager.is_alive()


async def test_a_kernel_ends_with_the_process_that_asked_for_it(folder: str, places: Places) -> None:
    """A script that is killed leaves no sandbox."""
    code = (
        "import sys, time\nfrom jupyter_client.manager import start_new_kernel\n"
        f"start_new_kernel(kernel_name='bare', cwd={folder!r})\nprint('up', flush=True)\ntime.sleep(60)\n"
    )
    script = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert script.stdout is not None
    assert await asyncio.wait_for(script.stdout.readline(), TIMEOUT_S) == b"up\n"
    async with await KeeperClient.connect(start=False) as client:
        assert len((await client.get("/kernels"))["kernels"]) == 1
        script.kill()
        await script.wait()
        await until(lambda: _is_empty(client))
        await until(lambda: _is(not any((places.runtime / "k").iterdir())))


async def _is(answer: bool) -> bool:
    return answer


async def _not(answer: Awaitable[bool]) -> bool:
    return not await answer


async def _is_empty(client: KeeperClient) -> bool:
    return not (await client.get("/kernels"))["kernels"]


def _config(**classes: dict[str, object]) -> Any:
    from traitlets.config import Config

    return Config(classes)
