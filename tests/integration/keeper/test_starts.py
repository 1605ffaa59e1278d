"""Starts that are overtaken: by another start, a removal, the end of whoever asked, the end of the keeper."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from tests.integration.keeper.conftest import Configure, KernelBody, until
from tests.integration.keeper.test_kernels import run
from tests.integration.keeper.test_life import running
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.errors import ConflictError, TransportError, WarmcellError
from warmcell.sandbox.paths import Paths

TCP = {"transport": "tcp", "ip": "127.0.0.1"}
PORTS = ("shell_port", "iopub_port", "stdin_port", "control_port", "hb_port")


async def begun(keeper: KeeperClient, kernel_id: str) -> dict[str, Any]:
    """The kernel's sandbox, as soon as there is one."""
    found: list[dict[str, Any]] = []

    async def there() -> bool:
        found[:] = [box for box in (await keeper.get("/sandboxes"))["sandboxes"] if box["kernel_id"] == kernel_id]
        return bool(found)

    await until(there)
    return found[0]


async def nothing_is_left(keeper: KeeperClient) -> None:
    """No kernel, no living sandbox, no file of either."""
    paths = Paths.default()

    async def empty() -> bool:
        kernels = (await keeper.get("/kernels"))["kernels"]
        boxes = [one for one in (await keeper.get("/sandboxes"))["sandboxes"] if one["state"] != "failed"]
        return not kernels and not boxes and not [*paths.sandboxes.iterdir(), *paths.kernels.iterdir()]

    await until(empty)


