"""What is decided about a gVisor sandbox before anything is made."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from warmcell.sandbox.backends import seccomp
from warmcell.sandbox.backends.gvisor import binary
from warmcell.sandbox.backends.gvisor.bundle import AS_ASKED, READ_ONLY, prepare, write
from warmcell.sandbox.errors import BackendUnavailableError, InvalidRequestError, UnsupportedOperationError
from warmcell.sandbox.models import Limits, Mount, SandboxId, SandboxSpec, Workspace
from warmcell.sandbox.paths import Paths

SANDBOX = SandboxId("abcdefabcdef")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(runtime=tmp_path / "r", state=tmp_path / "s", leases=tmp_path / "l").make()


def prepared(paths: Paths, **changes: Any) -> Any:
    """A sandbox of this Python, with changes to its spec and to what else `prepare` takes."""
    more = {name: changes.pop(name) for name in ("gpus", "until", "beside", "hidden") if name in changes}
    spec = SandboxSpec(python=sys.executable, backend="gvisor", **changes)
    return prepare(
        spec,
        **{
            "sandbox_id": SANDBOX,
            "directory": paths.sandboxes / SANDBOX,
            "gpus": (),
            "paths": paths,
            "hidden": (),
            **more,
        },
    )


def mounts_of(made: Any, name: str = AS_ASKED) -> dict[str, Any]:
    """By destination."""
    return {mount["destination"]: mount for mount in made.configurations[name]["mounts"]}


def test_the_guest_has_no_rights_and_is_not_root(paths: Paths) -> None:
    """Not at its start, and there is nothing to gain."""
    process = prepared(paths, limits=Limits(pids=77)).configurations[AS_ASKED]["process"]
    assert process["user"]["uid"] != 0
    assert process["user"]["gid"] != 0
    assert not any(process["capabilities"].values())
    assert process["noNewPrivileges"] is True
    assert process["rlimits"] == [{"type": "RLIMIT_NPROC", "hard": 77, "soft": 77}]


def test_only_what_must_reach_the_host_does(paths: Paths, tmp_path: Path) -> None:
    """The run directory and what the spec asks for are bind mounts; the rest is the root or memory."""
    folder = tmp_path / "work"
    folder.mkdir()
    made = prepared(paths, workspace=Workspace(path=str(folder)))
    found = mounts_of(made)
    binds = {target: mount["options"] for target, mount in found.items() if mount["type"] == "bind"}
    assert set(binds) == {"/run/warmcell", str(folder)}
    assert "rw" in binds[str(folder)]
    assert "ro" in mounts_of(made, READ_ONLY)[str(folder)]["options"]
    assert found["/run/warmcell/.own"]["type"] == "tmpfs"
    order = [mount["destination"] for mount in made.configurations[AS_ASKED]["mounts"]]
    assert order.index("/run/warmcell") < order.index("/run/warmcell/.own")


def test_a_copy_on_write_folder_is_in_the_root_unless_it_was_beside_it(paths: Paths, tmp_path: Path) -> None:
    """In the root an image has what is changed there."""
    folder = tmp_path / "work"
    folder.mkdir()
    workspace = Workspace(path=str(folder), mode="cow")
    own = prepared(paths, workspace=workspace)
    assert str(folder) not in mounts_of(own)
    assert not own.mounts["overlays"]
    beside = prepared(paths, workspace=workspace, beside=True)
    assert mounts_of(beside)[str(folder)]["source"].endswith("/changed")
    assert [made["path"] for made in beside.mounts["overlays"]] == ["changed"]


def test_what_is_the_keepers_own_is_covered(paths: Paths, tmp_path: Path) -> None:
    """Also where a workspace contains it; and it cannot be mounted."""
    found = mounts_of(prepared(paths, workspace=Workspace(path=str(tmp_path))))
    for own in (paths.runtime, paths.state):
        assert found[str(own)]["source"].endswith("/nothing")
    with pytest.raises(InvalidRequestError):
        prepared(paths, mounts=(Mount(source=str(paths.state)),))


def test_what_it_has_not_is_refused(paths: Paths) -> None:
    """A network, before anything is made."""
    with pytest.raises(UnsupportedOperationError):
        prepared(paths, network="host")


def test_configurations_are_written_where_runsc_looks(paths: Paths, tmp_path: Path) -> None:
    """As JSON, one directory each."""
    made = prepared(paths)
    write(made, tmp_path)
    said = json.loads((tmp_path / AS_ASKED / "config.json").read_text())
    assert said["root"]["path"] == str(paths.sandboxes / SANDBOX / "m" / "root")


def test_the_filter_refuses_what_other_filters_do() -> None:
    """By name; with conditions for what is refused in part."""
    rules = seccomp.rules("x86_64")["syscalls"]
    always = {name for rule in rules if "args" not in rule for name in rule["names"]}
    assert {"bpf", "keyctl", "mount", "perf_event_open", "ptrace", "userfaultfd", "setns"} <= always
    partly = {name for rule in rules if "args" in rule for name in rule["names"]}
    assert {"clone", "unshare", "chmod", "openat"} <= partly
    assert not always & partly
    assert all(rule["action"] == "SCMP_ACT_ERRNO" for rule in rules)
    assert "chmod" not in {name for rule in seccomp.rules("aarch64")["syscalls"] for name in rule["names"]}


@pytest.mark.root
@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("runsc version 0.0~20221219.0", "too old"),
        ("nothing of the kind", "cannot be used"),
    ],
)
def test_a_runsc_that_is_of_no_use_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, words: str
) -> None:
    """With the cure."""
    made = tmp_path / "runsc"
    made.write_text(f"#!/bin/sh\necho {said}\n")
    made.chmod(0o755)
    monkeypatch.setenv("WARMCELL_RUNSC", str(made))
    with pytest.raises(BackendUnavailableError, match=words) as refused:
        binary.find()
    assert refused.value.hint


@pytest.mark.root
def test_releases_of_both_kinds_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's and gVisor's own."""
    for number, version in enumerate(("0.0~20240729.0", "release-20260817.0")):
        made = tmp_path / str(number)
        made.write_text(f"#!/bin/sh\necho runsc version {version}\n")
        made.chmod(0o755)
        monkeypatch.setenv("WARMCELL_RUNSC", str(made))
        found = binary.find()
        assert (found.version, found.day) == (version, int(version.split("-")[-1].split("~")[-1][:8]))
