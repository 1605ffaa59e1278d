"""The life of an ordinary user's kernel through the keeper's REST: suspended, resumed, saved, put back, forked."""

import asyncio
import contextlib
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient

from warmcell.kernel_provisioner.transport import socket_prefix
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.models import SandboxSpec, Workspace
from warmcell.sandbox.paths import Paths

BEGIN = "import os, subprocess; x = 41; f = open('/tmp/a', 'w+'); f.write('kept'); f.flush(); print(os.getuid())"
HANDED_OVER = """
remote = get_ipython().magics_manager.magics['cell']['remote'].__self__
print(size, [pod.store._handed_over for pod in remote.pods._warm.values()])
"""
"""How large a value was that was sent, and whether it was written by a descriptor."""

MADE = """
import os, subprocess
def made(name):
    folder = f"{name}-folder"
    open(name, "w").close(); os.mkdir(folder)
    subprocess.run(["touch", f"{name}-by-a-process"], check=True)
    names = name, f"{name}-by-a-process", folder
    print(*(oct(os.stat(each).st_mode & 0o777)[2:] for each in names))
"""

GO_ON = "x += 1; f.write('!'); f.flush(); print(x, open('/tmp/a').read())"


async def kernel_lives(told: Mapping[str, Any], say: Callable[[object], None]) -> None:
    """Do all of it, and say what came of each step."""
    keeper = await KeeperClient.connect()
    pid = (await keeper.get("/status"))["pid"]
    say({"keeper": pid})
    try:
        await _live(keeper, told, say)
    finally:
        os.kill(pid, signal.SIGTERM)
        await keeper.close()


async def _live(keeper: KeeperClient, told: Mapping[str, Any], say: Callable[[object], None]) -> None:
    started, connection = await start(keeper, told["workspace"], told.get("spec", {}))
    sandbox = started["id"]
    say({"limits": {name: one["why"] or one["enforced"] for name, one in started["limits"].items()}})
    async with client_of(connection) as client:
        say(await run(client, BEGIN))
        for _ in range(2):
            say((await keeper.post(f"/sandboxes/{sandbox}/suspend", {}, timeout=120))["state"])
            say(await run(client, GO_ON))
        await keeper.post(f"/sandboxes/{sandbox}/snapshot", {"name": "before"}, timeout=120)
        say(await run(client, "x = 0; print(x)"))
        await keeper.post(f"/sandboxes/{sandbox}/restore", {"snapshot": "before"}, timeout=120)
        say(await run(client, "print(x)"))
        clones = (await keeper.post(f"/sandboxes/{sandbox}/fork", {"n": 2}, timeout=120))["sandboxes"]
        kernels = {one["sandbox_id"]: one for one in (await keeper.get("/kernels"))["kernels"]}
        for clone in clones:
            async with client_of(kernels[clone["id"]]["connection"]) as other:
                say(await run(other, "x += 1; print(x, f.closed)"))
            await keeper.delete(f"/sandboxes/{clone['id']}")
        await run(client, "%%remote fork n=2 get=found\nfound = x + int(os.environ['RANK'])")
        say(await run(client, "print(found)"))
        await run(client, "big = bytes(3 * 2**20)")
        await run(client, "%%remote get=size\nsize = len(big)")
        say(await run(client, HANDED_OVER))


async def kernels_write(told: Mapping[str, Any], say: Callable[[object], None]) -> None:
    """Start a keeper with that umask and kernels from its template; say with which modes they make files."""
    os.umask(told["umask"])
    keeper = await KeeperClient.connect()
    pid = (await keeper.get("/status"))["pid"]
    say({"keeper": pid})
    try:
        await start(keeper, told["workspace"], {"preload": ["decimal"]})
        while not any(one["prepared"] for one in (await keeper.get("/templates"))["templates"]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        made = [await start(keeper, told["workspace"], {"preload": ["decimal"]}) for _ in range(2)]
        say([info["started_from"] for info, _ in made])
        for number, (info, connection) in enumerate(made):
            async with client_of(connection) as client:
                say(await run(client, f"{MADE}made('{number}')"))
                if told["saves"] and number:
                    await keeper.post(f"/sandboxes/{info['id']}/suspend", {}, timeout=120)
                    say(await run(client, "made('resumed')"))
    finally:
        os.kill(pid, signal.SIGTERM)
        await keeper.close()


async def start(
    keeper: KeeperClient, workspace: str, wishes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    kernel_id = str(uuid.uuid4())
    ports = {f"{name}_port": number for number, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
    connection = {
        "transport": "ipc",
        "ip": socket_prefix(kernel_id, Paths.default()),
        **ports,
        "key": "abc",
        "signature_scheme": "hmac-sha256",
    }
    spec = SandboxSpec(python=sys.executable, workspace=Workspace(path=workspace), preload=()).to_json()
    asked = {"kernel_id": kernel_id, "spec": {**spec, **wishes}, "connection": connection, "cwd": workspace}
    return await keeper.post("/kernels", {**asked, "persistent": True, "server": "test"}, timeout=120), connection


@contextlib.asynccontextmanager
async def client_of(connection: Mapping[str, Any]) -> AsyncIterator[AsyncKernelClient]:
    client = AsyncKernelClient()
    client.load_connection_info({**connection, "key": connection["key"].encode()})
    client.start_channels()
    try:
        yield client
    finally:
        client.stop_channels()


async def run(client: AsyncKernelClient, code: str) -> str:
    said: list[str] = []

    def hear(message: Mapping[str, Any]) -> None:
        content = message["content"]
        said.append(content.get("text") or content.get("evalue") or "")

    await client.execute_interactive(code, timeout=60, output_hook=hear)
    return "".join(said).strip()
