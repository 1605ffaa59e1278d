"""How one sandbox is told on a terminal."""

import dataclasses
import time
from typing import Any

from warmcell.extension.cli.ps import HEADINGS, choices, notes, row
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import (
    GIB,
    MIB,
    ErrorInfo,
    GpuDevice,
    LimitStatus,
    Parked,
    Phase,
    SandboxId,
    SandboxInfo,
    SnapshotId,
    SnapshotInfo,
    TemplateStatus,
)


def info(**changes: Any) -> SandboxInfo:
    known = {"id": SandboxId("abc"), "state": State.RUNNING, "backend": "bubblewrap", "isolated": True}
    return SandboxInfo(**{**known, "owner": "notebook", "created_at": time.time(), **changes})


def told(**changes: Any) -> dict[str, str]:
    return dict(zip(HEADINGS, row(info(**changes)), strict=True))


def test_a_plain_kernel() -> None:
    """CPU, no network, and how it started in how many ms."""
    columns = told(started_from="template", started_ms=61.6, notebook="a.ipynb")
    assert columns["ISOLATION"] == "bubblewrap"
    assert (columns["GPU"], columns["NETWORK"], columns["START"]) == ("CPU", "none", "template, 62 ms")
    assert columns["NOTEBOOK"] == "a.ipynb"
    assert list(notes(info())) == []


def test_what_is_unsafe_or_pretended_says_so() -> None:
    """No isolation, an open network and a simulated GPU stand out in their columns."""
    gpu = GpuDevice(uuid="GPU-sim-1", index=3, name="A100", memory_total_bytes=GIB, simulated=True)
    columns = told(backend="process", isolated=False, network="host", gpus=(gpu,))
    assert columns["ISOLATION"] == "NONE (process)"
    assert columns["NETWORK"] == "open"
    assert columns["GPU"] == "3: A100 (simulated)"


def test_a_parked_kernel_has_no_gpu_and_says_what_waits() -> None:
    """How much of the host's memory it takes for what it had there."""
    gpu = GpuDevice(uuid="GPU-1", index=3, name="A100", memory_total_bytes=80 * GIB)
    parked = Parked(gpus=(gpu,), since=time.time(), vram_bytes=3 * GIB)
    assert told(parked=parked, gpu="A100")["GPU"] == "parked (3.0 GiB)"
    by_torch = dataclasses.replace(parked, by="torch", stays_bytes=GIB // 2)
    assert told(parked=by_torch, gpu="A100")["GPU"] == "parked (3.0 GiB, 0.5 GiB stay)"


def test_a_start_that_takes_long_says_where_it_is() -> None:
    """Phase and seconds in the row, detail and cure below."""
    phase = Phase(name="template", since=time.time() - 20, detail="importing torch", hint="Preload less.")
    starting = info(state=State.CREATING, phase=phase)
    assert dict(zip(HEADINGS, row(starting), strict=True))["START"].startswith("template for 2")
    assert list(notes(starting)) == ["abc: template: importing torch Preload less."]


def test_a_failure_has_reason_and_cure_and_no_phase() -> None:
    """Where it stopped is not shown as if it went on."""
    phase = Phase(name="sandbox", since=time.time())
    error = ErrorInfo(code="sandbox_start", message="bwrap failed", hint="Install it.")
    failed = info(state=State.FAILED, phase=phase, error=error)
    assert dict(zip(HEADINGS, row(failed), strict=True))["START"] == "-"
    assert list(notes(failed)) == ["abc: bwrap failed", "  cure: Install it."]


def test_what_is_less_than_asked_for_is_said() -> None:
    """Modules that the template is without, a workspace that is not as asked for, limits that nothing holds."""
    template = TemplateStatus(name="default", state="ready", failed={"torch": "ImportError: libcuda"})
    limits = {
        "memory": LimitStatus(value=1.0, enforced=False, why="log in again"),
        "pids": LimitStatus(value=4096.0, enforced=True),
        "cpu": LimitStatus(value=None, enforced=False, why="not asked for"),
    }
    assert list(notes(info(template=template, limits=limits, workspace_note="read-only: no idmap"))) == [
        "abc: the template is without torch: ImportError: libcuda",
        "abc: workspace: read-only: no idmap",
        "abc: the memory limit is not enforced: log in again",
    ]


def test_a_suspended_kernel_says_what_it_takes() -> None:
    """On the disk, for it takes nothing else; and which names it can be restored to."""
    saved = SnapshotInfo(
        id=SnapshotId("s1"), kind="suspended", kernel_id="k", image_bytes=30 * MIB, layer_bytes=5 * MIB
    )
    named = SnapshotInfo(id=SnapshotId("s2"), name="before", kernel_id="k")
    other = SnapshotInfo(id=SnapshotId("s3"), name="another's", kernel_id="j")
    asleep = info(state=State.SUSPENDED, snapshot=saved.id, kernel_id="k", started_from="cold", started_ms=1.0)
    columns = dict(zip(HEADINGS, row(asleep, [saved, named, other]), strict=True))
    assert (columns["STATE"], columns["START"]) == ("suspended", "35 MiB on disk")
    assert list(notes(asleep, [saved, named, other])) == ["abc: snapshots: before"]


def test_why_a_backend_was_chosen_is_said_once_for_each_reason() -> None:
    """With those that have it for that reason; who asked for it by name needs none."""
    usual = {"backend_why": "no image is asked for"}
    infos = [info(id=SandboxId("a"), **usual), info(id=SandboxId("b"), **usual), info(id=SandboxId("c"))]
    infos.append(info(id=SandboxId("d"), backend="gvisor", backend_why="nobody has read what an agent runs"))
    assert list(choices(infos)) == [
        "a, b: bubblewrap was chosen, since no image is asked for",
        "d: gvisor was chosen, since nobody has read what an agent runs",
    ]
