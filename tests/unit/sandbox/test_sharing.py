"""Which sandboxes have their kernels from a process that they share."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, cast

from warmcell.sandbox.models import SandboxSpec, Workspace
from warmcell.sandbox.shared_templates import Nest
from warmcell.sandbox.sharing import RETRY_S, SharedTemplates
from warmcell.sandbox.testing.fakes import FakeBackend

ENVIRONMENT = "/environment"


class OneNest:
    """Nothing is made in it here."""

    async def close(self) -> None:
        """There is nothing to be closed."""


class Nesting(FakeBackend):
    """Makes nests where it can; sandboxes that may write to the environment get none."""

    def __init__(self) -> None:
        super().__init__()
        self.room = True
        self.tried = 0

    async def may_share(self, spec: SandboxSpec) -> bool:
        return spec.workspace is None or spec.workspace.path != ENVIRONMENT

    async def nest(self, spec: SandboxSpec) -> Nest | None:
        self.tried += 1
        return cast(Nest, OneNest()) if self.room else None


async def never(spec: SandboxSpec) -> bool:
    """Memory cannot be saved."""
    return False


def spec(**changes: Any) -> SandboxSpec:
    return dataclasses.replace(SandboxSpec(python=sys.executable, preload=("m",)), **changes)


async def test_what_was_in_the_way_once_is_not_for_ever() -> None:
    """A nest that there was no room for is tried again after a while, and not at each start."""
    backend, now = Nesting(), [1000.0]
    templates = SharedTemplates(never, clock=lambda: now[0])
    backend.room = False
    assert await templates.of(spec(), backend) is None
    backend.room = True
    assert await templates.of(spec(), backend) is None
    assert backend.tried == 1
    now[0] += RETRY_S
    shared = await templates.of(spec(), backend)
    assert shared is not None
    assert await templates.of(spec(), backend) is shared
    assert backend.tried == 2
    await templates.close()


async def test_each_sandbox_is_asked_whether_it_may_share(tmp_path: Path) -> None:
    """One that may write to what is imported shares with nobody, whoever came first, and keeps nobody from sharing."""
    backend = Nesting()
    templates = SharedTemplates(never)
    writes = spec(workspace=Workspace(path=ENVIRONMENT))
    works = spec(workspace=Workspace(path=str(tmp_path)))
    assert await templates.of(writes, backend) is None
    assert await templates.of(works, backend) is not None
    assert await templates.of(writes, backend) is None
    await templates.close()


async def test_backends_without_nests_share_nothing() -> None:
    """Their sandboxes have fork servers of their own."""
    assert await SharedTemplates(never).of(spec(), FakeBackend()) is None
