"""When the time of sandboxes that code has asked for is over, with a service of the test's own."""

import asyncio
import dataclasses
import time
from types import SimpleNamespace
from typing import Any, cast

from warmcell.extension.keeper.agents.lifetimes import Lifetimes
from warmcell.sandbox.errors import NotFoundError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId, SandboxInfo, Terms

PATIENCE_S = 10.0


class Box:
    """A sandbox of which only what is told of it matters."""

    def __init__(self, service: "Service", info: SandboxInfo) -> None:
        self.service, self.info = service, info

    def tell(self, *, terms: Terms) -> None:
        self.info = dataclasses.replace(self.info, terms=terms)


class Service:
    """Those that there are; the end of one that sleeps takes until `go_on`."""

    def __init__(self) -> None:
        self.boxes: dict[str, Box] = {}
        self.go_on, self.ends = asyncio.Event(), asyncio.Event()
        self.stopped: dict[str, asyncio.Event] = {}
        store = SimpleNamespace(get=lambda ref: SimpleNamespace(info=SimpleNamespace(created_at=0.0)))
        self.memory = SimpleNamespace(store=store)

    def add(self, name: str, state: State, terms: Terms) -> Box:
        info = SandboxInfo(
            id=SandboxId(name), state=state, backend="b", isolated=True, owner="client", created_at=0.0, terms=terms
        )
        self.stopped[name] = asyncio.Event()
        return self.boxes.setdefault(name, Box(self, info))

    def infos(self) -> list[SandboxInfo]:
        return [box.info for box in self.boxes.values()]

    def info(self, sandbox_id: str) -> SandboxInfo:
        return self.live(sandbox_id).info

    def live(self, sandbox_id: str) -> Box:
        return self.boxes[sandbox_id]

    async def stop(self, sandbox_id: str) -> None:
        if self.boxes[sandbox_id].info.state is State.SUSPENDED:
            self.ends.set()
            await self.go_on.wait()
        del self.boxes[sandbox_id]
        self.stopped[sandbox_id].set()

    # It stands for the kernels as well, of which there are none.

    def all(self) -> list[Any]:
        return []

    def get(self, kernel_id: str) -> Any:
        raise NotFoundError("It has no kernel", hint="Start one.")

    async def forget_sandbox(self, sandbox_id: str) -> None:
        pass


async def test_one_that_begins_while_another_is_removed_ends_in_time() -> None:
    """Nobody looks at the time then, so what has changed meanwhile is looked at right after."""
    service = Service()
    lifetimes = Lifetimes(*cast(Any, (service, service, service)), asleep_s=60.0)
    sleeps = Terms(timeout_s=None)
    service.add("asleep", State.SUSPENDED, sleeps)
    looks = asyncio.create_task(lifetimes.end_in_time())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await service.ends.wait()
            began = time.monotonic()
            new = service.add("new", State.RUNNING, Terms(timeout_s=0.2, on_timeout="kill"))
            lifetimes.changed(new.info)
            assert new.info.terms is not None
            assert new.info.terms.ends_at is not None
            service.go_on.set()
            await service.stopped["new"].wait()
            assert time.monotonic() - began >= 0.2
    finally:
        looks.cancel()
        await asyncio.gather(looks, return_exceptions=True)
        lifetimes.context.destroy(linger=0)
