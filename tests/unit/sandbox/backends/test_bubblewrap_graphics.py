"""What a bubblewrap sandbox with GPUs is planned to see: whatever specifications say, it can be started."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from warmcell.sandbox.backends import cdi
from warmcell.sandbox.backends.bubblewrap import graphics, rootfs
from warmcell.sandbox.backends.bubblewrap.rootfs import View
from warmcell.sandbox.backends.identity import Identity
from warmcell.sandbox.backends.places import check_places
from warmcell.sandbox.models import GpuDevice

GPU = GpuDevice(uuid="GPU-1", index=0, name="X", memory_total_bytes=1, device_nodes=("/dev/zero",))


@pytest.fixture
def view(tmp_path: Path) -> View:
    """With a system whose programs and libraries are in /usr alone, and with a folder that is asked for."""
    view = View(base=tmp_path / "m", identity=Identity(uid=4321, gid=4321, name="guest"), as_root=False)
    rootfs.system(view)
    for name in ("usr/lib/firmware", "usr/bin", "work/inside", "opt"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "usr/lib/firmware/gsp.bin").touch()
    (tmp_path / "usr/lib/real.so.1").touch()
    (tmp_path / "usr/lib/alias.so").symlink_to("real.so.1")
    (tmp_path / "libcuda.so.1").touch()
    view.show(tmp_path / "usr", Path("/usr"))
    for name in ("lib", "bin"):
        view.entries[f"/{name}"] = rootfs.link(f"usr/{name}")
    view.show(tmp_path / "work", Path("/folder"), mode="rw")
    view.entries["/tmp"] = view.tmpfs("tmp", size_bytes=4096, mode="1777", owned=False)
    view.links["/data"] = "/circle"
    view.links["/circle"] = "data"
    return view


def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **edits: Any) -> None:
    """A specification of the device."""
    spec = {"kind": cdi.KIND, "devices": [{"name": "GPU-1", "containerEdits": edits}]}
    edits.setdefault("deviceNodes", []).append({"path": "/dev/zero"})
    monkeypatch.setattr(cdi, "DIRECTORIES", (tmp_path,))
    (tmp_path / "nvidia.json").write_text(json.dumps(spec))


def planned(view: View) -> dict[str, Any]:
    """What is there besides what was there without a GPU, as far as specifications say it."""
    before = set(view.entries)
    graphics.show(view, [GPU])
    check_places(view.host_trees)
    made = {f"/{one['place']}": one for one in view.plan()["entries"]}
    return {
        place: one
        for place, one in made.items()
        if place not in before and not place.startswith("/sys") and place not in view.links
    }


def test_only_leased_devices_are_there(view: View) -> None:
    """Simulated ones have no nodes at all."""
    del view.entries["/dev/zero"]
    graphics.show(view, [GpuDevice(uuid="S", index=0, name="S", memory_total_bytes=1, simulated=True)])
    assert "/dev/zero" not in view.entries
    graphics.show(view, [GPU])
    assert view.entries["/dev/zero"] == {"host": "/dev/zero", "mode": "dev"}


def test_what_lies_behind_links_of_the_sandbox_is_found_where_they_lead(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The firmware of each machine with the driver is at /lib, and there by itself."""
    firmware = tmp_path / "usr/lib/firmware/gsp.bin"
    library = str(tmp_path / "libcuda.so.1")
    mounts = [
        {"hostPath": str(firmware), "containerPath": "/lib/firmware/gsp.bin"},
        {"hostPath": library, "containerPath": "/lib/real.so.1"},
        {"hostPath": library, "containerPath": "//opt//nv/./libcuda.so.1"},
    ]
    links = {"args": ["x", "create-symlinks", "--link", "real.so.1::/lib/alias.so"], "path": "/x"}
    said(tmp_path, monkeypatch, mounts=mounts, hooks=[links])
    with caplog.at_level(logging.WARNING):
        assert list(planned(view)) == ["/opt/nv/libcuda.so.1", "/usr/lib/real.so.1"]
    assert not caplog.text
    assert view.env["LD_LIBRARY_PATH"] == "/usr/lib:/opt/nv"


def test_a_driver_that_only_the_environment_knows_of_is_found(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its directory is in sight. Others that are named there are nobody's affair."""
    seen, hidden, other = (tmp_path / name for name in ("seen", "hidden", "other"))
    for place in (seen, hidden, other):
        place.mkdir()
        (place / ("libother.so.1" if place is other else "libcuda.so.1")).touch()
    view.show(seen, seen)
    view.show(other, other)
    monkeypatch.setattr(cdi, "DIRECTORIES", ())
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{other}::{hidden}:relative:{seen}/nowhere:{seen}")
    graphics.show(view, [GPU])
    assert view.env["LD_LIBRARY_PATH"] == str(seen)
    monkeypatch.delenv("LD_LIBRARY_PATH")
    view.env = {}
    graphics.show(view, [GPU])
    assert "LD_LIBRARY_PATH" not in view.env


@pytest.mark.parametrize(
    "place",
    [
        *("/", "/usr", "/lib", "/run", "/etc/libcuda.so.1", "/opt", "/folder", "/tmp", "/dev/libcuda.so.1"),
        *("/lib/libcuda.so.1", "/bin/nvidia-smi", "/usr/lib/alias.so", "/usr/lib/firmware", "/usr/lib/real.so.1/x"),
        *("/var/run/warmcell/x", "/var/tmp/libcuda.so.1", "/folder/inside", "/folder/none/x", "/data/libcuda.so.1"),
    ],
)
def test_what_has_no_place_is_left_out_and_named(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """Nobody chose these places, so nobody could choose others: the start goes on, and the log says what is missing."""
    view.show(tmp_path / "opt", Path("/opt/mine"))
    mounts = [{"hostPath": str(tmp_path / "libcuda.so.1"), "containerPath": place}]
    said(tmp_path, monkeypatch, mounts=mounts)
    with caplog.at_level(logging.WARNING):
        assert planned(view) == {}
    assert f"at {place}, where it cannot be shown" in caplog.text


@pytest.mark.parametrize("place", ["/lib/none.so", "/usr/none.so", "/etc/x", "/tmp/x", "/data/x", "/usr", "/opt"])
def test_a_link_that_has_no_place_is_left_out_and_named(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """As files are, but for one whose place is taken by a file of the same system."""
    view.show(tmp_path / "opt", Path("/opt/mine"))
    hook = {"path": "/x", "args": ["x", "create-symlinks", "--link", f"target::{place}"]}
    said(tmp_path, monkeypatch, hooks=[hook])
    with caplog.at_level(logging.WARNING):
        assert planned(view) == {}
    assert (f"at {place}, where it cannot be shown" in caplog.text) == (place != "/usr")


@pytest.mark.parametrize("place", ["/dev", "/dev/fd/3", "/dev/null", "/dev/null/x", "/dev/shm/x", "/dev/pts", "/opt/x"])
def test_a_node_that_has_no_place_is_left_out_and_named(
    view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """It would cover what every sandbox has, or lie behind a link. Others are there."""
    said(
        tmp_path,
        monkeypatch,
        deviceNodes=[
            {"path": place, "hostPath": "/dev/full"},
            {"path": "/dev/nvidia-caps/x", "hostPath": "/dev/full"},
        ],
    )
    with caplog.at_level(logging.WARNING):
        assert list(planned(view)) == ["/dev/nvidia-caps/x"]
    assert f"at {place}, where it cannot be shown" in caplog.text
    assert view.entries["/dev/null"] == {"host": "/dev/null", "mode": "dev"}
