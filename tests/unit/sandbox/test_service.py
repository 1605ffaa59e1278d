"""The service and its pool above a backend in memory: who owns what, and what is left."""

import asyncio
import contextlib
import dataclasses
import functools
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pytest

from tests.leaks import Places
from warmcell.sandbox import box, errors, freezing
from warmcell.sandbox.backends.base import ExitInfo
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.changes import Subscription
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import (
    NetworkPolicy,
    SandboxId,
    SandboxInfo,
    SandboxSpec,
    SnapshotId,
    SnapshotInfo,
    TemplateStatus,
)
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.registry import FAILED_KEPT
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.snapshots.manifest import Manifest
from warmcell.sandbox.testing import fakes
from warmcell.sandbox.testing.fakes import FakeBackend, FakeInstance
from warmcell.sandbox.told import plausible


def one_gpu(places: Places) -> GpuPool:
    """A machine with one GPU."""
    return GpuPool(SimulatedInventory([{"name": "A100", "memory": "80GiB"}]), LeaseDirectory(places.leases))


async def held(gpus: GpuPool) -> bool:
    return any(row["lease"] is not None for row in await gpus.status())


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def gpus(places: Places) -> GpuPool:
    return one_gpu(places)


@pytest.fixture
async def service(backend: FakeBackend, gpus: GpuPool, places: Places) -> AsyncIterator[SandboxService]:
    made = SandboxService(
        backends={"fake": backend},
        default_backend="fake",
        gpus=gpus,
        paths=Paths(places.runtime, places.state, places.leases).make(),
        bounds=Bounds(),
        prepared_per_template=0,
    )
    yield made
    await made.close()
    assert not list((places.runtime / "s").iterdir())


def spec(**fields: Any) -> SandboxSpec:
    return SandboxSpec(python=sys.executable, **{"network": "host", "preload": (), "gpu": "A100", **fields})


