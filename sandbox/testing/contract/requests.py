"""What is asked for and refused."""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from warmcell.sandbox.errors import (
    BackendUnavailableError,
    InvalidRequestError,
    UnsupportedOperationError,
    WarmcellError,
)
from warmcell.sandbox.models import GpuDevice, Mount, Network, Workspace
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import EngineReport
from warmcell.sandbox.saved import Saved
from warmcell.sandbox.snapshots.store import SnapshotStore
from warmcell.sandbox.testing.contract.subject import Register, Subject, expect

check = Register()


async def refused(subject: Subject, **changes: Any) -> WarmcellError:
    """The `InvalidRequestError` that a spec must give, having left nothing."""
    place = subject.place()
    try:
        instance = await subject.create(place=place, **changes)
    except InvalidRequestError as error:
        subject.nothing_is_left(*place)
        expect(error.hint, f"{error.message!r} names no cure")
        return error
    await instance.stop()
    raise AssertionError(f"{changes} was accepted")


async def unsupported(subject: Subject, **changes: Any) -> None:
    """What it declares that it cannot do is refused as that, with a cure, having left nothing."""
    place = subject.place()
    try:
        instance = await subject.create(place=place, **changes)
    except UnsupportedOperationError as error:
        subject.nothing_is_left(*place)
        expect(error.hint, f"{error.message!r} names no cure")
        return
    await instance.stop()
    raise AssertionError(f"{changes} was accepted")


@check()
async def its_report_says_that_it_is_ready(subject: Subject) -> None:
    report = await subject.backend.probe()
    expect(report.ready, f"{report.why_not} {report.hint}")
    expect(report.name == subject.backend.name, f"the report is called {report.name}")
    expect(report.capabilities == subject.backend.capabilities, "the report has other capabilities")


@check()
async def its_probe_can_be_repeated_and_leaves_nothing(subject: Subject) -> None:
    first, second = await subject.backend.probe(), await subject.backend.probe()
    expect(first.ready == second.ready, "the second probe says something else")


@check()
async def its_capabilities_name_at_least_one_network(subject: Subject) -> None:
    networks = subject.backend.capabilities.networks
    expect(networks, "there is no network to choose")
    expect(len(set(networks)) == len(networks), f"a network is named twice: {networks}")


@check(isolated=False)
async def without_isolation_it_offers_no_closed_network(subject: Subject) -> None:
    expect("none" not in subject.backend.capabilities.networks, "it offers a network that it cannot close")


@check(needs=lambda subject: set(subject.backend.capabilities.networks) < set(get_args(Network)))
async def a_network_that_it_has_not_is_refused_before_anything_is_made(subject: Subject) -> None:
    for network in set(get_args(Network)) - set(subject.backend.capabilities.networks):
        await unsupported(subject, network=network)


@check(needs=lambda subject: not subject.backend.capabilities.gpus)
async def gpus_that_it_cannot_give_are_refused_before_anything_is_made(subject: Subject) -> None:
    gpu = GpuDevice(uuid="GPU-1", index=0, name="A100", memory_total_bytes=1, device_nodes=("/dev/null",))
    await unsupported(subject, gpus=(gpu,))


@check(needs=lambda subject: not subject.backend.capabilities.rootless and os.getuid() != 0)
async def an_ordinary_user_is_refused_before_anything_is_made(subject: Subject) -> None:
    report = await subject.backend.probe()
    expect(not report.ready and report.why_not and report.hint, f"the report says {report}")
    place = subject.place()
    try:
        instance = await subject.create(place=place)
    except BackendUnavailableError as error:
        subject.nothing_is_left(*place)
        expect(error.hint, f"{error.message!r} names no cure")
        return
    await instance.stop()
    raise AssertionError("it was accepted")


@check(needs=lambda subject: not subject.backend.capabilities.memory_engines)
async def memory_that_cannot_be_saved_is_refused_though_the_machine_could(subject: Subject) -> None:
    engine: Any = _Engine()
    store = SnapshotStore(subject.folder("snapshots"))
    memory = Saved(
        engine=engine,
        store=store,
        backend_of=lambda spec: subject.backend,
        paths=Paths.default(),
        release_gpus=lambda sandbox_id: None,
        turn=lambda box: contextlib.nullcontext(0.0),
    )
    await memory.open()
    try:
        await memory.check(subject.spec())
    except UnsupportedOperationError as error:
        expect(subject.backend.name in error.message, f"{error.message!r} does not name the backend")
        expect(error.hint, f"{error.message!r} names no cure")
        return
    finally:
        await memory.close()
    raise AssertionError("it would be tried")


