"""GPUs by the runsc of this machine, as far as that can be tried without a driver."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.gvisor.boxes import boxes_of
from tests.leaks import Places
from warmcell.sandbox.backends.gvisor import find, nvproxy
from warmcell.sandbox.errors import BackendUnavailableError

pytestmark = pytest.mark.gvisor

SCRIPT = str(Path(__file__).with_name("with_nodes.py"))
TREE = Path(__file__).parents[3]
TIMEOUT_S = 60


def listed() -> list[str]:
    """By the binary itself."""
    words = [str(find().path), "nvproxy", "list-supported-drivers"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


def test_the_drivers_that_runsc_lists_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, and no other."""
    monkeypatch.setattr(nvproxy, "DRIVER", tmp_path / "version")
    versions = listed()
    assert versions
    for version in versions:
        nvproxy.DRIVER.write_text(f"{version}\n")
        assert nvproxy.check(find()) == version
    nvproxy.DRIVER.write_text("1.2.3\n")
    with pytest.raises(BackendUnavailableError, match=r"does not know the NVIDIA driver 1\.2\.3") as refused:
        nvproxy.check(find())
    assert all(version in refused.value.hint for version in versions)


async def test_the_probe_says_why_there_are_none(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else works; nothing is said where the driver is known."""
    monkeypatch.setattr(nvproxy, "DRIVER", tmp_path / "version")
    async with boxes_of(places) as boxes:
        report = await boxes.backend.probe()
        assert report.ready
        assert report.no_gpus.startswith("No NVIDIA driver is loaded")
        nvproxy.DRIVER.write_text(listed()[0])
        assert (await boxes.backend.probe()).no_gpus == ""


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="its nodes are those of a real driver here")
async def test_nodes_of_leased_devices_lead_to_the_host_and_are_not_saved(tmp_path: Path) -> None:
    """gVisor's driver opens the host's nodes, where nobody answers; another GPU's is not there. What would save or
    restore is refused, and the sandbox goes on.
    """
    words = ["unshare", "--mount", "--propagation=private", sys.executable, SCRIPT, str(tmp_path), listed()[-1]]
    process = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=TREE, env={"PYTHONPATH": str(TREE)}
    )
    try:
        said, failed = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, failed.decode()
    seen = json.loads(said)
    assert seen["nodes"] == dict.fromkeys(("nvidia-uvm", "nvidia0", "nvidiactl"), "ENXIO")
    assert seen["texts"] == ["the driver's"] * 2
    assert (seen["libraries"], seen["uid"] != 0) == ("/opt/nv", True)
    assert "bus" in seen["sys"]
    assert "cannot be saved" in seen["saved"]
    assert "cannot be saved, restored" in seen["restored"]
    assert seen["after"] == "still there\n"
    assert seen["left"] == []
