"""What is done with snapshots while nobody asks for anything."""

import os

import pytest

from tests.unit.sandbox.snapshots.making import NOW, Clock, add
from tests.unit.sandbox.snapshots.test_archive import Images
from warmcell.sandbox.errors import ConflictError, SnapshotCorruptError, SnapshotError
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots.archive import NO_MEMORY
from warmcell.sandbox.snapshots.compressing import Compressor
from warmcell.sandbox.snapshots.store import SnapshotStore
from warmcell.sandbox.snapshots.upkeep import LEAST_BYTES, Upkeep
from warmcell.sandbox.snapshots.verifying import Verifier

DAY_S = 86400.0


async def test_what_nobody_has_used_for_long_is_compressed(store: SnapshotStore, clock: Clock) -> None:
    """Not what was used since, not what is small, and each once."""
    large = b"0" * (2 * LEAST_BYTES)
    cold, warm = await add(store, "cold", content=large), await add(store, "warm", content=large)
    small = await add(store, "small")
    clock.now += 8 * DAY_S
    await store.touch(warm)
    for _ in range(2):
        await Upkeep(store, compress_after_s=7 * DAY_S, clock=clock).once()
    assert {one: store.get(one).info.compressed for one in (cold, warm, small)} == {
        cold: True,
        warm: False,
        small: False,
    }
    assert store.get(cold).info.layer_bytes < LEAST_BYTES
    async with store.use(cold) as held:
        assert (held.layer / "file").read_bytes() == large


async def test_memory_is_compressed_where_that_is_wished(store: SnapshotStore, clock: Clock) -> None:
    """With the files, of what is old, and neither of templates nor of what is in use; one that fails keeps no other."""
    old = [await add(store, name, created_at=NOW + number) for number, name in enumerate(("one", "two", "three"))]
    template = await add(store, kind="template")
    images = Images()
    clock.now += 8 * DAY_S
    warm = await add(store, "warm")
    asked: list[SnapshotId] = []

    async def compress_image(image: SnapshotId, told: object) -> None:
        asked.append(image)
        if image == old[1]:
            raise ConflictError("It is in use", hint="Later.")
        await store.amend(image, image_compressed=True)

    async def remeasure() -> None:
        pass

    setattr(images, "compress_image", compress_image)  # noqa: B010 - of this one alone
    compressor = Compressor(store, images, remeasure=remeasure)
    for _ in range(2):
        await Upkeep(store, compress_after_s=7 * DAY_S, compressor=compressor, clock=clock).once()
    assert sorted(asked) == sorted([*old, old[1]])
    told = {one: store.get(one).info.image_compressed for one in (*old, template, warm)}
    assert told == {old[0]: True, old[1]: False, old[2]: True, template: False, warm: False}


async def test_what_is_over_goes(store: SnapshotStore, clock: Clock, dropped: list[SnapshotId]) -> None:
    """By age where there is one, and its image with it; a suspended kernel stays."""
    store.ttl_s = DAY_S
    old = await add(store, "old")
    asleep = await add(store, kind="suspended")
    clock.now += 2 * DAY_S
    await Upkeep(store, compress_after_s=None, clock=clock).once()
    assert [info.id for info in store.infos()] == [asleep]
    assert dropped == [old]


async def test_each_is_read_in_its_turn(store: SnapshotStore, clock: Clock) -> None:
    """One in each round; what the disk has damaged is told, and neither restored nor kept from being mended."""
    good, bad = (
        await add(store, "good", engine=NO_MEMORY),
        await add(store, "bad", engine=NO_MEMORY, created_at=NOW + 1),
    )
    await store.idle()
    file = store.layer(bad) / "file"
    before = file.stat()
    file.write_bytes(b"bat")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    async with store.use(bad):
        pass  # Nobody sees it.
    upkeep = Upkeep(store, compress_after_s=None, verifier=Verifier(store, None, clock=clock), clock=clock)
    for damaged in ([], [bad], [bad]):
        clock.now += 1
        await upkeep.once()
        assert list(store.damaged) == damaged
    with pytest.raises(SnapshotCorruptError, match="'file' differs"):
        async with store.use(bad):
            pass
    async with store.use(good):
        pass
    file.write_bytes(b"bad")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock.now += 1
    await upkeep.once()
    assert not store.damaged
    async with store.use(bad):
        pass


async def test_one_that_fails_does_not_keep_the_others(store: SnapshotStore, clock: Clock) -> None:
    """A layer that was damaged is left alone, and images that cannot be measured are no reason to stop."""
    content = os.urandom(2 * LEAST_BYTES)
    bad, good = await add(store, "bad", content=content), await add(store, "good", content=content)
    (store.layer(bad) / "file").write_bytes(b"another")
    clock.now += 8 * DAY_S

    async def remeasure() -> None:
        raise SnapshotError("The helper is gone", hint="Try again.")

    await Upkeep(store, compress_after_s=DAY_S, remeasure=remeasure, clock=clock).once()
    assert (store.get(bad).info.compressed, store.get(good).info.compressed) == (False, True)


async def test_what_is_known_to_be_damaged_is_left_alone(store: SnapshotStore, clock: Clock) -> None:
    """It is not read again in each round, only to be found damaged again."""
    bad, good = await add(store, "bad", content=b"0" * (2 * LEAST_BYTES)), await add(store, "good", created_at=NOW + 1)
    images, asked = Images(), []
    clock.now += 8 * DAY_S

    async def compress_image(image: SnapshotId, told: object) -> None:
        asked.append(image)

    async def remeasure() -> None:
        pass

    setattr(images, "compress_image", compress_image)  # noqa: B010 - of this one alone
    store.damaged[bad] = SnapshotCorruptError("Its memory is not what was written", hint="Remove it.")
    compressor = Compressor(store, images, remeasure=remeasure)
    await Upkeep(store, compress_after_s=7 * DAY_S, compressor=compressor, clock=clock).once()
    assert asked == [good]
    assert not store.get(bad).info.compressed
