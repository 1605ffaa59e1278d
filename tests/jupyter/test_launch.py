"""The kernelspec's own command line: clients that ignore provisioners get a sandbox all the same, or nothing."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from jupyter_client.manager import AsyncKernelManager

from benchmarks.server import end_keeper
from tests.jupyter.warmcell_kernels import TIMEOUT_S, configure, connected, kernelspec, said, until
from tests.leaks import Places
from warmcell.sandbox.client.keeper import KeeperClient

PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}


@pytest.fixture(autouse=True)
def keeper(places: Places) -> Iterator[None]:
    """A keeper that prepares nothing, for this test alone."""
    configure(places)
    yield
    end_keeper(places)


class Launcher:
    """The program, as a client starts it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(
        cls, file: Path, *, config: str = '{"preload": []}', env: dict[str, str] | None = None
    ) -> "Launcher":
        return cls(
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "warmcell.kernel_provisioner.launch", "-f", str(file), "--config", config),
                stderr=asyncio.subprocess.PIPE,
                cwd=file.parent,
                env={**os.environ, **(env or {})},
            )
        )

    async def ended(self) -> tuple[int | None, str]:
        """Its exit code and what it said."""
        _, words = await asyncio.wait_for(self.process.communicate(), TIMEOUT_S)
        return self.process.returncode, words.decode()


