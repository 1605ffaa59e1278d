"""Kernels whose environment is of another version of Python than the server's: started, restarted, saved, cloned."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.server import Channels, JupyterServer
from tests import pythons
from tests.jupyter.warmcell_kernels import until
from tests.leaks import Places
from warmcell.kernel_provisioner.kernelspecs import install

pytestmark = pytest.mark.bubblewrap

API = "/warmcell/api/v1"
KERNEL = "other"
PRELOADED = "sqlite3"
"""It has a library, and no kernel imports it by itself."""

TRIED = """
class Counter:
    def __init__(self, n): self.n = n
    def more(self): return [self.n + x for x in range(3)]
def total(counter): return sum(counter.more())
counter = Counter(4)
"""
FAILING = """
try:
    get_ipython().run_cell_magic('remote', '', 'total(1)')
except AttributeError as error:
    assert 'more' in str(error)
else:
    raise AssertionError('no error')
"""


@pytest.fixture(scope="session")
def found() -> dict[tuple[int, int], Path]:
    return pythons.others()


@pytest.fixture(params=["oldest", "newest"])
def other(request: pytest.FixtureRequest, found: dict[tuple[int, int], Path]) -> tuple[tuple[int, int], Path]:
    """A version, and the Python of an environment of it."""
    if not found:
        pytest.skip("no other version of Python was found; WARMCELL_TEST_PYTHONS=/path/of/python3.13:… names some")
    versions = list(found)
    if request.param == "newest" and len(versions) == 1:
        pytest.skip("only one other version of Python was found, and that is tried")
    version = versions[0] if request.param == "oldest" else versions[-1]
    python, problem = pythons.environment(version, found[version])
    if problem:
        pytest.skip(f"an environment of Python {'.'.join(map(str, version))} cannot be made: {problem}")
    return version, python


@pytest.fixture
def snapshots() -> str:
    """As by default; a test may ask for others."""
    return "auto"


@pytest.fixture
async def server(places: Places, other: tuple[tuple[int, int], Path], snapshots: str) -> AsyncIterator[JupyterServer]:
    await asyncio.to_thread(install, str(other[1]), name=KERNEL, config={"preload": [PRELOADED]})
    async with JupyterServer(places, settings={"prepared": 0, "snapshots": snapshots}) as running:
        yield running


async def remote(channels: Channels, line: str, cell: str) -> None:
    await channels.execute(f"get_ipython().run_cell_magic('remote', {line!r}, {cell!r})")


async def try_remote_cells(channels: Channels) -> None:
    """Objects of the notebook's own classes go to a rank of the same Python and come back; errors are its own."""
    await channels.execute(TRIED)
    await remote(
        channels, "get=back,there", "import sys\nback = [total(counter), counter]\nthere = tuple(sys.version_info)"
    )
    await channels.execute("import sys; assert there == tuple(sys.version_info)")
    await channels.execute("assert back[0] == 15 and type(back[1]) is Counter and back[1].n == 4")
    await channels.execute(FAILING)


async def has_template(server: JupyterServer) -> bool:
    templates = (await server.http.get(f"{API}/templates")).json()["templates"]
    return any(one["status"]["state"] == "ready" for one in templates)


async def come_from_a_template(server: JupyterServer, kernel: str, channels: Channels) -> str:
    """Restart it once there is one, with its module imported and its variables gone; how it was started."""
    await until(lambda: has_template(server))
    await server.restart_kernel(kernel)
    await channels.execute(f"import sys; assert {PRELOADED!r} in sys.modules and 'kept' not in globals()")
    return str((await server.sandbox(kernel))["started_from"])


@pytest.mark.parametrize("snapshots", ["none"])
async def test_it_restarts_from_a_forked_template(
    server: JupyterServer, other: tuple[tuple[int, int], Path], snapshots: str
) -> None:
    """Where memory cannot be saved: the version is that of its environment, before and after."""
    kernel = await server.start_kernel(KERNEL)
    async with server.channels(kernel) as channels:
        await channels.execute(f"import sys; kept = 1; assert sys.version_info[:2] == {other[0]}")
        assert await come_from_a_template(server, kernel, channels) == "template"
        await channels.execute(f"import sys; assert sys.version_info[:2] == {other[0]}")
        await try_remote_cells(channels)


@pytest.mark.criu
async def test_it_is_saved_restored_and_cloned(server: JupyterServer, other: tuple[tuple[int, int], Path]) -> None:
    """By its server, by a cell of its own, and by `%%remote fork`; what it has is there each time."""
    kernel = await server.start_kernel(KERNEL)
    async with server.channels(kernel) as channels:
        await channels.execute(f"import sys; kept = 1; assert sys.version_info[:2] == {other[0]}")
        assert await come_from_a_template(server, kernel, channels) == "template"
        await channels.execute("kept = [lambda: 5, open('/dev/null')]")
        box = (await server.sandbox(kernel))["id"]
        answer = await server.http.post(f"{API}/sandboxes/{box}/suspend", json={})
        assert (answer.status_code, answer.json()["state"]) == (200, "suspended"), answer.text
        await channels.execute("assert kept[0]() == 5 and not kept[1].closed")  # That wakes it.
        answer = await server.http.post(f"{API}/sandboxes/{box}/fork", json={"n": 1})
        assert answer.status_code == 201, answer.text
        (clone,) = (one["kernel_id"] for one in answer.json()["sandboxes"])
        async with server.channels(clone) as copy:
            await copy.execute(f"import sys; assert kept[0]() == 5 and sys.version_info[:2] == {other[0]}")
        await channels.execute(
            "import warmcell\nf = warmcell.fork(2)\nif f.rank is not None: f.done(kept[0]() + f.rank)\n"
            "assert [clone.result() for clone in f.clones] == [5, 6]"
        )
        await remote(channels, "fork n=2 get=mine", "mine = kept[0]()")
        await channels.execute("assert mine == [5, 5], mine")
        await try_remote_cells(channels)
