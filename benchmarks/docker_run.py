"""What one has without Warmcell: `docker run`, with a kernel or a program."""

import asyncio
import json
import secrets
import sysconfig
import tempfile
import time
from pathlib import Path

from jupyter_client.asynchronous.client import AsyncKernelClient

from benchmarks.keeper import Direct
from benchmarks.server import ANSWER_TIMEOUT_S, BenchmarkError
from tests.engines import IMAGE, PYTHON, Dockerd

LIBRARIES = sysconfig.get_path("purelib")
"""Of this environment; a container has them at the same place."""
LOOK_AGAIN_S = 0.002
"""Between two looks at whether a kernel listens in its container."""
PORTS = {f"{name}_port": number for number, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}


async def answered(docker: Dockerd, code: str) -> float:
    """Seconds from `docker run` of a kernel until it has run some code.

    Raises:
        BenchmarkError: It did not.
    """
    name = f"bench-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="wb-", dir="/tmp") as directory:
        file = Path(directory, "kernel.json")
        connection = {"transport": "ipc", "ip": f"{directory}/k", "key": "", "signature_scheme": "hmac-sha256", **PORTS}
        await asyncio.to_thread(file.write_text, json.dumps(connection))
        began = time.perf_counter()
        process = await _run(
            docker,
            *("--name", name, "--volume", f"{directory}:{directory}"),
            *("--volume", f"{LIBRARIES}:{LIBRARIES}:ro", "--env", f"PYTHONPATH={LIBRARIES}"),
            *(IMAGE, PYTHON, "-m", "ipykernel_launcher", "-f", str(file)),
        )
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                while not Path(directory, f"k-{PORTS['shell_port']}").exists():  # noqa: ASYNC110, ASYNC240
                    await asyncio.sleep(LOOK_AGAIN_S)
            client = AsyncKernelClient()
            client.load_connection_info(connection)
            client.start_channels(shell=True, iopub=False, stdin=False, hb=False, control=False)
            try:
                await Direct(client).execute(code)
                return time.perf_counter() - began
            finally:
                client.stop_channels()
        except TimeoutError:
            raise BenchmarkError(f"`docker run` of a kernel did not listen within {ANSWER_TIMEOUT_S:.0f} s") from None
        finally:
            await asyncio.to_thread(docker.docker, "rm", "--force", name)
            await process.wait()


async def gone(docker: Dockerd, *command: str) -> float:
    """Seconds of `docker run --rm` of a command.

    Raises:
        BenchmarkError: It failed.
    """
    began = time.perf_counter()
    process = await _run(docker, IMAGE, *command)
    _, said = await process.communicate()
    if process.returncode != 0:
        raise BenchmarkError(f"`docker run` ended with {process.returncode}: {said.decode(errors='replace')}")
    return time.perf_counter() - began


async def _run(docker: Dockerd, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *("docker", "--host", docker.host, "run", "--rm", "--network", "none", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
