"""What is read of CDI specifications: as NVIDIA's toolkit writes them, older and newer, and broken ones."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from warmcell.sandbox.backends import cdi
from warmcell.sandbox.backends.cdi import Edits, Shown
from warmcell.sandbox.models import GpuDevice

UUID = "GPU-4cf8db2d-06c0-7d70-1a51-e59b25b2c16c"
SHARED = {
    "env": ["NVIDIA_VISIBLE_DEVICES=void", "=nothing"],
    "deviceNodes": [{"path": "/dev/nvidiactl"}, {"path": "/dev/nvidia-uvm", "hostPath": "/dev/nvidia-uvm"}],
    "mounts": [
        {"hostPath": "/opt/driver/libcuda.so.580.1", "containerPath": "/opt/nv/libcuda.so.580.1", "options": ["ro"]}
    ],
    "hooks": [
        {
            "hookName": "createContainer",
            "path": "/usr/bin/nvidia-cdi-hook",
            "args": ["nvidia-cdi-hook", "create-symlinks", "--link", "libcuda.so.580.1::/opt/nv/libcuda.so.1"],
        },
        {
            "hookName": "createContainer",
            "path": "/usr/bin/nvidia-cdi-hook",
            "args": ["nvidia-cdi-hook", "update-ldcache", "--folder", "/opt/nv"],
        },
    ],
}


def gpu(**changes: Any) -> GpuDevice:
    fields = {"uuid": UUID, "index": 0, "name": "A100", "memory_total_bytes": 1, "device_nodes": ("/dev/nvidia0",)}
    return GpuDevice(**{**fields, **changes})


def device(name: str, node: str) -> dict[str, Any]:
    return {"name": name, "containerEdits": {"deviceNodes": [{"path": node}]}}


def spec(*devices: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": list(devices),
        "containerEdits": SHARED,
        **changes,
    }


@pytest.fixture
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """That of the running driver, and the administrator's."""
    both = (tmp_path / "run", tmp_path / "etc")
    for one in both:
        one.mkdir()
    monkeypatch.setattr(cdi, "DIRECTORIES", both)
    return both


def test_a_device_is_found_by_uuid_with_what_all_need(directories: tuple[Path, Path]) -> None:
    """In YAML, as it is written by default. What the hooks would do is known; other devices' nodes stay out."""
    text = yaml.safe_dump(
        spec(device("all", "/dev/nvidia1"), device("1", "/dev/nvidia1"), device(UUID, "/dev/nvidia0"))
    )
    (directories[1] / "nvidia.yaml").write_text(text)
    assert cdi.edits([gpu()]) == Edits(
        nodes=(
            Shown("/dev/nvidiactl", "/dev/nvidiactl"),
            Shown("/dev/nvidia-uvm", "/dev/nvidia-uvm"),
            Shown("/dev/nvidia0", "/dev/nvidia0"),
        ),
        files=(Shown("/opt/driver/libcuda.so.580.1", "/opt/nv/libcuda.so.580.1"),),
        links={"/opt/nv/libcuda.so.1": "libcuda.so.580.1"},
        env={"NVIDIA_VISIBLE_DEVICES": "void"},
    )
    assert cdi.edits([gpu(simulated=True)]) == cdi.edits([gpu(uuid="GPU-2", index=7)]) == Edits(links={}, env={})


def test_the_number_counts_only_with_its_node(directories: tuple[Path, Path]) -> None:
    """Numbers change with the machine, and an old specification would hand out somebody else's GPU."""
    (directories[1] / "nvidia.json").write_text(json.dumps(spec(device("0", "/dev/nvidia3"), containerEdits={})))
    assert cdi.edits([gpu()]).nodes == ()
    assert [one.host for one in cdi.edits([gpu(device_nodes=("/dev/nvidia3",))]).nodes] == ["/dev/nvidia3"]


def test_that_of_the_running_driver_goes_first(directories: tuple[Path, Path]) -> None:
    """It is made at each start of the machine; the other may be older."""
    for directory, path in zip(directories, ("/run/now", "/opt/then"), strict=True):
        mounts = {"mounts": [{"hostPath": path, "containerPath": path}]}
        (directory / "nvidia.yaml").write_text(yaml.safe_dump(spec(device("0", "/dev/nvidia0"), containerEdits=mounts)))
    assert [one.host for one in cdi.edits([gpu()]).files] == ["/run/now"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", "a: b: c", "kind: nvidia.com/gpu", "kind: nvidia.com/gpu\ndevices: 3"),
        json.dumps(spec(device("0", "../../etc/shadow"))),
        json.dumps(spec(device("0", "/dev/nvidia0"), containerEdits={"mounts": [{"hostPath": "/x"}]})),
        json.dumps(spec(device("0", "/dev/nvidia0"), containerEdits={"deviceNodes": "all"})),
        json.dumps(spec("0")),  # type: ignore[arg-type]
        json.dumps(spec(device("0", "/dev/nvidia0\0"))),
        json.dumps(spec(device("0", "/dev/nvidia0"), containerEdits={"env": 3})),
        json.dumps(spec(device("0", "/dev/nvidia0"), containerEdits={"env": ["A=\0"]})),
        json.dumps(spec(device("0", "/dev/nvidia0"), containerEdits={"hooks": [{"path": "/x", "args": 3}]})),
    ],
)
def test_a_broken_one_is_left_out_and_named(
    directories: tuple[Path, Path], caplog: pytest.LogCaptureFixture, text: str
) -> None:
    """What others say holds."""
    broken, whole = directories[0] / "broken.yaml", directories[1] / "whole.yaml"
    broken.write_text(text)
    whole.write_text(yaml.safe_dump(spec(device("0", "/dev/nvidia0"))))
    with caplog.at_level(logging.WARNING):
        assert cdi.edits([gpu()]).env == {"NVIDIA_VISIBLE_DEVICES": "void"}
    assert str(broken) in caplog.text
