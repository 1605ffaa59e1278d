"""Where control groups can be made, told from the files that the kernel shows."""

import os
from pathlib import Path

import pytest

from warmcell.sandbox.backends import cgroups
from warmcell.sandbox.backends.cgroups import Cgroup
from warmcell.sandbox.backends.cgroups.group import name_for, settings
from warmcell.sandbox.backends.cgroups.scope import Scope
from warmcell.sandbox.backends.cgroups.survey import Hierarchy, survey
from warmcell.sandbox.models import SandboxId

SECOND = "31 23 0:28 {root} {mount} rw,nosuid - cgroup2 cgroup2 rw\n"
FIRST = "32 31 0:29 / {mount} rw,relatime - cgroup cgroup rw,{controllers}\n"


class Machine:
    """A tree of directories that looks like a mounted hierarchy."""

    def __init__(self, directory: Path) -> None:
        self.mount = directory / "cgroup"
        self.mounts, self.own = directory / "mountinfo", directory / "self"
        self.own.write_text("0::/\n")

    def second(self, *, member: str = "/", controllers: str = "cpu memory pids", handed_on: str = "") -> Path:
        """Version 2, this process being in `member`."""
        group = self.mount / member.lstrip("/")
        for directory in (self.mount, group):
            directory.mkdir(parents=True, exist_ok=True)
            known = controllers if directory == group else "cpu memory pids"
            (directory / "cgroup.controllers").write_text(known)
            (directory / "cgroup.subtree_control").write_text(handed_on)
            (directory / "cgroup.procs").write_text("")
        self.mounts.write_text(SECOND.format(root="/", mount=self.mount))
        self.own.write_text(f"0::{member}\n")
        return group

    def first(self) -> None:
        """Version 1, each controller with a mount of its own."""
        lines = []
        for name in ("memory", "pids", "cpu"):
            (self.mount / name).mkdir(parents=True)
            lines.append(FIRST.format(mount=self.mount / name, controllers=name))
        self.mounts.write_text("".join(lines))
        self.own.write_text("4:memory:/\n3:pids:/\n2:cpu:/\n0::/\n")

    def survey(self) -> tuple[dict[str, Hierarchy], dict[str, str]]:
        return survey(mounts=self.mounts, own=self.own)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_delegated_group_is_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary user whose service manager delegates a group needs no root."""
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    group = machine.second(member="/user.slice/warmcell.scope", handed_on="cpu memory pids")
    found, why = machine.survey()
    assert {name: (one.parent, one.version) for name, one in found.items()} == {
        "memory": (group, 2),
        "pids": (group, 2),
        "cpu": (group, 2),
    }
    assert not why


def test_what_is_not_handed_on_to_the_user_says_why(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd delegates memory and pids, but not always the processors."""
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    machine.second(member="/user.slice/warmcell.scope", controllers="memory pids", handed_on="memory pids")
    found, why = machine.survey()
    assert set(found) == {"memory", "pids"}
    assert "Delegate=cpu" in why["cpu"]


def test_the_first_version_is_used_where_only_that_can_be_written(machine: Machine) -> None:
    """As root on an older system."""
    machine.first()
    found, why = machine.survey()
    assert {name: (one.parent.name, one.version) for name, one in found.items()} == {
        "memory": ("memory", 1),
        "pids": ("pids", 1),
        "cpu": ("cpu", 1),
    }
    assert not why


def test_nothing_mounted_is_told_with_its_cure(machine: Machine) -> None:
    """A container without /sys/fs/cgroup."""
    machine.mounts.write_text("")
    found, why = machine.survey()
    assert not found
    assert all("docker run" in reason for reason in why.values())
    assert set(why) == set(cgroups.CONTROLLERS)


def test_a_mount_that_shows_only_a_part_is_read_right(machine: Machine) -> None:
    """In a container the hierarchy's root is somewhere in the host's."""
    machine.second(handed_on="cpu memory pids")
    machine.mounts.write_text(SECOND.format(root="/docker/abc", mount=machine.mount))
    machine.own.write_text("0::/docker/abc\n")
    found, _ = machine.survey()
    assert {one.parent for one in found.values()} == {machine.mount}


def test_groups_of_a_living_keeper_are_no_leftovers(tmp_path: Path) -> None:
    """Another keeper of this machine goes on undisturbed; groups of others are not looked at."""
    mine = name_for(SandboxId("abcdefghijkl"))
    for name in (mine, "warmcell-999999999.1-abcdefghijkl", "warmcell-odd", "system.slice"):
        (tmp_path / name).mkdir()
    found = cgroups.leftovers([tmp_path])
    assert [group.entrances[0].parent.name for group in found] == ["warmcell-999999999.1-abcdefghijkl"]


def test_kills_for_memory_are_counted(tmp_path: Path) -> None:
    """By the name of the counter in the file of either version."""
    (tmp_path / "memory.events").write_text("low 0\noom 2\noom_kill 3\n")
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    assert Cgroup({"memory": tmp_path}, 2).oom_kills() == 3
    assert Cgroup({"memory": tmp_path}, 1).oom_kills() == 1
    assert Cgroup({"pids": tmp_path}, 2).oom_kills() == 0


@pytest.mark.parametrize(
    ("controller", "value", "version", "expected"),
    [
        ("memory", 2**30, 2, {"memory.max": "1073741824", "?memory.swap.max": "0"}),
        ("pids", 64, 2, {"pids.max": "64"}),
        ("cpu", 1.5, 2, {"cpu.max": "150000 100000"}),
        ("cpu", 0.5, 1, {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
        ("cpu", 0.0001, 1, {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "1000"}),
    ],
)
def test_values_are_written_in_the_kernels_units(
    controller: str, value: float, version: int, expected: dict[str, str]
) -> None:
    """Bytes, counts, and microseconds of a tenth of a second; the kernel takes no quota below a millisecond."""
    assert settings(controller, value, version) == expected


def test_a_scope_is_asked_for_with_its_limits() -> None:
    """By the service manager's own names for them."""
    scope = Scope("warmcell-1.2-abcdefghijkl", {"memory": 2**30, "pids": 64, "cpu": 1.5})
    assert scope.prefix[:3] == ("systemd-run", "--user", "--scope")
    assert {
        "--unit=warmcell-1.2-abcdefghijkl.scope",
        "--property=MemoryMax=1073741824",
        "--property=MemorySwapMax=0",
        "--property=TasksMax=64",
        "--property=CPUQuota=150%",
    } <= set(scope.prefix)
    assert not scope.entrances


def test_a_scope_without_a_limit_sets_none() -> None:
    """None means no cap of ours."""
    assert not [word for word in Scope("x", {"memory": None}).prefix if word.startswith("--property")]
