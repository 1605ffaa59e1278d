"""Which backend is taken where none is named."""

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from tests.leaks import Places
from warmcell.sandbox import choosing
from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.choosing import Choice, Choosing
from warmcell.sandbox.errors import BackendUnavailableError, InvalidRequestError, UnsupportedOperationError
from warmcell.sandbox.gpus.leases import LeaseDirectory
from warmcell.sandbox.gpus.pool import GpuPool
from warmcell.sandbox.gpus.simulated import SimulatedInventory
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import BackendReport, Capabilities
from warmcell.sandbox.service import SandboxService
from warmcell.sandbox.testing.fakes import FakeBackend

NAMES = ("bubblewrap", "docker", "gvisor", "process")


class Tried(FakeBackend):
    """A backend that counts how often it is tried. As gVisor it has no network and no GPUs."""

    tries = 0

    @property
    def capabilities(self) -> Capabilities:
        if self.name != "gvisor":
            return super().capabilities
        return Capabilities(isolated=True, gpus=False, networks=("none",))

    async def probe(self) -> BackendReport:
        self.tries += 1
        await asyncio.sleep(0)
        return await super().probe()


class Built:
    """Images by name, and whose they are; an engine of containers has any."""

    def __init__(self, **images: Sequence[str]) -> None:
        self._images = images

    async def resolve(self, spec: SandboxSpec, backend: str) -> SandboxSpec:
        return spec

    def backend_of(self, ref: str, *, default: str, among: Sequence[str]) -> str:
        mine = self._images.get(ref, ())
        return next((name for name in (default, *among) if name in mine), "docker")


def backends() -> dict[str, Tried]:
    return {name: Tried(name=name, isolated=name != "process") for name in NAMES}


def chooser(given: dict[str, Tried] | None = None, **changes: Any) -> Choosing:
    made = Choosing(given or backends(), **{"among": NAMES[:3], **changes})
    made.images = Built(both=("bubblewrap", "gvisor", "docker"), container=("docker",))
    return made


def spec(**changes: Any) -> SandboxSpec:
    return SandboxSpec(python=sys.executable, **changes)


@pytest.mark.parametrize("owner", ["notebook", "remote", "fork", "pool"])
async def test_a_notebook_has_the_same_whatever_is_installed(owner: str) -> None:
    """Without an image it is bubblewrap, though all others are ready, and none of them is tried."""
    given = backends()
    choice = await chooser(given).for_owner(spec(), owner)
    assert choice == Choice("bubblewrap", "no image is asked for")
    assert [one.tries for one in given.values()] == [0, 0, 0, 0]


@pytest.mark.parametrize(("image", "backend"), [("both", "bubblewrap"), ("container", "docker"), ("else:1", "docker")])
async def test_an_image_decides_for_who_can_have_it(image: str, backend: str) -> None:
    """What bubblewrap has not is a container's; the reason names the image."""
    choice = await chooser().for_owner(spec(image=image), "notebook")
    assert choice.backend == backend
    assert image in choice.why


async def test_an_agent_gets_a_kernel_of_its_own() -> None:
    """Where that works, with an image too that gVisor can have."""
    given = backends()
    made = chooser(given)
    assert (await made.for_owner(spec(), "client")).backend == "gvisor"
    assert (await made.for_owner(spec(image="both"), "client")).backend == "gvisor"
    assert (await made.for_owner(spec(image="container"), "client")).backend == "docker"
    assert given["gvisor"].tries == 1


@pytest.mark.parametrize(
    ("wish", "why"), [({"network": "host"}, "it has no network 'host'"), ({"gpu": "A100"}, "it has no GPUs")]
)
async def test_what_gvisor_cannot_an_agent_gets_as_a_notebook_does(wish: dict[str, Any], why: str) -> None:
    """The reason says what is missing; nothing is tried for that."""
    given = backends()
    choice = await chooser(given).for_owner(spec(**wish), "client")
    assert choice.backend == "bubblewrap"
    assert choice.why.endswith(why)
    assert given["gvisor"].tries == 0


