"""What is asked of an engine of containers, without one."""

import os
import resource
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from warmcell.sandbox.backends.docker import DockerBackend
from warmcell.sandbox.backends.docker.about import EngineInfo, read_info
from warmcell.sandbox.backends.docker.graphics import devices
from warmcell.sandbox.backends.docker.image import Image
from warmcell.sandbox.backends.docker.plan import Prepared, prepare
from warmcell.sandbox.backends.docker.probe import _for_others
from warmcell.sandbox.backends.docker.shown import Files
from warmcell.sandbox.backends.identity import Identity
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.models import GIB, GpuDevice, SandboxId, SandboxSpec
from warmcell.sandbox.paths import Paths


def info(*, runtimes: tuple[str, ...] = ("runc",), cdi: bool = False) -> EngineInfo:
    """An engine that can do that."""
    return EngineInfo(
        version="20.10",
        api=(1, 41),
        runtimes=frozenset(runtimes),
        default_runtime="runc",
        own_kernels=frozenset(),
        driver="overlay2",
        can={"memory": True, "pids": True, "cpu": True},
        cdi=cdi,
        rootless=False,
        live_restore=False,
    )


def gpu(uuid: str, *, simulated: bool = False) -> GpuDevice:
    """One of a machine's."""
    return GpuDevice(uuid=uuid, index=0, name="A100", memory_total_bytes=80 * GIB, simulated=simulated)


@pytest.mark.parametrize(("configured", "default"), [("secure", "runc"), ("", "secure")])
def test_a_runtime_with_kernels_of_its_own_is_refused_before_anything_is_made(
    tmp_path: Path, configured: str, default: str
) -> None:
    """Whatever it is called, and also as the engine's default: what is in its containers cannot be seen."""
    runtimes = {"runc": {"path": "runc"}, "nvidia": {"path": "nvidia-container-runtime"}, "krun": {}}
    runtimes["secure"] = {"path": "/usr/local/bin/runsc"}
    told = read_info({"ServerVersion": "28", "Runtimes": runtimes, "DefaultRuntime": default}, "1.41")
    assert told.own_kernels == {"secure", "krun"}
    paths = Paths(runtime=tmp_path / "r", state=tmp_path / "s", leases=tmp_path / "l")
    with pytest.raises(BackendUnavailableError, match="kernel of their own") as failed:
        DockerBackend(paths=paths, runtime=configured).checked_runtime(told)
    assert "gvisor" in failed.value.hint
    assert DockerBackend(paths=paths, runtime="nvidia").checked_runtime(told) == "nvidia"


def test_gpus_are_named_by_uuid_and_never_counted() -> None:
    """`Count` would give everybody the same device."""
    (asked,) = devices([gpu("GPU-1"), gpu("GPU-2")], info(runtimes=("runc", "nvidia")))["DeviceRequests"]
    assert asked == {
        "Driver": "nvidia",
        "DeviceIDs": ["GPU-1", "GPU-2"],
        "Capabilities": [["gpu", "compute", "utility"]],
    }


