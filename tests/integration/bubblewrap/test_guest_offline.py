"""Kernels in a sandbox without network: `%pip` with a real pip, and where a kernel comes from."""

import json
from collections.abc import AsyncIterator

import pytest

from tests.integration.bubblewrap.boxes import folder, subject_of
from tests.integration.process.guest import CHANNELS, Kernel, connected
from tests.leaks import Places
from warmcell.sandbox.testing.contract import Box

pytestmark = pytest.mark.bubblewrap

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "brought-along"
version = "1.0"
[tool.setuptools]
py-modules = ["brought_along"]
"""


@pytest.fixture
async def box(places: Places) -> AsyncIterator[Box]:
    """A sandbox without network whose workspace has a package's sources."""
    workspace = folder(places, "w")
    source = folder(places, "w/package")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "brought_along.py").write_text("value = 5\n")
    async with subject_of(places).box(workspace=workspace, network="none") as box:
        yield box


async def kernel_in(box: Box, cwd: str, engine: str) -> Kernel:
    """A kernel of that sandbox, started and connected to."""
    ports = {f"{name}_port": n for n, name in enumerate(CHANNELS, 1)}
    guest = box.instance.guest_run_directory
    file = box.instance.run_directory / f"{engine}.json"
    file.write_text(json.dumps({"transport": "ipc", "ip": f"{guest}/{engine}", "key": "", **ports}))
    file.chmod(0o644)
    started = await box.channel.start_kernel(
        f"{guest}/{engine}.json", env={}, cwd=cwd, engine="template" if engine == "template" else "cold"
    )
    content = {"transport": "ipc", "ip": f"{box.instance.run_directory}/{started.sockets}", "key": "", **ports}
    return Kernel(started, await connected(content))


async def test_pip_says_that_there_is_no_network_and_installs_what_is_here(places: Places, box: Box) -> None:
    """One error with the cure for what would have to be fetched; a folder of the workspace installs."""
    kernel = await kernel_in(box, str(places.root / "w"), "cold")
    for command in ("%pip install no-such-package-anywhere", "!pip install no-such-package-anywhere"):
        output = await kernel.run(command)
        assert output.status == "error"
        assert output.text.count("no network") == 1
        assert "Network: Open" in output.text
        assert "ERROR" not in output.text
    installed = await kernel.run("%pip install ./package")
    assert "Successfully installed brought-along-1.0" in installed.text
    assert await kernel.value("__import__('brought_along').value") == 5
    kernel.client.stop_channels()


async def test_kernels_come_from_the_template_and_see_their_sandbox(places: Places, box: Box) -> None:
    """The fork server works in a sandbox; only bubblewrap itself comes before init; the kernel is not root."""
    await box.channel.prepare(["json"], name="test")
    async for event in box.channel.events():
        if event["event"] == "template" and event["state"] == "ready":
            break
    assert (await box.channel.hello()).pid <= 2
    kernel = await kernel_in(box, str(places.root / "w"), "template")
    assert kernel.started.started_from == "template"
    assert await kernel.value("[__import__('os').getppid() > 1, __import__('os').getuid() != 0]") == [True, True]
    kernel.client.stop_channels()
