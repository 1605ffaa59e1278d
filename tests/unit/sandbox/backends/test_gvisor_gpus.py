"""GPUs of a gVisor sandbox: what is decided before it is made, with other devices of the machine in their places."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from warmcell.sandbox.backends import cdi, nvidia
from warmcell.sandbox.backends.gvisor import nvproxy
from warmcell.sandbox.backends.gvisor.binary import Runsc
from warmcell.sandbox.backends.gvisor.bundle import AS_ASKED, prepare
from warmcell.sandbox.errors import BackendUnavailableError, UnsupportedOperationError
from warmcell.sandbox.models import GpuDevice, SandboxId, SandboxSpec, Workspace
from warmcell.sandbox.paths import Paths

GPU = GpuDevice(uuid="GPU-1", index=0, name="A100", memory_total_bytes=1, device_nodes=("/dev/full",))
SANDBOX = SandboxId("abcdefabcdef")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(runtime=tmp_path / "r", state=tmp_path / "s", leases=tmp_path / "l").make()


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full is a GPU, /dev/random another; no specification is there."""
    monkeypatch.setattr(nvidia, "CONTROL", "/dev/null")
    monkeypatch.setattr(nvidia, "MEMORY", "/dev/zero")
    monkeypatch.setattr(nvidia, "GPU_NODES", ("/dev/null", "/dev/zero", "/dev/nvidia-none"))
    monkeypatch.setattr(nvproxy, "_OWN_NODE", re.compile("/dev/(full|random|nvidia7)"))
    monkeypatch.setattr(cdi, "DIRECTORIES", ())


@pytest.fixture
def runsc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Runsc]:
    """Makes one that lists what it is told to, on a machine with a driver of that version."""

    def make(driver: str, listed: str) -> Runsc:
        made = tmp_path / "runsc"
        made.write_text(f'#!/bin/sh\n[ "$*" = "nvproxy list-supported-drivers" ] && printf "{listed}"\n')
        made.chmod(0o755)
        (tmp_path / "version").write_text(f"{driver}\n")
        monkeypatch.setattr(nvproxy, "DRIVER", tmp_path / "version")
        nvproxy._known.cache_clear()
        return Runsc(path=made, version="release-20260817.0", day=20260817)

    return make


def planned(paths: Paths, *gpus: GpuDevice, **changes: Any) -> Any:
    """A sandbox with these: its configuration, and what the stage is to make."""
    spec = SandboxSpec(python=sys.executable, backend="gvisor", **changes)
    made = prepare(spec, sandbox_id=SANDBOX, directory=paths.sandboxes / SANDBOX, gpus=gpus, paths=paths, hidden=())
    return made.configurations[AS_ASKED], made.mounts


def test_only_leased_devices_are_there(paths: Paths) -> None:
    """With those that all devices share, open to the guest, by the numbers that they have on the host."""
    configuration, _ = planned(paths, GPU)
    numbers = {node: os.stat(node).st_rdev for node in ("/dev/full", "/dev/null", "/dev/zero")}
    assert configuration["linux"]["devices"] == [
        {
            **{"path": node, "type": "c", "major": os.major(number), "minor": os.minor(number)},
            **{"fileMode": 0o666, "uid": 0, "gid": 0},
        }
        for node, number in numbers.items()
    ]
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in configuration["process"]["env"]
    assert "sysfs" in {mount["type"] for mount in configuration["mounts"]}


@pytest.mark.parametrize("gpus", [(), (GpuDevice(**{**GPU.to_json(), "simulated": True, "device_nodes": ("/x",)}),)])
def test_without_one_all_is_as_before(
    paths: Paths, runsc: Callable[[str, str], Runsc], gpus: tuple[GpuDevice, ...]
) -> None:
    """Nobody is asked about drivers, and gVisor's is not there; so with simulated ones."""
    configuration, _ = planned(paths, *gpus)
    assert "devices" not in configuration["linux"]
    assert "sysfs" not in {mount["type"] for mount in configuration["mounts"]}
    assert not [word for word in configuration["process"]["env"] if "NVIDIA" in word]
    made = runsc("550.54.15", "")
    assert nvproxy.serving(made, gpus) is made
    assert not [word for word in made.argv(Path("/s"), "run") if "nvproxy" in word]


