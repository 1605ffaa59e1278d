"""The keeper's own life: one per user, on demand, gone when idle, nothing left when killed."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.keeper.conftest import Configure, KernelBody, kill, until
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.client.start import is_listening
from warmcell.sandbox.errors import TransportError
from warmcell.sandbox.paths import Paths


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_many_callers_at_once_find_one_keeper(configure: Configure) -> None:
    """Callers that race to start it all talk to the same process."""
    clients = await asyncio.gather(*(KeeperClient.connect() for _ in range(5)))
    try:
        assert len({(await client.get("/status"))["pid"] for client in clients}) == 1
    finally:
        for client in clients:
            await client.close()


async def test_it_is_not_started_where_that_is_not_wanted(configure: Configure) -> None:
    """`start=False` says that there is none."""
    with pytest.raises(TransportError, match="No keeper is running"):
        await KeeperClient.connect(start=False)


async def test_it_goes_when_nothing_runs_and_nobody_is_connected(configure: Configure) -> None:
    """After the last connection it ends by itself, and its socket is gone."""
    client = await KeeperClient.connect()
    pid = (await client.get("/status"))["pid"]
    assert running(pid)
    await client.close()
    await until(lambda: asyncio.to_thread(lambda: not running(pid)))
    assert not Paths.default().keeper_socket.exists()


async def test_it_stays_while_a_sandbox_runs(configure: Configure, kernel_body: KernelBody) -> None:
    """A persistent kernel keeps it, although nobody is connected for longer than its idle time."""
    client = await KeeperClient.connect()
    body = kernel_body(persistent=True, server="/nowhere")
    await client.post("/kernels", body)
    pid = (await client.get("/status"))["pid"]
    await client.close()
    await asyncio.sleep(0.6)  # three times keeper_idle_s: it is the passing of time that must change nothing
    async with await KeeperClient.connect(start=False) as again:
        assert (await again.get("/status"))["pid"] == pid
        assert [kernel["alive"] for kernel in (await again.get("/kernels"))["kernels"]] == [True]
        await again.delete(f"/kernels/{body['kernel_id']}")


async def test_killed_it_takes_its_sandboxes_along_and_the_next_one_cleans_up(
    configure: Configure, kernel_body: KernelBody
) -> None:
    """After kill -9 no process of a sandbox is left, and no file once the next keeper is up."""
    client = await KeeperClient.connect()
    body = kernel_body(persistent=True)
    info = await client.post("/kernels", body)
    keeper_pid = (await client.get("/status"))["pid"]
    directory = Paths.default().sandboxes / info["id"]
    assert directory.exists()
    kill(keeper_pid)
    await client.close()
    await until(lambda: asyncio.to_thread(lambda: not running(keeper_pid)))
    async with await KeeperClient.connect() as again:
        assert (await again.get("/status"))["pid"] != keeper_pid
        assert (await again.get("/sandboxes"))["sandboxes"] == []
        assert not directory.exists()


WATCHED = """
import sys
from blockbuster import BlockBuster
detector = BlockBuster("warmcell")
for name in [name for name in detector.functions if name.startswith(("os.", "io."))]:
    del detector.functions[name]  # a look at a local file is no wait
detector.activate()
from warmcell.extension.keeper.__main__ import main
sys.exit(main())
"""


async def test_its_loop_never_waits(configure: Configure, kernel_body: KernelBody, tmp_path: Path) -> None:
    """A keeper in which every blocking call is an error does all of its work without one."""
    log = tmp_path / "log"
    with log.open("wb") as said:
        process = subprocess.Popen([sys.executable, "-X", "dev", "-c", WATCHED], stdout=said, stderr=said)
    try:
        await until(lambda: asyncio.to_thread(is_listening, Paths.default()))
        async with await KeeperClient.connect(start=False) as client:
            body = kernel_body()
            for _ in range(2):
                info = await client.post("/kernels", body)
            for noun in ("gpus", "templates", "sandboxes", "doctor", f"kernels/{body['kernel_id']}"):
                await client.get(f"/{noun}")
            await client.post("/check", {"spec": body["spec"]})
            await client.post(f"/sandboxes/{info['id']}/interrupt")
            await client.delete(f"/kernels/{body['kernel_id']}")
        assert await asyncio.to_thread(process.wait, 60) == 0
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)
    for word in ("Traceback", "BlockingError", "ResourceWarning", "never retrieved", "never awaited"):
        assert word not in log.read_text(), log.read_text()


async def test_a_broken_configuration_is_told_to_whoever_starts_it(configure: Configure) -> None:
    """The error names the value, and no keeper is left."""
    configure(networks=["lan"])
    with pytest.raises(TransportError, match="'lan'"):
        await KeeperClient.connect()


async def test_a_kernel_of_a_script_goes_with_the_script(configure: Configure, kernel_body: KernelBody) -> None:
    """The process that asked for it dies: a kernel that is not persistent ends."""
    body = kernel_body()
    script = (
        "import asyncio, json, sys\n"
        "from warmcell.sandbox.client.keeper import KeeperClient\n"
        "async def main():\n"
        "    client = await KeeperClient.connect()\n"
        "    await client.post('/kernels', json.loads(sys.argv[1]))\n"
        "    print('started', flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    import json

    async with await KeeperClient.connect() as client:
        owner = subprocess.Popen([sys.executable, "-c", script, json.dumps(body)], stdout=subprocess.PIPE)
        assert owner.stdout is not None
        assert await asyncio.to_thread(owner.stdout.readline) == b"started\n"
        assert len((await client.get("/kernels"))["kernels"]) == 1
        owner.kill()
        owner.wait()
        owner.stdout.close()

        async def gone() -> bool:
            found: list[Any] = (await client.get("/kernels"))["kernels"]
            return not found

        await until(gone)
