"""Commits one generation after the other until it is killed: `python committing.py ROOT SEED`.

Once one is committed the one before is discarded. Each says in its layer and in its manifest which generation it is.
For every commit that has returned a line goes to stdout.
"""

import asyncio
import random
import sys
from pathlib import Path

from warmcell.sandbox.models import SandboxSpec, SnapshotId, SnapshotInfo
from warmcell.sandbox.snapshots.manifest import Manifest
from warmcell.sandbox.snapshots.store import SnapshotStore, new_id


async def main(root: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = SnapshotStore(root)
    await store.open()
    before: SnapshotId | None = None
    for generation in range(10**6):
        async with store.draft(new_id()) as draft:
            for number in range(rng.randrange(1, 8)):
                (draft.layer / f"{number}").write_bytes(generation.to_bytes(4) * rng.randrange(1, 20_000))
            info = SnapshotInfo(
                id=SnapshotId(""), name=f"state {generation}", kernel_id="k", created_at=float(generation)
            )
            manifest = Manifest(info=info, spec=SandboxSpec(python="/p"), kernel={"generation": generation})
            await draft.commit(manifest, durable=rng.random() < 0.2)
        sys.stdout.write(f"{generation}\n")
        sys.stdout.flush()
        if before is not None:
            await store.discard(before)
        before = draft.id
        if rng.random() < 0.3:
            await store.compress(draft.id)
        if rng.random() < 0.3:
            async with store.use(draft.id):
                pass
        if rng.random() < 0.2:
            await store.rename(draft.id, f"state {generation}, renamed")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
