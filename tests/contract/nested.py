"""The bubblewrap backend with each sandbox in a nest, where kernels of a template's process could enter it."""

import asyncio
import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.base import ExitInfo
from warmcell.sandbox.backends.bubblewrap import BubblewrapBackend
from warmcell.sandbox.backends.bubblewrap.instance import BubblewrapInstance
from warmcell.sandbox.backends.bubblewrap.nest import Nest
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths


class NestedBackend(BubblewrapBackend):
    """Opens a nest for each sandbox that may be in one, and closes it with it."""

    async def create(self, spec: SandboxSpec, **given: Any) -> BubblewrapInstance:  # type: ignore[override]
        """As of any."""
        if spec.network != "none":
            return await super().create(spec, **given)
        nest = await self.nest(SandboxSpec(python=spec.python, workspace=spec.workspace))
        if nest is None:  # There is no such workspace, and no such sandbox.
            await super().create(spec, **given)
            raise AssertionError("it was made, but not in a nest")
        try:
            made = await super().create(spec, **{**given, "nest": nest})
        except BaseException:
            await asyncio.shield(nest.close())
            raise
        _close_with(made, nest)
        return made


def _close_with(made: BubblewrapInstance, nest: Nest) -> None:
    stop = made.stop

    async def stop_both(*, timeout: float = 60.0) -> ExitInfo:
        ended = await stop(timeout=timeout)
        await nest.close()
        return ended

    made.stop = stop_both  # type: ignore[method-assign]


def make() -> NestedBackend:
    """For the contract's command."""
    directory = Path(tempfile.mkdtemp(prefix="wc-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    paths = Paths(runtime=directory / "r", state=directory / "s", leases=directory / "l").make()
    return NestedBackend(paths=paths)
