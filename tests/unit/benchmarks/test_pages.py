"""Reading a snapshot's memory as files."""

import mmap
import os
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.server import BenchmarkError

MIB = 2**20


def image(directory: Path) -> Path:
    """Two page files: a sparse one as mapped images have them, and one that restores copy."""
    (directory / "memory").mkdir()
    with (directory / "memory" / "abcabcabcabc").open("wb") as file:
        file.write(os.urandom(3 * MIB))
        file.truncate(2**40)
    (directory / "pages-1.img").write_bytes(os.urandom(MIB))
    (directory / "core-1.img").write_bytes(b"no pages")
    return directory


async def test_only_what_is_in_page_files_is_read(tmp_path: Path) -> None:
    """A page file that looks like a terabyte is read as far as it goes."""
    files = pages.page_files(image(tmp_path))
    assert [path.name for path in files] == ["abcabcabcabc", "pages-1.img"]
    assert pages.held_bytes(files) == 4 * MIB
    assert 0 < await pages.read_s(files) < 10


async def test_a_reader_that_fails_gives_no_number(tmp_path: Path) -> None:
    """A file that cannot be read is no measurement."""
    with pytest.raises(BenchmarkError, match="reader"):
        await pages.read_s([tmp_path / "nothing"])


def test_a_forgotten_image_is_not_in_the_page_cache(tmp_path: Path) -> None:
    """Written pages are in the cache, and none of them is once they are forgotten."""
    files = pages.page_files(image(tmp_path))
    if not sum(pages.cached_bytes(path) for path in files):
        pytest.skip("this file system has no page cache")
    pages.forget(tmp_path)
    assert sum(pages.cached_bytes(path) for path in files) == 0


def test_what_a_process_maps_is_left_alone(tmp_path: Path) -> None:
    """It cannot be dropped, and is no reason to give up: the rest is gone."""
    mapped, other = pages.page_files(image(tmp_path))
    with mapped.open("rb") as file, mmap.mmap(file.fileno(), 3 * MIB, prot=mmap.PROT_READ) as seen:
        assert sum(seen[at] for at in range(0, 3 * MIB, mmap.PAGESIZE))
        if not pages.cached_bytes(other):
            pytest.skip("this file system has no page cache")
        pages.forget(tmp_path)
        assert pages.cached_bytes(mapped) == 3 * MIB
        assert pages.cached_bytes(other) == 0
