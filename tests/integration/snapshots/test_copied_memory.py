"""Memory that the helper copies itself: the page file is the one that CRIU would have written, byte for byte."""

import os
import tempfile
from collections.abc import Iterator
from operator import ne
from pathlib import Path

import pytest

from tests.integration.snapshots.plain_boxes import Box, huge_pages
from warmcell.sandbox.helper import copying
from warmcell.sandbox.helper.images import pagemap
from warmcell.sandbox.helper.problems import HelperError

pytestmark = pytest.mark.criu

PAGE = 4096
THREADS, RSEQ_BYTES = 8, 16
"""More than a process has here; of each, Linux writes into its memory where it runs, every time that it does."""


@pytest.fixture
def box() -> Iterator[Box]:
    """A namespace, and a short directory beside it."""
    with tempfile.TemporaryDirectory(prefix="wc-", dir="/tmp") as directory:
        made = Box(Path(directory))
        try:
            yield made.start()
        finally:
            made.close()


def diverted(box: Box, pid: int, *, number: int = copying.FIRST) -> Path:
    """An image of a tree that is stopped then, one page file left out."""
    image = box.directory / "diverted"
    image.mkdir()
    # As `divert` does; the CRIU of these tests has no descriptor of ours.
    (image / f"pages-{number}.img").symlink_to(os.devnull)
    box.save(pid, image)
    return image


def different(one: bytes, other: bytes) -> int:
    """In how many pages; all but a few bytes of each are equal."""
    pages = [(one[at : at + PAGE], other[at : at + PAGE]) for at in range(0, len(one), PAGE)]
    apart = [pair for pair in pages if pair[0] != pair[1]]
    assert all(sum(map(ne, *pair)) <= RSEQ_BYTES for pair in apart)
    return len(apart)


@pytest.fixture
def reserved() -> Iterator[None]:
    """Pages of 2 MiB."""
    with huge_pages():
        yield


@pytest.mark.usefixtures("reserved")
@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_what_criu_would_have_written(box: Box, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Of areas of every kind, also those that the process itself may not read, by one thread as by several."""
    monkeypatch.setattr(copying, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(copying, "processors", lambda: threads)
    pid = box.start_odd("areas", "huge", "heap", "threads", "children", "large=40")
    processes = box.outer_pids()
    theirs = box.directory / "theirs"
    theirs.mkdir()
    box.save(pid, theirs)
    assert not copying.is_first([processes[pid]])
    number = pagemap.page_file(theirs / f"pagemap-{pid}.img")
    assert number > copying.FIRST
    ours = diverted(box, pid, number=number)
    copying.fill(str(ours), processes, number=number)
    assert (ours / f"pagemap-{pid}.img").read_bytes() == (theirs / f"pagemap-{pid}.img").read_bytes()
    for page_file in theirs.glob("pages-*.img"):
        one, other = page_file.read_bytes(), (ours / page_file.name).read_bytes()
        assert len(one) == len(other)
        assert different(one, other) <= THREADS, page_file.name
    assert (ours / f"pages-{number}.img").stat().st_size > 40 << 20


def test_a_process_that_ends_meanwhile_is_not_saved(box: Box) -> None:
    """Its number may be another's by then, whose memory must not get into the image."""
    pid = box.start_odd("heap")
    processes = box.outer_pids()
    assert copying.is_first([processes[pid]])
    image = diverted(box, pid)
    box.kill(pid)
    with pytest.raises(HelperError, match="has ended while it was saved"):
        copying.fill(str(image), processes)


def test_page_files_in_another_order_are_noticed(box: Box) -> None:
    """Then the file is not that of the kernel, and what belongs into it is not known."""
    pid = box.start_odd("heap")
    processes = box.outer_pids()
    assert copying.is_first([processes[pid]])
    image = diverted(box, pid)
    (image / f"pagemap-{pid}.img").rename(image / f"pagemap-shmem-{pid}.img")
    with pytest.raises(HelperError, match="in another way than is known"):
        copying.fill(str(image), processes)
