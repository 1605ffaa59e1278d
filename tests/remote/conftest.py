"""One keeper for all tests of a module, and kernels in it: a notebook's with `%%remote`, and a plain one beside it."""

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.integration.process.guest import Kernel, Output, connected
from tests.leaks import Places, own_places
from warmcell.sandbox.channel import KernelStarted
from warmcell.sandbox.client.keeper import KeeperClient
from warmcell.sandbox.paths import Paths


@pytest.fixture(scope="module")
def module_places() -> Iterator[Places]:
    """Directories of the module's own."""
    with own_places() as places:
        before = {name: os.environ.get(name) for name in places.env}
        os.environ.update(places.env)
        yield places
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture
def places(module_places: Places) -> Places:
    """In the place of the directories that each test has elsewhere."""
    return module_places


@pytest.fixture(scope="module")
def settings() -> Mapping[str, object]:
    """Of the keeper; a module may have others."""
    return {}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keeper(module_places: Places, settings: Mapping[str, object]) -> AsyncIterator[KeeperClient]:
    """A keeper without isolation, which needs nothing of the machine."""
    directory = module_places.root / "jupyter" / "config"
    directory.mkdir(parents=True)
    traits = {"backend": "process", "keeper_idle_s": 0.2, "prepared": 0, **settings}
    lines = [f"c.Warmcell.{name} = {value!r}" for name, value in traits.items()]
    (directory / "jupyter_warmcell_config.py").write_text("\n".join(lines))
    async with await KeeperClient.connect() as client:
        yield client
        for sandbox in (await client.get("/sandboxes"))["sandboxes"]:
            await client.delete(f"/sandboxes/{sandbox['id']}")


class Notebook(Kernel):
    """One whose output is looked at without the sum of what took long, as on a busy machine anything may."""

    async def run(self, code: str) -> Output:
        output = await super().run(code)
        output.data = [data for data in output.data if not is_sum(data)]
        return output


def is_sum(data: Mapping[str, Any]) -> bool:
    """Whether this is how a cell on one rank ends that took long, or held a GPU."""
    return str(data.get("text/plain", "")).startswith("Remote: ")


@asynccontextmanager
async def kernel_of(keeper: KeeperClient, folder: Path, **spec: Any) -> AsyncIterator[Kernel]:
    """A notebook's kernel as the provisioner starts it, in that folder."""
    kernel_id = str(uuid.uuid4())
    ports = {f"{name}_port": n for n, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
    connection = {
        "transport": "ipc",
        "ip": str(Paths.default().kernels / kernel_id[:8] / "k"),
        "key": "secret",
        "signature_scheme": "hmac-sha256",
        **ports,
    }
    body = {
        "kernel_id": kernel_id,
        "kernel_name": "warmcell",
        "connection": connection,
        "cwd": str(folder),
        "spec": {
            "python": sys.executable,
            "workspace": {"path": str(folder)},
            "preload": [],
            "network": "host",
            **spec,
        },
    }
    await keeper.post("/kernels", body)
    client = await connected(connection, key="secret")
    yield Notebook(KernelStarted(pid=0, started_from="cold", sockets=""), client)
    client.stop_channels()
    await keeper.delete(f"/kernels/{kernel_id}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def folder(module_places: Places) -> Path:
    """The notebooks' folder."""
    path = module_places.root / "w"
    path.mkdir()
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kernel(keeper: KeeperClient, folder: Path) -> AsyncIterator[Kernel]:
    """The notebook whose cells are remote."""
    async with kernel_of(keeper, folder) as kernel:
        yield kernel


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local(keeper: KeeperClient, folder: Path) -> AsyncIterator[Kernel]:
    """A notebook of the same kind, whose cells run where they are."""
    async with kernel_of(keeper, folder) as kernel:
        yield kernel


def body_of(output: Output) -> str:
    """What a cell printed after the line that says where it ran."""
    first, _, rest = output.text.partition("\n")
    assert first.startswith("Remote: "), output
    return rest


async def reply_of(kernel: Kernel) -> dict[str, Any]:
    """The content of the next execute reply."""
    async with asyncio.timeout(120):
        while True:
            message = await kernel.client.get_shell_msg(timeout=120)
            if message["msg_type"] == "execute_reply":
                return dict(message["content"])


def interrupt(kernel: Kernel) -> None:
    """The stop button."""
    kernel.client.control_channel.send(kernel.client.session.msg("interrupt_request"))