def test_what_a_specification_says_comes_along(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with bubblewrap: a library that is nowhere yet or another one in the system, its link and variables. What has
    no place is left out, and what would lie in a folder that the sandbox changes.
    """
    library = tmp_path / "libcuda.so.550"
    library.touch()
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "mine.so").touch()
    system = next(str(path) for path in sorted(Path("/usr/bin").iterdir()) if path.is_file() and not path.is_symlink())
    edits = {
        "deviceNodes": [{"path": "/dev/full"}],
        "mounts": [
            {"hostPath": str(library), "containerPath": place}
            for place in (
                *("/opt/nv/libcuda.so.550", system),
                *("/usr/none/libcuda.so.550", "/lib/none/x.so", "/tmp/libcuda.so", f"{folder}/mine.so"),
            )
        ],
        "hooks": [
            {"path": "/x", "args": ["x", "create-symlinks", "--link", "libcuda.so.550::/opt/nv/libcuda.so.1"]},
        ],
        "env": ["FROM_CDI=1"],
    }
    said = {"kind": cdi.KIND, "devices": [{"name": "GPU-1", "containerEdits": edits}]}
    (tmp_path / "cdi").mkdir()
    (tmp_path / "cdi" / "nvidia.json").write_text(json.dumps(said))
    monkeypatch.setattr(cdi, "DIRECTORIES", (tmp_path / "cdi",))
    configuration, stage = planned(paths, GPU, workspace=Workspace(path=str(folder), mode="cow"))
    clones = {one["name"] for one in stage["clones"] if one["source"] == str(library)}
    found = {view["path"]: view["there"] for view in stage["views"] if view["of"] in clones}
    assert found == {"root/opt/nv/libcuda.so.550": False, f"root{system}": True}
    assert {"path": "root/opt/nv/libcuda.so.1", "target": "libcuda.so.550"} in stage["links"]
    assert {"FROM_CDI=1", "LD_LIBRARY_PATH=/opt/nv"} <= set(configuration["process"]["env"])


def test_a_driver_that_runsc_lists_is_used_by_its_name(runsc: Callable[[str, str], Runsc]) -> None:
    """In every command, for a sandbox is found by the flags that it was made with."""
    served = nvproxy.serving(runsc("550.54.15", r"550.54.14\n550.54.15\n"), (GPU,))
    for words in (("run", "w"), ("pause", "w")):
        argv = served.argv(Path("/s"), *words)
        assert argv[-len(words) - 2 : -len(words)] == ["--nvproxy", "--nvproxy-driver-version=550.54.15"]


@pytest.mark.parametrize(
    ("driver", "listed", "words"),
    [
        ("580.65.06", r"550.54.15\n535.104.12\n", "does not know the NVIDIA driver 580.65.06"),
        ("550.54.1", r"550.54.15\n", "does not know the NVIDIA driver 550.54.1 "),
        ("580.65.06", r"unknown subcommand\n", "does not say which NVIDIA drivers it knows: unknown subcommand"),
        ("", r"550.54.15\n", "No NVIDIA driver is loaded"),
    ],
)
def test_a_driver_that_it_does_not_list_is_refused(
    runsc: Callable[[str, str], Runsc], driver: str, listed: str, words: str
) -> None:
    """By its exact version, with the cure."""
    with pytest.raises(BackendUnavailableError, match=words) as refused:
        nvproxy.serving(runsc(driver, listed), (GPU,))
    assert refused.value.hint
    if "580.65.06 of" in refused.value.message:
        assert "535.104.12, 550.54.15" in refused.value.hint


def test_what_is_listed_is_asked_once(runsc: Callable[[str, str], Runsc]) -> None:
    """And again when the binary is another one."""
    made = runsc("550.54.15", r"550.54.15\n")
    before = made.path.stat()
    assert nvproxy.check(made) == "550.54.15"
    made.path.write_text("#!/bin/sh\necho 1.2.3\n")
    os.utime(made.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert nvproxy.check(made) == "550.54.15"
    os.utime(made.path)
    with pytest.raises(BackendUnavailableError, match=r"does not know the NVIDIA driver 550\.54\.15"):
        nvproxy.check(made)


def test_what_gvisor_does_not_pass_on_is_refused(paths: Paths, runsc: Callable[[str, str], Runsc]) -> None:
    """Instances of divided GPUs, nodes of another kind, and a driver without its nodes."""
    with pytest.raises(UnsupportedOperationError, match="MIG") as refused:
        nvproxy.serving(runsc("550.54.15", r"550.54.15\n"), (GpuDevice(**{**GPU.to_json(), "mig": True}),))
    assert "bubblewrap" in refused.value.hint
    for node, error in (("/dev/urandom", UnsupportedOperationError), ("/dev/nvidia7", BackendUnavailableError)):
        with pytest.raises(error, match=node):
            planned(paths, GpuDevice(**{**GPU.to_json(), "device_nodes": (node,)}))
