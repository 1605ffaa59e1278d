"""P9: one kernel, spoken to directly and through the proxy: a trivial execute, and 100 MB of output.

The kernel is a plain one with unsigned sockets, as a sandbox's kernel has them; the proxy runs in a process of its
own, as in the keeper. `python -m benchmarks.p9_proxy` prints the rows.
"""

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient

from benchmarks.rows import Row, Series
from warmcell.kernel_provisioner.proxy import Connection, KernelProxy

ROUNDS = 8
PER_ROUND = 20
"""Trivial executes per round and way; a round has one large output per way."""

TRIVIAL = "pass"
LARGE = "for _ in range(1000): print('x' * 100_000)"
LARGE_BYTES = 1000 * 100_001


async def measure(*, rounds: int = ROUNDS) -> list[Row]:
    """Two rows. Both ways are taken alternately, execute by execute."""
    async with _kernel() as (direct, proxied):
        ways = {"direct": direct, "proxied": proxied}
        for client in ways.values():
            await _execute(client, LARGE)
        trivial: dict[str, list[float]] = {name: [] for name in ways}
        large: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            order = list(ways) if number % 2 else list(reversed(ways))
            for _ in range(PER_ROUND):
                for name in order:
                    trivial[name].append((await _execute(ways[name], TRIVIAL))[0])
            for name in order:
                seconds, received = await _execute(ways[name], LARGE)
                if received != LARGE_BYTES:
                    raise AssertionError(f"{name}: {received} of {LARGE_BYTES} bytes of output came")
                large[name].append(seconds)
    return [
        Row(
            promise="P9",
            what=what,
            baseline=Series(what="directly", samples=samples["direct"]),
            ours=Series(what="through the proxy", samples=samples["proxied"]),
            goal=goal,
        )
        for what, samples, goal in (("trivial execute", trivial, 1.1), ("100 MB of output", large, 1.3))
    ]


async def _execute(client: AsyncKernelClient, code: str) -> tuple[float, int]:
    """Seconds until the reply and the kernel's idle have come, and bytes of text that it printed."""
    received = 0

    def count(message: Mapping[str, Any]) -> None:
        nonlocal received
        received += len(message["content"].get("text", ""))

    began = time.perf_counter()
    await client.execute_interactive(code, store_history=False, allow_stdin=False, output_hook=count, timeout=60)
    return time.perf_counter() - began, received


@contextlib.asynccontextmanager
async def _kernel() -> AsyncIterator[tuple[AsyncKernelClient, AsyncKernelClient]]:
    """A kernel and two clients of it: one on its own sockets, one on a proxy's."""
    with tempfile.TemporaryDirectory(prefix="wc-", dir="/tmp") as name:
        root = Path(name)
        inner, outer = _connection_file(root / "g", key=""), _connection_file(root / "h", key="secret")
        async with contextlib.AsyncExitStack() as stack:
            await _process(stack, "-m", "ipykernel_launcher", "-f", str(inner), "--HistoryManager.enabled=False")
            proxy = await _process(stack, "-m", "benchmarks.p9_proxy", "--proxy", str(root))
            assert proxy.stdout is not None
            await asyncio.wait_for(proxy.stdout.readline(), 30)
            clients = []
            for path in (inner, outer):
                client = AsyncKernelClient(connection_file=str(path))
                client.load_connection_file()
                client.start_channels()
                stack.callback(client.stop_channels)
                await client.wait_for_ready(timeout=30)
                clients.append(client)
            yield clients[0], clients[1]


async def _process(stack: contextlib.AsyncExitStack, *arguments: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )

    async def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    stack.push_async_callback(end)
    return process


def _connection_file(prefix: Path, *, key: str) -> Path:
    ports = {f"{channel}_port": n for n, channel in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
    path = prefix.with_suffix(".json")
    path.write_text(
        json.dumps({**ports, "transport": "ipc", "ip": str(prefix), "key": key, "signature_scheme": "hmac-sha256"})
    )
    return path


async def _host_proxy(root: Path) -> None:
    """The proxy's own process: say a line when the kernel has answered, then go on until killed."""
    connection = Connection.from_json(json.loads((root / "h.json").read_text()))
    proxy = KernelProxy(connection, name="benchmark")
    await proxy.start()
    await proxy.connect_guest(str(root / "g"))
    await proxy.wait_ready(timeout=30)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--proxy"]:
        asyncio.run(_host_proxy(Path(sys.argv[2])))
    else:
        for row in asyncio.run(measure()):
            print(json.dumps({**row.to_json(), "baseline": row.baseline.median, "ours": row.ours.median}))
