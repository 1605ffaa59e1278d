"""`/sandboxes/{id}/{verb}`: what can be done with the memory of a sandbox."""

from typing import Any

from warmcell.extension.keeper import self_api
from warmcell.extension.keeper.agents import api as agents_api
from warmcell.extension.keeper.handler import Handler, number, text
from warmcell.extension.keeper.kernel_memory import CLONES_MAX
from warmcell.sandbox.errors import UnsupportedOperationError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import SandboxId


class MemoryHandler(Handler):
    """What can be done with the memory of a sandbox."""

    async def post(self, sandbox_id: str, verb: str) -> None:
        info = self.visible(sandbox_id)
        if info.terms is None:
            self.answer(*await self._of_notebook(info.id, verb))
        else:
            agents = self.keeper.agents
            work = agents_api.once(agents, self, lambda: self._of_agent(info.id, verb), makes=verb == "fork")
            self.answer(*await work)

    async def _of_notebook(self, box: SandboxId, verb: str) -> tuple[Any, int]:
        memory, body = self.keeper.memory, self.body()
        populate = body.get("populate") is True
        if verb == "suspend":
            info = await memory.suspend(box, even_busy=body.get("busy") is True)
        elif verb == "park":
            remote = self.keeper.service.info(box).owner == "remote"
            info = await (self.keeper.runs.park(box) if remote else memory.park(box))
        elif verb == "wake":
            info = await memory.wake(box, returned=body.get("returned") is True)
        elif verb == "gpu":
            info = await memory.change_gpu(box, self_api.gpu_wish(body.get("gpu")))
        elif verb == "resume":
            info = await memory.resume(box)
            if populate:
                await memory.populate(box)
        elif verb == "snapshot":
            name = body.get("name", "")
            return (await memory.snapshot(box, name=text(name, "name") if name else "")).to_json(), 201
        elif verb == "restore":
            ref = self.own_snapshot(text(body.get("snapshot"), "snapshot"), box)
            info = await memory.restore(box, ref)
            if populate:
                await memory.populate(box, ref)
        else:
            ref = self.own_snapshot(text(body["snapshot"], "snapshot"), box) if body.get("snapshot") is not None else ""
            return {"sandboxes": [one.to_json() for one in await memory.fork(box, self._clones(), ref=ref)]}, 201
        return info.to_json(), 200

    async def _of_agent(self, box: SandboxId, verb: str) -> tuple[Any, int]:
        """The same, of what may be frozen, and goes on for whoever asks again."""
        agents, memory, body = self.keeper.agents, self.keeper.memory, self.body()
        if verb == "suspend":
            return (await agents.suspend(box, memory=body.get("memory") is not False)).to_json(), 200
        if verb == "resume":
            await agents.wake(box)
            return (await memory.resume(box)).to_json(), 200
        if verb == "park":
            return (await agents.park(box)).to_json(), 200
        if verb == "wake":
            raise UnsupportedOperationError(
                "Sandboxes of code go on with what is run there", hint="Run it, or resume the sandbox."
            )
        if verb == "gpu":
            raise UnsupportedOperationError(
                "Sandboxes of code keep the GPU that they have", hint="Suspend it to give it back, or make a new one."
            )
        if verb == "fork":
            return {"sandboxes": [one.to_json() for one in await agents.fork(box, self._clones())]}, 201
        if verb == "snapshot":
            if self.principal is not None:
                self.keeper.quotas.check_snapshots(self.principal.name)
            name, whole = body.get("name", ""), body.get("memory") is not False
            saved = await agents.snapshot(box, name=text(name, "name") if name else "", memory=whole)
            return saved.to_json(), 201
        await memory.check(box)
        ref = self.own_snapshot(text(body.get("snapshot"), "snapshot"), box)
        if self.keeper.service.info(box).state is not State.SUSPENDED:  # Else what it is now is not needed.
            await agents.awake(box)
            await agents.kernels.running(box)
        await memory.restore(box, ref)
        return self.keeper.service.info(box).to_json(), 200

    def _clones(self) -> int:
        return int(number(self.body().get("n", 1), "n", least=1, most=CLONES_MAX))