class _Engine:
    """One that works here, as far as anybody asks it before something is saved."""

    name = "criu"

    async def probe(self) -> EngineReport:
        """It is ready."""
        return EngineReport(name=self.name, ready=True)

    async def images(self) -> Sequence[object]:
        """None."""
        return ()

    async def close(self) -> None:
        """It has nothing."""


@check()
async def a_workspace_that_does_not_exist_is_refused(subject: Subject) -> None:
    path = subject.directory / "missing"
    error = await refused(subject, workspace=path)
    expect(str(path) in error.message, f"{error.message!r} does not name {path}")


@check()
async def a_workspace_that_is_a_file_is_refused(subject: Subject) -> None:
    path = subject.folder("file") / "notes.txt"
    path.write_text("not a folder")
    await refused(subject, workspace=path)


@check()
async def an_interpreter_that_does_not_exist_is_refused(subject: Subject) -> None:
    error = await refused(subject, python="/nowhere/bin/python")
    expect("/nowhere/bin/python" in error.message, f"{error.message!r} does not name it")


@check()
async def an_interpreter_without_an_absolute_path_is_refused(subject: Subject) -> None:
    await refused(subject, python="python3")


@check(isolated=True)
async def a_mount_that_does_not_exist_is_refused(subject: Subject) -> None:
    path = subject.directory / "missing"
    error = await refused(subject, mounts=(Mount(source=str(path)),))
    expect(str(path) in error.message, f"{error.message!r} does not name {path}")


@check(isolated=True)
async def a_mount_over_what_every_sandbox_needs_is_refused(subject: Subject) -> None:
    source = str(subject.folder("mounted"))
    for target in ("/", "/usr", "/proc", "/dev/shm", "/etc/ssl", "/run/warmcell"):
        await refused(subject, mounts=(Mount(source=source, target=target),))


@check(isolated=True)
async def a_mount_whose_target_is_not_absolute_is_refused(subject: Subject) -> None:
    source = str(subject.folder("mounted"))
    for target in ("data", "/data/../etc"):
        await refused(subject, mounts=(Mount(source=source, target=target),))


@check(isolated=True)
async def the_root_of_the_host_as_workspace_is_refused(subject: Subject) -> None:
    await refused(subject, workspace=Path("/"))


@check()
async def a_workspace_of_mode_none_need_not_exist(subject: Subject) -> None:
    workspace = Workspace(path=str(subject.directory / "missing"), mode="none")
    async with subject.box(workspace=workspace) as box:
        expect((await box.channel.hello()).pid > 0, "the guest does not answer")


@check()
async def progress_is_told_while_it_starts(subject: Subject) -> None:
    sandbox_id, directory = subject.place()
    told: list[str] = []
    instance = await subject.backend.create(
        subject.spec(), sandbox_id=sandbox_id, directory=directory, progress=told.append
    )
    await instance.stop()
    expect(told and all(told), f"it told {told}")


@check()
async def a_start_that_is_cancelled_leaves_nothing(subject: Subject) -> None:
    for delay_s in (0.0, 0.005, 0.02, 0.04):
        place = subject.place()
        start = asyncio.ensure_future(subject.create(place=place))
        await asyncio.sleep(delay_s)
        start.cancel()
        (outcome,) = await asyncio.gather(start, return_exceptions=True)
        if not isinstance(outcome, BaseException):
            await outcome.stop()
        subject.nothing_is_left(*place)


@check()
async def sandboxes_can_be_started_side_by_side(subject: Subject) -> None:
    instances = await asyncio.gather(*(subject.create() for _ in range(4)))
    try:
        runs = {instance.run_directory for instance in instances}
        expect(len(runs) == 4, f"they share run directories: {runs}")
        expect(len({instance.pid for instance in instances}) == 4, "they share a first process")
    finally:
        await asyncio.gather(*(instance.stop() for instance in instances))