@pytest.fixture
async def connection_file(places: Places) -> Path:
    path = places.root / "kernel.json"
    content = {
        **PORTS,
        "transport": "ipc",
        "ip": str(places.root / "k"),
        "key": "secret",
        "signature_scheme": "hmac-sha256",
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
async def launched(connection_file: Path) -> AsyncIterator[Launcher]:
    """One whose kernel answers."""
    made = await Launcher.start(connection_file)
    await until(lambda: _has_kernels(1))
    yield made
    if made.process.returncode is None:
        made.process.kill()
        await made.process.wait()
        await until(lambda: _has_kernels(0))


async def _has_kernels(number: int) -> bool:
    try:
        async with await KeeperClient.connect(start=False) as client:
            return sum(kernel["alive"] for kernel in (await client.get("/kernels"))["kernels"]) == number
    except Exception:
        return number == 0


def manager_of(file: Path) -> AsyncKernelManager:
    """A manager of a kernel that somebody else started."""
    manager = AsyncKernelManager(connection_file=str(file), owns_kernel=False)
    manager.load_connection_file()
    return manager


@pytest.mark.bubblewrap
async def test_a_client_without_provisioners_gets_a_sandbox(places: Places, tmp_path: Path) -> None:
    """Started by jupyter_client's local provisioner, over tcp: the same kernel, its folder and no other file."""
    kernelspec(places, name="plain", metadata=False)
    (places.root / "marker").write_text("secret")
    manager = AsyncKernelManager(kernel_name="plain")
    await manager.start_kernel(cwd=str(tmp_path))
    try:
        assert type(manager.provisioner).__name__ == "LocalProvisioner"
        assert manager.transport == "tcp"
        async with connected(manager) as client:
            assert await said(client, "import os; print(os.getcwd())") == str(tmp_path)
            assert await said(client, f"open({str(places.root / 'marker')!r})") == "FileNotFoundError"
            await manager.restart_kernel()
            await client.wait_for_ready(timeout=TIMEOUT_S)
            assert await said(client, "print('again')") == "again"
    finally:
        await manager.shutdown_kernel()
    await until(lambda: _has_kernels(0))


@pytest.mark.bubblewrap
async def test_it_ends_with_its_kernel_and_its_exit_code(launched: Launcher, connection_file: Path) -> None:
    """As the kernel's own program would."""
    async with connected(manager_of(connection_file)) as client:
        client.execute("import os; os._exit(7)")
        assert await launched.ended() == (7, "")


@pytest.mark.bubblewrap
async def test_signals_are_passed_on(launched: Launcher, connection_file: Path) -> None:
    """SIGINT interrupts the cell; SIGTERM ends the kernel, and nothing is left."""
    async with connected(manager_of(connection_file)) as client:
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
        launched.process.send_signal(signal.SIGINT)
        assert (await running)["content"]["ename"] == "KeyboardInterrupt"
        assert await said(client, "print('alive')") == "alive"
    launched.process.terminate()
    code, words = await launched.ended()
    assert code is not None
    assert code > 0
    assert words == ""
    assert await _has_kernels(0)


@pytest.mark.bubblewrap
async def test_the_kernel_goes_when_the_launcher_is_killed(launched: Launcher) -> None:
    """Nobody else knows of it."""
    launched.process.kill()
    await launched.process.wait()
    await until(lambda: _has_kernels(0))


@pytest.mark.bubblewrap
async def test_the_kernel_goes_with_the_jupyter_that_started_it(connection_file: Path, tmp_path: Path) -> None:
    """A client that is killed leaves neither launcher nor kernel."""
    code = (
        "import os, subprocess, sys, time\n"
        "env = {**os.environ, 'JPY_PARENT_PID': str(os.getpid())}\n"
        "module = 'warmcell.kernel_provisioner.launch'\n"
        "argv = [sys.executable, '-m', module, '-f', sys.argv[1], '--config', sys.argv[2]]\n"
        "subprocess.Popen(argv, env=env)\ntime.sleep(60)\n"
    )
    argv = (sys.executable, "-c", code, str(connection_file), '{"preload": []}')
    jupyter = await asyncio.create_subprocess_exec(*argv, cwd=tmp_path)
    await until(lambda: _has_kernels(1))
    jupyter.kill()
    await jupyter.wait()
    await until(lambda: _has_kernels(0))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        ("", "is not JSON"),
        ("[]", "is not a JSON object"),
        (json.dumps({**PORTS, "transport": "ipc", "ip": "/x", "key": "k", "hb_port": "five"}), "'hb_port'"),
        (json.dumps({**PORTS, "transport": "tcp", "ip": "127.0.0.1", "key": ""}), "empty key"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
async def test_a_malformed_connection_file_is_one_clear_error(
    places: Places, content: str | bytes | None, says: str
) -> None:
    """One line with its cure, a non-zero exit, and no keeper is started for it."""
    path = places.root / "kernel.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, words = await (await Launcher.start(path)).ended()
    assert code == 1
    assert words.startswith("warmcell: ")
    assert says in words
    assert words.count("\n") == 1
    assert not (places.runtime / "keeper.lock").exists()


@pytest.mark.parametrize("config", ["{", "[]", '{"memory": "much"}', '{"wish": 1}'])
async def test_a_malformed_configuration_is_one_clear_error(connection_file: Path, config: str) -> None:
    """What a kernelspec configures is checked before anything is started."""
    code, words = await (await Launcher.start(connection_file, config=config)).ended()
    assert code == 1
    assert words.startswith("warmcell: ")
    assert words.count("\n") == 1


async def test_without_a_keeper_there_is_no_kernel(connection_file: Path, places: Places) -> None:
    """It never falls back to a kernel of its own."""
    (places.root / "file").write_text("")
    env = {"WARMCELL_RUNTIME_DIR": str(places.root / "file" / "r")}
    code, words = await (await Launcher.start(connection_file, env=env)).ended()
    assert code == 1
    assert words.startswith("warmcell: ")
    assert words.count("\n") == 1


async def test_what_the_machine_cannot_isolate_is_not_started(connection_file: Path) -> None:
    """A missing bubblewrap is an error with its cure."""
    env = {"WARMCELL_BWRAP": "/nonexistent"}
    code, words = await (await Launcher.start(connection_file, env=env)).ended()
    assert code == 1
    assert "bubblewrap" in words
    assert words.count("\n") == 1