class HangsUp(FakeInstance):
    """Its guest ends as it is first spoken with; how is told a moment later, if at all."""

    def __init__(self, *args: Any, told_after_s: float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told_after_s = told_after_s

    async def _answer(
        self, request: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.close()
        if self._told_after_s is not None:
            asyncio.get_running_loop().call_later(self._told_after_s, lambda: self.die(message="the engine killed it"))


@pytest.mark.parametrize("told_after_s", [0.0, 0.2, None])
async def test_who_ends_as_it_is_spoken_with_is_said_to_have_ended_and_how(
    service: SandboxService, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, told_after_s: float | None
) -> None:
    """Also where that is known only after it has hung up; where it never is, nothing is made up."""
    monkeypatch.setattr(fakes, "FakeInstance", functools.partial(HangsUp, told_after_s=told_after_s))
    monkeypatch.setattr(box, "DEATH_TIMEOUT_S", 5.0 if told_after_s is not None else 0.1)
    with pytest.raises(errors.WarmcellError) as failed:
        await service.create(spec(), owner="notebook")
    if told_after_s is None:
        assert isinstance(failed.value, errors.TransportError)
    else:
        assert isinstance(failed.value, errors.SandboxStartError)
        assert "exit code 137: the engine killed it" in failed.value.message


async def until_creating(service: SandboxService) -> SandboxId:
    """The id of a sandbox that comes up."""
    changes = service.subscribe()
    while True:
        change = await changes.next(timeout=60)
        assert isinstance(change, SandboxInfo)
        if change.phase is not None and change.phase.name == "sandbox":
            changes.close()
            return change.id


async def test_deleted_while_it_comes_up_it_stays_deleted(
    service: SandboxService, backend: FakeBackend, gpus: GpuPool
) -> None:
    """`create` says so, and neither sandbox nor lease is left."""
    backend.delay_s = 60
    creating = asyncio.create_task(service.create(spec(), owner="client"))
    await service.stop(await until_creating(service))
    with pytest.raises(errors.ConflictError, match="was stopped while it came up"):
        await creating
    assert (service.infos(), await held(gpus)) == ([], False)


async def test_when_its_caller_gives_up_nothing_is_left(
    service: SandboxService, backend: FakeBackend, gpus: GpuPool
) -> None:
    """A cancelled `create` leaves neither sandbox nor lease."""
    backend.delay_s = 60
    creating = asyncio.create_task(service.create(spec(), owner="client"))
    await until_creating(service)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    assert (service.infos(), await held(gpus)) == ([], False)


async def test_closing_ends_what_comes_up(service: SandboxService, backend: FakeBackend) -> None:
    """Nothing is made after the end, and who asks then is told so."""
    backend.delay_s = 60
    creating = asyncio.create_task(service.create(spec(), owner="client"))
    await until_creating(service)
    await service.close()
    for late in (creating, asyncio.create_task(service.create(spec(), owner="client"))):
        with pytest.raises(errors.ConflictError):
            await late
    assert backend.instances == []


async def test_what_was_made_from_inside_goes_with_a_sandbox_that_dies(
    service: SandboxService, backend: FakeBackend, gpus: GpuPool
) -> None:
    """Children and leases go; the sandbox that died stays listed with the reason, and makes no more."""
    parent = await service.create(spec(), owner="notebook")
    await service.create(spec(gpu=None), owner="remote", parent=parent.id)
    backend.instances[0].die(oom_killed=True)
    await until(lambda: len(service.infos()) == 1 and gpus.has(parent.id, "A100") is None)
    (left,) = service.infos()
    assert left.state is State.FAILED
    assert left.error is not None
    assert "killed for memory" in left.error.message
    assert "more memory" in left.error.hint
    with pytest.raises(errors.ConflictError):
        await service.create(spec(gpu=None), owner="remote", parent=parent.id)


async def test_a_sandbox_that_is_given_up_gives_its_gpu_back(service: SandboxService, gpus: GpuPool) -> None:
    """As where its first kernel did not start."""
    info = await service.create(spec(), owner="notebook")
    await service.fail(info.id, errors.SandboxStartError("It did not start", hint="Try again."))
    assert not await held(gpus)
    assert [one.state for one in service.infos()] == [State.FAILED]


async def listed(changes: Subscription) -> list[SandboxId]:
    """What a page lists that has heard all this."""
    found: dict[SandboxId, None] = {}
    while (told := await changes.next(timeout=0)) is not None:
        if isinstance(told, SandboxInfo) and told.state is not State.STOPPED:
            found[told.id] = None
        elif isinstance(told, SandboxInfo):
            found.pop(told.id, None)
    return list(found)


async def test_failures_are_kept_but_not_without_end(service: SandboxService, backend: FakeBackend) -> None:
    """A page can read the latest ones; a flood of failures costs no memory."""
    backend.fails_with = errors.BackendUnavailableError("No bwrap", hint="Install it.")
    with contextlib.closing(service.subscribe()) as changes:
        for _ in range(FAILED_KEPT + 5):
            with pytest.raises(errors.BackendUnavailableError):
                await service.create(spec(gpu=None), owner="client")
        kept = [info.id for info in service.infos()]
        assert len(kept) == FAILED_KEPT
        assert await listed(changes) == kept


async def test_a_failure_that_is_stopped_is_told_to_be_gone(service: SandboxService, backend: FakeBackend) -> None:
    """Whoever lists it would list it for good."""
    backend.fails_with = errors.BackendUnavailableError("No bwrap", hint="Install it.")
    with pytest.raises(errors.BackendUnavailableError):
        await service.create(spec(gpu=None), owner="client")
    (failed,) = service.infos()
    changes = service.subscribe()
    await service.stop(failed.id)
    told = await changes.next(timeout=60)
    assert isinstance(told, SandboxInfo)
    assert (told.id, told.state) == (failed.id, State.STOPPED)
    assert service.infos() == []
    changes.close()


async def test_the_next_start_of_a_notebook_forgets_why_the_last_one_failed(
    service: SandboxService, backend: FakeBackend
) -> None:
    """Other notebooks' failures stay told."""
    backend.fails_with = errors.BackendUnavailableError("No bwrap", hint="Install it.")
    for notebook in ("/a.ipynb", "/b.ipynb"):
        with pytest.raises(errors.BackendUnavailableError):
            await service.create(spec(gpu=None), owner="notebook", notebook=notebook)
    backend.fails_with = None
    (of_a, of_b) = service.infos()
    with contextlib.closing(service.subscribe()) as changes:
        info = await service.create(spec(gpu=None), owner="notebook", notebook="/a.ipynb")
        told = await changes.next(timeout=60)
        assert isinstance(told, SandboxInfo)
        assert (told.id, told.state) == (of_a.id, State.STOPPED)
    await service.stop(info.id)
    assert service.infos() == [of_b]


async def test_a_start_that_failed_can_be_tried_again(service: SandboxService, backend: FakeBackend) -> None:
    """In the same sandbox: names in the run directory are not used twice, and no phase is left."""
    info = await service.create(spec(), owner="notebook")
    box = service.live(info.id)
    starting = asyncio.create_task(service.start_kernel(info.id, env={}, cwd=""))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert box.info.phase is None
    kernel = await service.start_kernel(info.id, env={}, cwd="")
    assert (kernel.generation, kernel.alive) == (1, True)
    with pytest.raises(errors.ConflictError, match="has a kernel"):
        await service.start_kernel(info.id, env={}, cwd="")
    assert box.info.phase is not None  # of the one that has not answered yet
    backend.instances[0].end_kernel(3)
    await kernel.exited.wait()
    await box.signal_kernel(2)
    assert kernel.exit_code == 3


def test_what_a_guest_tells_of_its_template_is_cut_down() -> None:
    """No page gets a number that is none, a module that nobody asked for, or a megabyte of text."""
    said = TemplateStatus(
        name="x" * 9999,
        state="importing",
        since=float("nan"),
        seconds=float("inf"),
        imported=("numpy", "evil"),
        failed={f"m{n}": "y" * 9999 for n in range(99)},
    )
    told = plausible(said, ("numpy",))
    assert (told.since, told.seconds, told.imported) == (0.0, 0.0, ("numpy",))
    assert len(told.failed) == 2
    assert max(map(len, [told.name, *told.failed.values()])) == 500


async def until(what: Callable[[], bool]) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(60):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_what_was_brought_in_is_held_against_the_bounds(service: SandboxService) -> None:
    """A snapshot says itself what it had, and whoever made it may not have asked this operator."""
    await service.memory.store.open()
    info = await service.create(spec(gpu=None), owner="notebook", kernel_id="k")
    service.admission.bounds = Bounds(networks=("host",))
    made = SnapshotInfo(id=SnapshotId("s" * 12), engine="criu")
    async with service.memory.store.draft(made.id) as draft:
        await draft.commit(Manifest(info=made, spec=spec(network="none")), durable=False)
    with pytest.raises(errors.InvalidRequestError, match="network 'none' is not allowed"):
        await service.restore(info.id, made.id)
    with pytest.raises(errors.UnsupportedOperationError):
        service.admission.bounds = Bounds()
        await service.restore(info.id, made.id)


async def test_hosts_are_not_named_where_the_network_cannot_be_taken_away(service: SandboxService) -> None:
    """A backend without isolation refuses before anything is made, and so does a network that is open already."""
    policy = NetworkPolicy(allow=("pypi.org",))
    with pytest.raises(errors.UnsupportedOperationError, match="no network 'none'"):
        await service.create(spec(gpu=None, network="none", egress=policy), owner="client")
    with pytest.raises(errors.InvalidRequestError, match="held to a list"):
        await service.create(spec(gpu=None, egress=policy), owner="client")
    with pytest.raises(errors.InvalidRequestError, match="no host"):
        await service.check(spec(gpu=None, network="none", egress=NetworkPolicy(allow=("http://x",))))
    assert all(info.state is State.FAILED for info in service.infos())


async def test_a_prepared_sandbox_reaches_what_is_asked_for_and_waits_with_nothing(
    gpus: GpuPool, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the policy, so that a pool serves all; while it waits it has none, and no secret of anybody."""
    service = SandboxService(
        backends={"fake": FakeBackend(isolated=True)},
        default_backend="fake",
        gpus=gpus,
        paths=Paths(places.runtime, places.state, places.leases).make(),
        bounds=Bounds(),
        prepared_per_template=0,
    )
    try:
        wanted = spec(gpu=None, network="none", egress=NetworkPolicy(allow=("pypi.org",)))
        prepared = await service._prepare(wanted)
        assert (prepared.spec.egress, prepared.door, prepared.info.egress) == (None, None, None)

        async def take(*_: object) -> object:
            return prepared

        monkeypatch.setattr(service, "_take", take)
        info = await service.create(wanted, owner="client")
        box = service.live(info.id)
        assert box is prepared
        assert info.egress == box.spec.egress == wanted.egress
        assert box.door is not None
        assert box.door.rules.why_not("pypi.org", 443) is None
        assert "HTTPS_PROXY" in await box.network_environment()
        await service.set_network(info.id, None)
        assert (box.door, box.info.egress, await box.network_environment()) == (None, None, {})
    finally:
        await service.close()


async def test_what_is_being_frozen_when_it_is_to_go_goes_on_before_it_does(
    service: SandboxService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that are stopped while their sandbox ends are not seen to end by those that wait for them."""
    said: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def freeze(processes: Callable[[], Sequence[int]]) -> None:
        begun.set()
        assert go_on.wait(60)
        said.append("frozen")

    stop = FakeInstance.stop

    async def stopped(instance: FakeInstance, *, timeout: float = 5.0) -> ExitInfo:
        said.append("stop")
        with pytest.raises(errors.ConflictError, match="going away"):
            await live.freeze()
        return await stop(instance, timeout=timeout)

    monkeypatch.setattr(freezing, "freeze", freeze)
    monkeypatch.setattr(freezing, "thaw", lambda processes: said.append("on"))
    monkeypatch.setattr(FakeInstance, "stop", stopped)
    made = await service.create(spec(), owner="notebook")
    live = service.live(made.id)
    freezing_it = asyncio.create_task(live.freeze())
    await asyncio.to_thread(begun.wait, 60)
    ending = asyncio.create_task(service.stop(made.id))
    for _ in range(100):
        await asyncio.sleep(0)
    assert live.info.state is State.STOPPING
    go_on.set()
    await asyncio.gather(freezing_it, ending)
    assert said == ["frozen", "on", "stop"]


class KnownImages:
    """Images of which each has an id, and somebody who would remove it in the next moment."""

    def __init__(self, in_use: Callable[[], set[str]]) -> None:
        self._in_use = in_use
        self.seen: list[set[str]] = []

    async def resolve(self, spec: SandboxSpec, backend: str) -> SandboxSpec:
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(lambda: self.seen.append(self._in_use()))
        return dataclasses.replace(spec, image="id-of-it")

    def backend_of(self, ref: str, *, default: str, among: Sequence[str]) -> str:
        return default


async def test_an_image_is_in_use_as_soon_as_a_start_knows_which_it_is(service: SandboxService) -> None:
    """Whoever removes images finds no moment between: its name may stand for another one by then."""
    images = service.admission.choosing.images = KnownImages(service.images_in_use)
    spec = SandboxSpec(python=sys.executable, image="a", gpu="A100", network="host", preload=())
    await service.create(spec, owner="notebook")
    assert images.seen == [{"id-of-it"}]