def test_without_nvidias_runtime_devices_are_named_as_the_interface_does() -> None:
    """Engines that know the Container Device Interface need no runtime of NVIDIA's."""
    (asked,) = devices([gpu("GPU-1")], info(cdi=True))["DeviceRequests"]
    assert asked == {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-1"]}


@pytest.mark.parametrize(
    ("api", "found", "gives"),
    [
        ("1.43", [], False),
        ("1.44", [], True),
        ("1.50", [], False),
        ("1.50", [{"Source": "cdi", "ID": "vendor.com/net=0"}], False),
        ("1.50", [{"Source": "cdi", "ID": "nvidia.com/gpu=all"}], True),
    ],
)
def test_an_engine_that_knows_the_interface_has_gpus_only_where_it_has_found_some(
    api: str, found: list[Mapping[str, str]], gives: bool
) -> None:
    """Newer ones know it also on machines without a GPU, and say what they have."""
    said = {"ServerVersion": "28", "Runtimes": {"runc": {}}, "CDISpecDirs": ["/etc/cdi"], "DiscoveredDevices": found}
    assert read_info(said, api).cdi is gives


def test_what_was_never_tried_is_told() -> None:
    """By what the engine says of itself; nothing of the one that the tests are run with."""
    tried = {"ServerVersion": "20.10.24", "CgroupVersion": "1", "SecurityOptions": ["name=seccomp,profile=default"]}
    assert read_info(tried, "1.41").untried == ()
    assert read_info({**tried, "ServerVersion": "26.1.5"}, "1.45").untried == ()
    other = {"ServerVersion": "29", "CgroupVersion": "2", "SecurityOptions": ["name=apparmor"]}
    assert read_info(other, "1.52").untried == (
        "an engine newer than Docker 26.1",
        "control groups of version 2",
        "AppArmor",
    )
    assert read_info({**tried, "SecurityOptions": ["name=selinux"]}, "1.41").untried == ("SELinux",)


@pytest.mark.parametrize("podman", [False, True])
def test_no_process_has_more_files_than_it_can_count(tmp_path: Path, podman: bool) -> None:
    """Engines allow a million, and not every root may; less than a notebook needs it never is."""
    made = planned(tmp_path, replace(info(), podman=podman)).config["HostConfig"]["Ulimits"]
    (files,) = (one for one in made if one["Name"] == "nofile")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert files["Soft"] == files["Hard"] == min(65_536, hard if hard >= 0 else 65_536)


def test_simulated_gpus_and_none_ask_for_nothing() -> None:
    """A simulated one has no device."""
    assert devices([], info()) == {}
    assert devices([gpu("GPU-1", simulated=True)], info()) == {}


def test_an_engine_without_a_way_to_gpus_says_so() -> None:
    """A kernel that was promised a GPU never starts without one."""
    with pytest.raises(BackendUnavailableError) as failed:
        devices([gpu("GPU-1")], info())
    assert "NVIDIA Container Toolkit" in failed.value.hint
    with pytest.raises(BackendUnavailableError, match="Podman"):
        devices([gpu("GPU-1")], replace(info(runtimes=("nvidia",)), podman=True))


def planned(
    tmp_path: Path, engine: EngineInfo, *gpus: GpuDevice, env: Mapping[str, str] = {}, volumes: Mapping[str, str] = {}
) -> Prepared:
    """A sandbox as it is asked for."""
    paths = Paths(runtime=tmp_path / "r", state=tmp_path / "s", leases=tmp_path / "l").make()
    image = Image(id="sha256:1", python="/usr/bin/python3", version=(3, 11), user_site=True, env=env, volumes=volumes)
    return prepare(
        SandboxSpec(python=""),
        sandbox_id=SandboxId("box"),
        directory=tmp_path,
        gpus=gpus,
        paths=paths,
        info=engine,
        image=image,
        runtime="",
        labels={},
    )


def test_a_sandbox_has_the_gpus_that_are_leased_and_no_other(tmp_path: Path) -> None:
    """An image of CUDA's asks for all of them: it gets those of the request, and none where none is leased."""
    wants_all = {"NVIDIA_VISIBLE_DEVICES": "all"}
    engine = info(runtimes=("runc", "nvidia"))
    with_one = planned(tmp_path, engine, gpu("GPU-1"), env=wants_all).config
    assert [one["DeviceIDs"] for one in with_one["HostConfig"]["DeviceRequests"]] == [["GPU-1"]]
    assert not [one for one in with_one["Env"] if one.startswith("NVIDIA_VISIBLE_DEVICES")]
    without = planned(tmp_path, engine, gpu("GPU-2", simulated=True), env=wants_all).config
    assert "DeviceRequests" not in without["HostConfig"]
    assert "NVIDIA_VISIBLE_DEVICES=void" in without["Env"]


def test_no_device_comes_by_its_number_or_by_a_path(tmp_path: Path) -> None:
    """Neither is a lease's: numbers change, and a path has no others of its driver."""
    for engine in (info(runtimes=("nvidia",)), info(cdi=True)):
        host = planned(tmp_path, engine, gpu("GPU-1")).config["HostConfig"]
        assert all("Count" not in one for one in host["DeviceRequests"])
        assert not {"Devices", "DeviceCgroupRules", "Privileged"} & set(host)


def test_memory_of_podmans_is_its_users(tmp_path: Path) -> None:
    """It takes no owner, and no number of files, but knows its user; what is root's it does not give away."""
    engine = replace(info(), podman=True)
    made = planned(tmp_path, engine, volumes={"/data": "/data", "/var/run": "/run"})
    memory = made.config["HostConfig"]["Tmpfs"]
    assert not [options for options in memory.values() if "nr_inodes" in options or "uid=" in options]
    modes = {"/tmp": "1777", "/dev/shm": "1777", "/var/run/warmcell": "0700", made.home: "0700", "/data": "0755"}
    assert {place for place in memory if memory[place].endswith(",U")} == set(modes)
    assert all(f"mode={mode},U" in memory[place] for place, mode in modes.items())
    assert memory["/var/run"].endswith("mode=0755")


def test_podman_without_root_is_known_and_keeps_its_user(tmp_path: Path) -> None:
    """By a field of its own; it limits nothing where control groups are of version 1, whatever it says."""
    able = {"MemoryLimit": True, "PidsLimit": True, "CpuCfsQuota": True}
    said = {"ServerVersion": "4.3.1", "BuildahVersion": "1.28.2", "CgroupVersion": "1", "Rootless": True, **able}
    told = read_info(said, "1.41")
    assert (told.rootless, told.keeps_user, any(told.can.values())) == (True, True, False)
    assert planned(tmp_path, told).config["HostConfig"]["UsernsMode"] == "keep-id"
    assert all(read_info({**said, "CgroupVersion": "2"}, "1.41").can.values())
    assert all(read_info({**said, "Rootless": False}, "1.41").can.values())


@pytest.mark.parametrize(("option", "words"), [("name=rootless", "without root"), ("name=userns", "userns-remap")])
def test_an_engine_whose_users_are_others_here_is_refused(option: str, words: str) -> None:
    """Nobody here could enter the guest's run directory, and the engine says no more than that a mount is invalid."""
    with pytest.raises(BackendUnavailableError, match=words) as failed:
        read_info({"ServerVersion": "28.1", "SecurityOptions": ["name=seccomp,profile=builtin", option]}, "1.49")
    assert "bubblewrap" in failed.value.hint


@pytest.mark.parametrize(
    ("api", "podman", "flat"),
    [((1, 41), False, True), ((1, 44), False, False), ((1, 41), True, True), ((1, 44), True, True)],
)
def test_nothing_below_a_read_only_mount_is_writable(
    tmp_path: Path, api: tuple[int, int], podman: bool, flat: bool
) -> None:
    """What is mounted below it is left out, unless the engine shows that as read-only too. Podman does not
    promise that, whatever API it says that it speaks.
    """
    tmp_path.chmod(0o755)
    identity = Identity(uid=1001, gid=1001, name="someone")
    files = Files(identity=identity, info=replace(info(), api=api, podman=podman))
    files.show(tmp_path, Path("/data"), mode="ro")
    (mount,) = files.mounts()
    assert (mount["ReadOnly"], mount["BindOptions"]["NonRecursive"]) == (True, flat)


def test_volumes_lie_where_links_lead(tmp_path: Path) -> None:
    """Each path that an image declares is asked for, else the engine makes a volume; what lies deeper comes later."""
    volumes = {"/run": "/run", "/var/run": "/run", "/var/tmp": "/tmp", "/data": "/srv/data"}
    made = planned(tmp_path, info(), volumes=volumes)
    memory = made.config["HostConfig"]["Tmpfs"]
    assert set(memory) == {*volumes, "/tmp", "/dev/shm", made.home, "/var/run/warmcell"}
    assert memory["/var/tmp"] == memory["/tmp"]
    assert {part.place for part in made.parts.parts.values()} == {"tmp", "dev/shm", made.home[1:], "srv/data"}


@pytest.mark.parametrize(
    ("mode", "group", "rootless", "found"),
    [
        (0o600, 0, False, (False, "only the owner")),
        (0o660, 0, False, (False, "only the owner")),
        (0o660, 4, False, (True, "group adm")),
        (0o666, 0, False, (True, "everybody")),
        (0o600, 0, True, (True, "engine of their own")),
    ],
)
def test_who_else_may_use_an_engine_is_found_out(
    mode: int, group: int, rootless: bool, found: tuple[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the rights of its socket, and by what it says of itself; those of the group have root's rights."""
    told = os.stat_result((0o140000 | mode, 1, 1, 1, 0, group, 0, 0, 0, 0))
    monkeypatch.setattr("warmcell.sandbox.backends.docker.probe._group", {0: "root", 4: "adm"}.__getitem__)
    can, why = _for_others(replace(info(), rootless=rootless), told)
    assert (can, found[1] in why) == (found[0], True), why
