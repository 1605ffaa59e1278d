"""An engine that breaks where it is tried: it serves nobody, says so, and is tried again."""

from pathlib import Path
from typing import Any

import pytest

from warmcell.sandbox import saved as module
from warmcell.sandbox.errors import UnsupportedOperationError
from warmcell.sandbox.models import SandboxSpec
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.reports import EngineReport
from warmcell.sandbox.saved import Saved
from warmcell.sandbox.snapshots.store import SnapshotStore


class Breaking:
    """Raises what no engine should, until it is mended."""

    name = "broken"

    def __init__(self) -> None:
        self.broken, self.tried = True, 0

    async def probe(self) -> EngineReport:
        self.tried += 1
        if self.broken:
            raise FileNotFoundError("/no/such/tool")
        return EngineReport(name=self.name, ready=True)

    async def images(self) -> list[Any]:
        return []

    async def close(self) -> None:
        """There is nothing to end."""


async def test_it_serves_nobody_and_is_tried_again(
    store: SnapshotStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wants to save memory hears why not; once it works it is used."""
    engine: Any = Breaking()
    made = Saved(
        engine=engine,
        store=store,
        backend_of=lambda spec: None,  # type: ignore[arg-type,return-value]
        paths=Paths(runtime=tmp_path, state=tmp_path, leases=tmp_path),
        turn=None,  # type: ignore[arg-type]
        release_gpus=lambda sandbox_id: None,
    )
    await made.open()
    try:
        for _ in range(2):
            report = await made.report()
            assert (report.ready, report.name) == (False, "broken")
            assert "/no/such/tool" in report.why_not
        with pytest.raises(UnsupportedOperationError, match="no/such/tool") as raised:
            await made.check(SandboxSpec(python="/usr/bin/python3"))
        assert raised.value.hint
        monkeypatch.setattr(module, "TRY_AGAIN_S", 0.0)
        engine.broken = False
        await made.report()  # The one that is known, while it is tried again.
        assert (await made.report()).ready
        assert engine.tried == 2
    finally:
        await made.close()