async def test_two_starts_at_once_make_one_kernel(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """The later one is a restart of the earlier; in the end one kernel of that id answers, in one sandbox."""
    body = kernel_body()
    first, second = await asyncio.gather(keeper.post("/kernels", body), keeper.post("/kernels", body))
    assert first["id"] == second["id"]
    assert {first["generation"], second["generation"]} == {1, 2}
    assert len((await keeper.get("/sandboxes"))["sandboxes"]) == 1
    assert await run(body, "print('one')") == "one"


@pytest.mark.parametrize("what", ["kernel", "sandbox"])
async def test_what_is_deleted_while_it_starts_is_gone(
    keeper: KeeperClient, kernel_body: KernelBody, what: str
) -> None:
    """The start is told so, and leaves nothing."""
    body = kernel_body()
    starting = asyncio.create_task(keeper.post("/kernels", body))
    box = await begun(keeper, body["kernel_id"])
    await keeper.delete(f"/kernels/{body['kernel_id']}" if what == "kernel" else f"/sandboxes/{box['id']}")
    with pytest.raises(WarmcellError) as raised:
        await starting
    assert raised.value.hint
    await nothing_is_left(keeper)


@pytest.mark.parametrize("noun", ["kernels", "sandboxes"])
async def test_a_start_whose_client_has_gone_ends(keeper: KeeperClient, kernel_body: KernelBody, noun: str) -> None:
    """Nobody would learn of it, so nothing of it is left, although the client's process lives."""
    body = kernel_body()
    async with KeeperClient(Paths.default()) as other:
        starting = asyncio.create_task(other.post(f"/{noun}", body if noun == "kernels" else {"spec": body["spec"]}))

        async def there() -> bool:
            return bool((await keeper.get("/sandboxes"))["sandboxes"])

        await until(there)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
    if noun == "kernels":
        await nothing_is_left(keeper)
    else:  # it may have come up before its client had gone; then it is its process's
        assert (await keeper.get("/kernels"))["kernels"] == []


async def test_a_keeper_that_is_ended_takes_a_start_along(configure: Configure, kernel_body: KernelBody) -> None:
    """SIGTERM in the middle of a start: the keeper ends, and the leak check finds nothing."""
    client = await KeeperClient.connect()
    body = kernel_body()
    pid = (await client.get("/status"))["pid"]
    async with KeeperClient(Paths.default()) as other:
        starting = asyncio.create_task(other.post("/kernels", body))
        await begun(client, body["kernel_id"])
        os.kill(pid, signal.SIGTERM)
        with pytest.raises(TransportError):
            await starting
    await client.close()
    await until(lambda: asyncio.to_thread(lambda: not running(pid)))


async def test_the_next_keeper_waits_for_the_one_that_is_ending(configure: Configure, kernel_body: KernelBody) -> None:
    """Who asks while a keeper stops its sandboxes gets a new one, not an error."""
    client = await KeeperClient.connect()
    await client.post("/kernels", kernel_body(persistent=True))
    pid = (await client.get("/status"))["pid"]
    os.kill(pid, signal.SIGTERM)
    await client.close()
    await until(_nobody_listens)
    async with await KeeperClient.connect() as next_one:
        assert (await next_one.get("/kernels"))["kernels"] == []


async def _nobody_listens() -> bool:
    """The keeper has begun to end; before that it serves whoever asks."""
    return not Paths.default().keeper_socket.exists()


async def test_a_start_goes_with_the_process_that_asked(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """Killed while its kernel starts, a script leaves no kernel."""
    body = kernel_body()
    script = (
        "import json, sys\n"
        "from warmcell.sandbox.client.keeper import SyncKeeperClient\n"
        "SyncKeeperClient.connect().post('/kernels', json.loads(sys.argv[1]))\n"
        "import time; time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, json.dumps(body)]) as owner:
        await begun(keeper, body["kernel_id"])
        owner.kill()
    await nothing_is_left(keeper)


async def test_a_first_start_that_fails_gives_everything_back(
    configure: Configure, kernel_body: KernelBody, spec: dict[str, Any], tmp_path: Any
) -> None:
    """The GPU is free, no process is left, and the page sees why."""
    configure(
        backend="process",
        keeper_idle_s=0.2,
        prepared=0,
        simulated_gpus=[{"name": "A100", "memory": "80GiB", "count": 1}],
    )
    async with await KeeperClient.connect() as client:
        for _ in range(2):
            body = kernel_body(spec={**spec, "gpu": "A100"}, cwd=str(tmp_path / "no" / "such"))
            with pytest.raises(WarmcellError) as raised:
                await client.post("/kernels", body)
            assert raised.value.code != "no_gpu_available"
        assert [gpu["lease"] for gpu in (await client.get("/gpus"))["gpus"]] == [None]
        assert {box["state"] for box in (await client.get("/sandboxes"))["sandboxes"]} == {"failed"}
        await nothing_is_left(client)


async def test_a_start_whose_address_is_taken_gives_its_sandbox_back(
    configure: Configure, kernel_body: KernelBody, spec: dict[str, Any]
) -> None:
    """Clients could not connect, so the sandbox that was made meanwhile goes, with its GPU; elsewhere it works."""
    configure(
        backend="process",
        keeper_idle_s=0.2,
        prepared=0,
        simulated_gpus=[{"name": "A100", "memory": "80GiB", "count": 1}],
    )
    async with await KeeperClient.connect() as client:
        body = kernel_body(spec={**spec, "gpu": "A100"})
        found = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
        ports = {name: one.getsockname()[1] for name, one in zip(PORTS, found, strict=True)}
        for one in found[:-1]:
            one.close()
        with found[-1], pytest.raises(ConflictError):
            await client.post("/kernels", {**body, "connection": {**body["connection"], **TCP, **ports}})
        assert [gpu["lease"] for gpu in (await client.get("/gpus"))["gpus"]] == [None]
        told = [box["error"]["code"] for box in (await client.get("/sandboxes"))["sandboxes"]]
        assert told == [ConflictError.code]
        await nothing_is_left(client)
        assert (await client.post("/kernels", body))["state"] == "running"
        await client.delete(f"/kernels/{body['kernel_id']}")


async def test_a_failed_restart_can_be_tried_again(
    keeper: KeeperClient, kernel_body: KernelBody, tmp_path: Any
) -> None:
    """The kernel is dead but still there, its sandbox says why, and the next restart works."""
    body = kernel_body(cwd=str(tmp_path))
    info = await keeper.post("/kernels", body)
    await keeper.post(f"/kernels/{body['kernel_id']}/end", {"grace_s": 0})
    with pytest.raises(WarmcellError):
        await keeper.post("/kernels", {**body, "cwd": str(tmp_path / "no")})
    box = await keeper.get(f"/sandboxes/{info['id']}")
    assert (box["state"], box["phase"]) == ("running", None)
    assert box["error"]["hint"]
    again = await keeper.post("/kernels", body)
    assert again["id"] == info["id"]
    assert again["error"] is None
    assert await run(body, "print('back')") == "back"


async def test_a_kernel_whose_sandbox_died_is_restarted_in_another(
    keeper: KeeperClient, kernel_body: KernelBody
) -> None:
    """The new one says why there is no trace of the old one's variables."""
    body = kernel_body()
    first = await keeper.post("/kernels", body)
    pid = int(await run(body, "import os; print(os.getppid())"))
    os.kill(pid, signal.SIGKILL)

    async def dead() -> bool:
        return bool((await keeper.get(f"/sandboxes/{first['id']}"))["state"] == "failed")

    await until(dead)
    second = await keeper.post("/kernels", body)
    assert second["id"] != first["id"]
    assert second["previous_error"]["code"] == "sandbox_died"
    assert await run(body, "print('here')") == "here"


async def test_only_one_server_adopts_a_kernel(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """Another one, while the first lives, is refused and told who has it."""
    script = (
        "import json, sys\n"
        "from warmcell.sandbox.client.keeper import SyncKeeperClient\n"
        "client = SyncKeeperClient.connect()\n"
        "client.post('/kernels', json.loads(sys.argv[1]))\n"
    )
    body = kernel_body(persistent=True, server="/first")
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script, json.dumps(body)], check=True)
    path = f"/kernels/{body['kernel_id']}"

    async def orphaned() -> bool:
        return not (await keeper.get(path))["server_alive"]

    await until(orphaned)
    assert (await keeper.post(f"{path}/adopt", {"server": "/second"}))["server"] == "/second"
    rival = (
        "import sys\n"
        "from warmcell.sandbox.client.keeper import SyncKeeperClient\n"
        "from warmcell.sandbox.errors import ConflictError\n"
        "try:\n"
        "    SyncKeeperClient.connect().post(sys.argv[1], {'server': '/third'})\n"
        "except ConflictError as error:\n"
        "    print(error.details['pid'])\n"
    )
    said = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", rival, f"{path}/adopt"], check=True, capture_output=True
    )
    assert int(said.stdout) == os.getpid()


async def test_a_notebooks_kernel_runs_no_one_elses_cells(keeper: KeeperClient, kernel_body: KernelBody) -> None:
    """A run in its sandbox is refused, and the notebook's page sees nothing of the attempt."""
    import httpx

    info = await keeper.post("/kernels", kernel_body())
    transport = httpx.AsyncHTTPTransport(uds=str(Paths.default().keeper_socket))
    async with httpx.AsyncClient(transport=transport) as http:
        url = f"http://k/warmcell/api/v1/sandboxes/{info['id']}/run"
        answer = await http.post(url, content=b'{"code": "1"}\n')
    assert json.loads(answer.content.partition(b"\n")[0])["failure"]["code"] == ConflictError.code
    assert (await keeper.get(f"/sandboxes/{info['id']}"))["phase"] is None
