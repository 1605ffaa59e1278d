"""Lazy images with a real CRIU: processes with memory of every kind are dumped, edited and restored."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.snapshots.plain_boxes import Box, huge_pages
from warmcell.sandbox.helper.images import compact, contents, credentials, lazy
from warmcell.sandbox.helper.images.errors import ImageError

pytestmark = pytest.mark.criu


@pytest.fixture
def box() -> Iterator[Box]:
    """A namespace, and a short directory beside it."""
    with tempfile.TemporaryDirectory(prefix="wc-", dir="/tmp") as directory:
        made = Box(Path(directory))
        try:
            yield made.start()
        finally:
            made.close()


@pytest.fixture
def reserved() -> Iterator[None]:
    """Pages of 2 MiB."""
    with huge_pages():
        yield


class Kernel:
    """A tree of odd processes and the page files of its images so far."""

    def __init__(self, box: Box, *kinds: str) -> None:
        self.box = box
        self.pid = box.start_odd(*kinds)
        self.store: dict[str, Path] = {}
        self.count = 0

    @property
    def pids(self) -> list[int]:
        return [pid for pid in self.box.pids() if pid >= self.pid]

    def sums(self) -> dict[int, dict[str, str]]:
        """Checksums of all areas of all processes."""
        return {pid: self.box.ask(pid, "sums") for pid in self.pids}

    def dump(self) -> Path:
        """End the tree; its image, with links to the page files that its memory needs."""
        self.count += 1
        image = self.box.directory / f"image{self.count}"
        self.box.dump(self.pid, image)
        for name in lazy.page_files(image):
            (image / "memory").mkdir(exist_ok=True)
            os.link(self.store[name], image / "memory" / name)
        return image

    def edit(self, image: Path) -> lazy.Edited:
        """Make it lazy."""
        edited = lazy.edit(image, page_file=f"page{self.count:08}")
        self.store |= {name: image / "memory" / name for name in edited.page_files}
        return edited

    def restore(self, image: Path) -> float:
        """Restore with the page files of the image's own directory."""
        return self.box.restore(image, {name: image / "memory" / name for name in lazy.page_files(image)})


def test_memory_of_every_kind_survives_three_cycles(box: Box) -> None:
    """Dump, edit, restore, change, three times, then compacted: each area of each process holds what it held."""
    kernel = Kernel(box, "areas", "heap", "threads", "children")
    pids = kernel.pids
    assert len(pids) == 3
    before = kernel.sums()
    for cycle in range(3):
        image = kernel.dump()
        edited = kernel.edit(image)
        assert edited.lazy == (cycle == 0)
        kernel.restore(image)
        assert kernel.pids == pids
        assert kernel.sums() == before, f"cycle {cycle}"
        for pid in pids:
            box.ask(pid, "dirty")
        before = kernel.sums()
    image = kernel.dump()
    found = contents.describe(image)
    assert set(pids) <= set(found.pids)
    assert found.root_pid == kernel.pid
    done = compact.compact(image, page_file="compact00000")
    assert len(done.dropped) == len(done.page_files) == 3
    kernel.restore(image)
    assert kernel.sums() == before
    assert box.ask(kernel.pid, "guarded")


def test_what_is_mapped_and_what_is_not(box: Box) -> None:
    """Each area keeps its flags, and only the kinds that a file can stand in for become mappings of one."""
    kernel = Kernel(box, "areas", "heap")
    before = box.ask(kernel.pid, "smaps")
    image = kernel.dump()
    kernel.edit(image)
    kernel.restore(image)
    after = box.ask(kernel.pid, "smaps")
    mapped = {name for name, (path, *_) in after.items() if path.startswith("/.warmcell/")}
    plain = {"plain", "sparse", "zeros", "read-only", "half read-only", "guarded", "heap"}
    assert mapped == plain | {"random", "sequential", "dontfork", "mergeable", "hugepage", "nohugepage", "dontdump"}
    for name in before:
        # "ac" (accounted) comes with being writable once, "gu" with guard pages that are already set.
        assert set(before[name][1:]) ^ set(after[name][1:]) <= {"ac", "gu"}, name


def test_what_processes_share_they_share_again(box: Box) -> None:
    """Anonymous memory, a memfd and a file of /dev/shm: what one writes after a restore the others read."""
    kernel = Kernel(box, "areas", "children")
    for _ in range(2):
        image = kernel.dump()
        kernel.edit(image)
        kernel.restore(image)
        for pid in kernel.pids:
            box.ask(pid, "mark")
            assert [box.ask(other, "marks") for other in kernel.pids] == 3 * [{"memfd": pid, "shared": pid, "shm": pid}]


@pytest.mark.usefixtures("reserved")
def test_huge_pages_stay_huge(box: Box) -> None:
    """What a program has asked for in pages of 2 MiB is neither mapped from a file nor cut into small ones."""
    kernel = Kernel(box, "huge", "heap", "children")
    before, described = kernel.sums(), box.ask(kernel.pid, "smaps")
    for _ in range(2):
        image = kernel.dump()
        kernel.edit(image)
        kernel.restore(image)
        assert kernel.sums() == before
        after = box.ask(kernel.pid, "smaps")
        for name in ("huge", "huge, shared"):
            assert set(after[name][1:]) == set(described[name][1:])
            assert "ht" in after[name]
        for pid in kernel.pids:
            box.ask(pid, "mark")
            assert [box.ask(other, "marks") for other in kernel.pids] == 3 * [{"huge, shared": pid}]
        before = kernel.sums()