async def test_where_gvisor_has_no_gpus_an_agent_with_one_gets_as_a_notebook_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though it has them elsewhere; who wants none has gVisor."""
    can = Capabilities(isolated=True, gpus=True, networks=("none",), own_kernel=True)
    monkeypatch.setattr(Tried, "capabilities", can)
    made = chooser()
    report = BackendReport(name="gvisor", ready=True, capabilities=can, no_gpus="runsc does not know the driver")
    made.know(report)
    choice = await made.for_owner(spec(gpu="A100"), "client")
    assert choice.backend == "bubblewrap"
    assert choice.why.endswith("it has no GPUs here: runsc does not know the driver")
    assert (await made.for_owner(spec(), "client")).backend == "gvisor"
    made.know(dataclasses.replace(report, no_gpus=""))
    assert (await made.for_owner(spec(gpu="A100"), "client")).backend == "gvisor"


async def test_where_gvisor_is_not_an_agent_gets_as_a_notebook_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once by however many ask, and again later: somebody may have installed it."""
    given = backends()
    given["gvisor"].fails_with = BackendUnavailableError("runsc is not installed", hint="Install it.")
    made = chooser(given)
    choices = await asyncio.gather(*(made.for_owner(spec(), "client") for _ in range(5)))
    assert {choice.backend for choice in choices} == {"bubblewrap"}
    assert choices[0].why.endswith("runsc is not installed")
    assert given["gvisor"].tries == 1
    monkeypatch.setattr(choosing, "TRY_AGAIN_S", -1.0)
    given["gvisor"].fails_with = None
    assert (await made.for_owner(spec(), "client")).backend == "gvisor"
    assert (await made.for_owner(spec(), "client")).backend == "gvisor"
    assert given["gvisor"].tries == 2


@pytest.mark.parametrize("owner", ["notebook", "client"])
async def test_what_is_named_is_taken(owner: str) -> None:
    """By who asks, then by the operator, for agents too; nothing is tried."""
    given = backends()
    made = chooser(given, configured="process")
    assert await made.for_owner(spec(backend="docker"), owner) == Choice("docker")
    assert await made.for_owner(spec(), owner) == Choice("process", "c.Warmcell.backend says so")
    assert given["gvisor"].tries == 0


async def test_what_may_not_be_used_is_not_chosen() -> None:
    """The operator's bounds hold for choices too."""
    choice = await chooser(among=("bubblewrap",)).for_owner(spec(), "client")
    assert (choice.backend, choice.why.endswith("it may not be used here")) == ("bubblewrap", True)


@pytest.fixture
async def service(places: Places) -> AsyncIterator[SandboxService]:
    made = SandboxService(
        backends=backends(),
        default_backend="auto",
        gpus=GpuPool(SimulatedInventory([]), LeaseDirectory(places.leases)),
        paths=Paths(places.runtime, places.state, places.leases).make(),
        bounds=Bounds(backends=NAMES[:3]),
        prepared_per_template=0,
    )
    yield made
    await made.close()


async def test_a_sandbox_says_why_it_has_its_backend(service: SandboxService, caplog: pytest.LogCaptureFixture) -> None:
    """In what is told of it and in the log; nothing where it was asked for. It keeps it, whatever is chosen later."""
    with caplog.at_level("INFO"):
        agents = await service.create(spec(preload=()), owner="client")
    assert (agents.backend, agents.isolated, agents.backend_why) == (
        *("gvisor", True),
        "nobody has read what an agent runs",
    )
    assert f"sandbox {agents.id}: gvisor was chosen, since {agents.backend_why}" in caplog.messages
    assert service.live(agents.id).spec.backend == "gvisor"
    notebooks = await service.create(spec(preload=()), owner="notebook")
    assert (notebooks.backend, notebooks.backend_why) == ("bubblewrap", "no image is asked for")
    named = await service.create(spec(preload=(), backend="docker"), owner="client")
    assert (named.backend, named.backend_why) == ("docker", "")


async def test_the_error_of_one_that_is_missing_says_why_it_was_wanted(service: SandboxService) -> None:
    """With the cure; where it was asked for by name, that is reason enough."""
    given: Any = service.admission.choosing._backends
    given["docker"].fails_with = BackendUnavailableError("No engine listens.", hint="Start it.")
    service.admission.choosing.images = Built()
    with pytest.raises(BackendUnavailableError) as caught:
        await service.create(spec(preload=(), image="a:1"), owner="notebook")
    told = caught.value
    assert told.message == "No engine listens. docker was chosen, since bubblewrap has no image a:1"
    assert (told.hint, told.details["backend"]) == ("Start it.", "docker")
    (failed,) = service.infos()
    assert failed.error is not None
    assert failed.error.message == told.message
    with pytest.raises(BackendUnavailableError, match=r"^No engine listens\. Start it\.$"):
        await service.create(spec(preload=(), backend="docker"), owner="client")


async def test_what_only_others_have_is_refused_by_name(service: SandboxService) -> None:
    """`process` is never chosen, and never to be had where the operator has not named it."""
    with pytest.raises(InvalidRequestError, match="'process' is not allowed"):
        await service.create(spec(backend="process"), owner="client")


async def test_a_gpu_where_there_can_be_none_is_refused_with_those_that_can(service: SandboxService) -> None:
    """Before a GPU is looked for; who names no backend is not refused for it."""
    with pytest.raises(UnsupportedOperationError, match="gvisor backend has no GPUs") as caught:
        await service.check(spec(backend="gvisor", gpu="A100"), owner="client")
    assert caught.value.hint == "Use bubblewrap or docker, or do without."
