"""What the machine's settings and packages are read as."""

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from warmcell.extension import machine

V2 = "30 24 0:26 / {root} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "".join(
    f"3{n} 24 0:3{n} / /sys/fs/cgroup/{names} rw - cgroup cgroup rw,{names}\n"
    for n, names in enumerate(("memory", "cpu,cpuacct", "freezer"))
)


@pytest.mark.parametrize(
    ("found", "required", "enough"),
    [
        ("2.18.0", "2.18.0", True),
        ("2.18.1", "2.18.0", True),
        ("2.9.0", "2.18.0", False),
        ("2.18.0rc1", "2.18.0", True),
        ("580.126.20", "575.57.08", True),
        ("575.57.08", "575.57.08", True),
        ("550.90.12", "575.57.08", False),
        ("6", "5.4.5", True),
        ("unknown", "1.0", False),
    ],
)
def test_versions_are_compared_by_number(found: str, required: str, enough: bool) -> None:
    """Parts of a version are numbers, not text."""
    assert machine.at_least(found, required) is enough


def test_an_old_package_is_told_with_flaw_and_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version with a known hole says which, and the command that mends it; what is not installed is not told."""

    def version(name: str) -> str:
        if name == "jupyterhub":
            raise PackageNotFoundError(name)
        return "2.17.0" if name == "jupyter-server" else "99"

    monkeypatch.setattr(machine, "version", version)
    found = {one.name: one for one in machine.versions()}
    assert set(found) == {"jupyter-server", "jupyter-server-proxy"}
    old = found["jupyter-server"]
    assert not old.ok
    assert "CVE-2026-35397" in old.message
    assert old.hint == "pip install --upgrade 'jupyter-server>=2.18.0'"
    assert found["jupyter-server-proxy"].ok


def test_what_is_installed_here_is_new_enough() -> None:
    """The versions that the package requires have none of the known holes."""
    assert [one.message for one in machine.versions() if one.name == "jupyter-server" and not one.ok] == []


def test_an_old_driver_is_a_note() -> None:
    """Kernels run with it, so it is no warning."""
    old = machine.driver_version("550.90.12")
    assert (old.ok, old.severity) == (False, "note")
    assert machine.driver_version("580.65.06").ok


@pytest.mark.parametrize(
    ("mounts", "controllers", "told"),
    [
        (V2, "cpuset cpu io memory pids", "v2 (cpu, memory, pids)"),
        (V2, "", "v2 (no controllers)"),
        (V1, "", "v1 (cpu, memory)"),
        (V1 + V2, "", "v2 (no controllers) and v1 (cpu, memory)"),
        ("", "", "none"),
    ],
)
def test_control_groups_are_named_by_generation(tmp_path: Path, mounts: str, controllers: str, told: str) -> None:
    """Version 1, 2, both or none, with the controllers that limits need."""
    (tmp_path / "cgroup.controllers").write_text(controllers)
    table = tmp_path / "mountinfo"
    table.write_text(mounts.format(root=tmp_path))
    assert machine.cgroups(mounts=table) == told


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("user/max_user_namespaces", "0", "forbidden by user.max_user_namespaces"),
        ("kernel/unprivileged_userns_clone", "0", "forbidden by kernel.unprivileged_userns_clone"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "restricted by kernel.apparmor_restrict_unprivileged_userns",
        ),
        ("user/max_user_namespaces", "28633", "allowed"),
    ],
)
def test_the_setting_that_forbids_user_namespaces_is_named(tmp_path: Path, setting: str, value: str, told: str) -> None:
    """Each of the three settings that can forbid them is found by name; root does not need them."""
    path = tmp_path / setting
    path.parent.mkdir(parents=True)
    path.write_text(f"{value}\n")
    assert machine.user_namespaces(as_root=False, settings=tmp_path) == told
    assert machine.user_namespaces(as_root=True, settings=tmp_path) == f"{told} (not needed as root)"