def test_the_heap_goes_on(box: Box) -> None:
    """After a restore brk(2) gives zeros, shrinks, and grows again."""
    kernel = Kernel(box, "heap")
    image = kernel.dump()
    kernel.edit(image)
    kernel.restore(image)
    for _ in range(2):
        assert box.ask(kernel.pid, "brk") == {"same": True, "fresh": True, "clean": True, "kept": True}


def test_mapped_memory_can_grow(box: Box) -> None:
    """What realloc(3) does with mremap(2) neither loses bytes nor runs past the end of the page file."""
    kernel = Kernel(box, "areas")
    image = kernel.dump()
    kernel.edit(image)
    kernel.restore(image)
    assert set(box.ask(kernel.pid, "grow").values()) == {"same"}


def test_what_an_allocator_gave_back_is_zeros(box: Box) -> None:
    """In areas that say that they are an allocator's (MAP_NORESERVE); in others a restored program sees old bytes."""
    kernel = Kernel(box, "areas")
    image = kernel.dump()
    kernel.edit(image)
    kernel.restore(image)
    assert box.ask(kernel.pid, "discard") == {"noreserve": "zeros", "plain": "the same"}


def test_children_of_a_restored_process_survive(box: Box) -> None:
    """A fork after a lazy restore shares the page file with its parent; both are dumped and restored right."""
    kernel = Kernel(box, "areas")
    image = kernel.dump()
    kernel.edit(image)
    kernel.restore(image)
    (child,) = box.ask(kernel.pid, "fork")
    assert child in kernel.pids
    box.ask(child, "dirty")
    before = kernel.sums()
    assert before[child]["plain"] != before[kernel.pid]["plain"]
    again = kernel.dump()
    kernel.edit(again)
    kernel.restore(again)
    assert kernel.sums() == before
    image = kernel.dump()
    compact.compact(image, page_file="compact00000")
    kernel.restore(image)
    assert kernel.sums() == before


def test_memory_that_a_child_moved_is_its_own(box: Box) -> None:
    """A child that moved its memory after a fork has, where its parent has some, another part of one page file."""
    kernel = Kernel(box, "areas")
    image = kernel.dump()
    kernel.edit(image)
    kernel.restore(image)
    box.ask(kernel.pid, "part")
    (child,) = box.ask(kernel.pid, "fork")
    box.ask(child, "swap")
    before = kernel.sums()
    again = kernel.dump()
    kernel.edit(again)
    kernel.restore(again)
    assert kernel.sums() == before


def test_what_parent_and_child_have_written_is_mapped_again(box: Box) -> None:
    """Of one old mapping each has written other runs; three times over each process gets back its own."""
    kernel = Kernel(box, "large=8")
    image = kernel.dump()
    kernel.edit(image)
    kernel.restore(image)
    (child,) = box.ask(kernel.pid, "fork")
    for cycle in range(3):
        for pid in (kernel.pid, child):
            box.ask(pid, "rewrite")
        before = kernel.sums()
        assert before[child] != before[kernel.pid]
        image = kernel.dump()
        edited = kernel.edit(image)
        assert edited.lazy, f"cycle {cycle}"
        assert len(edited.new_page_files) == 2
        kernel.restore(image)
        assert kernel.sums() == before, f"cycle {cycle}"
    image = kernel.dump()
    compact.compact(image, page_file="compact00000")
    kernel.restore(image)
    assert kernel.sums() == before


def test_clones_do_not_see_each_other(box: Box) -> None:
    """Restores of one image change their memory; the page file, and so the next restore, stay as they were."""
    kernel = Kernel(box, "areas")
    before = kernel.sums()[kernel.pid]
    image = kernel.dump()
    kernel.edit(image)
    for _ in range(3):
        kernel.restore(image)
        now = kernel.sums()[kernel.pid]
        assert {name for name in before if now[name] != before[name]} <= {"shm"}  # a file, which they share
        box.ask(kernel.pid, "dirty")
        assert kernel.sums()[kernel.pid]["plain"] != before["plain"]
        box.kill(kernel.pid)


@pytest.mark.alone
def test_a_large_image_restores_without_copying(box: Box) -> None:
    """256 MiB: the restore of the lazy image takes far less time than of the plain one, and little stays to copy."""
    kernel = Kernel(box, "large=256")
    before = kernel.sums()
    image = kernel.dump()
    plain = kernel.restore(image)
    assert kernel.sums() == before
    image = kernel.dump()
    edited = kernel.edit(image)
    assert edited.copied_bytes < 32 << 20
    quick = kernel.restore(image)
    assert kernel.sums() == before
    assert quick < plain
    second = kernel.dump()
    pages = sum(path.stat().st_size for path in second.glob("pages-*.img"))
    assert pages < 32 << 20


def test_credentials_of_a_real_dump(box: Box) -> None:
    """A process of root has all that an image may not have; the check names the first of it."""
    kernel = Kernel(box, "threads")
    image = kernel.dump()
    with pytest.raises(ImageError, match=r"has inheritable|has permitted|has effective|has bounding") as caught:
        credentials.check(image, uid=0, gid=0, groups=os.getgroups())
    assert caught.value.code == "snapshot_corrupt"
    with pytest.raises(ImageError, match=f"task {kernel.pid} of the image has uid 0 where 1000 belongs"):
        credentials.check(image, uid=1000, gid=1000, groups=())
