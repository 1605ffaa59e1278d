"""Memory of cold images: compressed once for all that share it, and as it was before anybody uses it."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.sandbox.helper.test_shelf import FIRST, PAGES, SECOND, made
from warmcell.sandbox.helper import packing, pages, zstd
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.shelf import MEMORY, Shelf

LENGTH = 3 << 20
TAIL = 1 << 21
NAMED = os.urandom(4096)
MEMORY_OF = (b"all the same " * 40_000 + bytes(1 << 20) + NAMED).ljust(LENGTH, b"x")
POINTS = ("rename", "link", "unlink", "fsync")
"""System calls in which whoever compresses is killed, each time that one is made."""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """With two images that share a page file; that is longer than it is, as they are."""
    monkeypatch.setattr(pages, "TAIL_BYTES", TAIL)
    monkeypatch.setattr("warmcell.sandbox.helper.shelf.YOUNG_S", 0.0)
    shelf = Shelf(str(tmp_path / "images"), 1000)
    made(shelf, FIRST, pages=MEMORY_OF + bytes(TAIL))
    made(shelf, SECOND, old=(PAGES,))
    return shelf


def links(shelf: Shelf) -> list[Path]:
    """Every name of the page file."""
    return [Path(shelf.pages.place(PAGES)), *(Path(shelf.place(one)) / MEMORY / PAGES for one in (FIRST, SECOND))]


def refused(work: Callable[..., object], *arguments: object) -> HelperError:
    with pytest.raises(HelperError) as raised:
        work(*arguments)
    assert raised.value.hint
    return raised.value


def taken(shelf: Shelf) -> int:
    """What both images take together."""
    return sum(int(str(one["bytes"])) + int(str(one["shared"])) for one in shelf.images())


def is_packed(shelf: Shelf) -> list[object]:
    return [one["packed"] for one in shelf.images()]


def check_plain(shelf: Shelf, image: str) -> None:
    """It can be used, and is what was written."""
    packing.opened(shelf, image).close()
    assert (Path(shelf.place(image)) / MEMORY / PAGES).read_bytes() == MEMORY_OF + bytes(TAIL)


def test_compressed_once_for_all(shelf: Shelf) -> None:
    """It takes less, is verified in that form, and comes back for all as it was: size, times, mode and holes."""
    before, plain = taken(shelf), os.stat(shelf.pages.place(PAGES))
    told: list[tuple[int, int]] = []
    packing.pack(shelf, FIRST, told=lambda done, of: told.append((done, of)))
    assert told[-1] == (2 * LENGTH, 2 * LENGTH)
    assert taken(shelf) < before / 10
    assert {os.stat(link).st_ino for link in links(shelf)} != {plain.st_ino}
    assert os.stat(shelf.pages.place(PAGES)).st_nlink == 3
    assert is_packed(shelf) == [True, True]
    shelf.open(SECOND).close()
    assert shelf.pages.check(str(links(shelf)[1]), PAGES)
    packing.pack(shelf, SECOND)  # It is done.
    packing.opened(shelf, SECOND, told=lambda done, of: told.append((done, of))).close()
    assert told[-1] == (LENGTH, LENGTH)
    assert is_packed(shelf) == [False, False]
    after = os.stat(shelf.pages.place(PAGES))
    assert (after.st_size, after.st_mtime_ns, after.st_mode) == (plain.st_size, plain.st_mtime_ns, plain.st_mode)
    assert after.st_blocks <= plain.st_blocks - (1 << 20) // 512 + 128
    for image in (FIRST, SECOND):
        check_plain(shelf, image)
    assert sorted(os.listdir(shelf.path)) == [".pages", ".pins", FIRST, SECOND]


def test_memory_is_not_read_again_for_its_other_form(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore after it takes as long as any."""
    read: list[str] = []
    packing.pack(shelf, FIRST)
    monkeypatch.setattr(pages, "checksum", lambda path, **how: read.append(path) or "")
    shelf.open(FIRST).close()
    packing.opened(shelf, FIRST).close()
    shelf.open(SECOND).close()
    assert read == []


def test_what_is_in_use_is_left_alone(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a kernel that maps it, by a restore of another image, by a snapshot that is being made."""
    with monkeypatch.context() as patch:
        patch.setattr(pages, "_mounted", lambda: {PAGES})
        assert refused(packing.pack, shelf, FIRST).code == "conflict"
    restoring = shelf.open(SECOND)
    assert refused(packing.pack, shelf, FIRST).code == "conflict"
    restoring.close()
    draft = shelf.draft("c" * 12)
    os.link(shelf.pages.place(PAGES), f"{draft.path}/more")
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_compress", lambda *_: pytest.fail("compressed for nothing"))
        assert refused(packing.pack, shelf, FIRST).code == "conflict"
    draft.close(keep=False)
    assert is_packed(shelf) == [False, False]
    packing.pack(shelf, FIRST)
    assert is_packed(shelf) == [True, True]


def test_a_byte_that_changed_is_found(shelf: Shelf) -> None:
    """In the compressed form too, and by who reads all of it although times are as they were."""
    packing.pack(shelf, FIRST)
    place = links(shelf)[1]
    before = place.stat()
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert refused(shelf.pages.check, str(place), PAGES).code == "snapshot_corrupt"
    assert refused(packing.opened, shelf, FIRST).code == "snapshot_corrupt"
    assert refused(packing.opened, shelf, SECOND).code == "snapshot_corrupt"


def test_memory_that_was_damaged_before_is_not_compressed(shelf: Shelf) -> None:
    """What the disk has turned is found before the only copy goes."""
    place = links(shelf)[0]
    data = bytearray(place.read_bytes())
    data[5] ^= 1
    before = place.stat()
    place.write_bytes(data)
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    shelf.pages._see(PAGES, place.stat())
    assert refused(packing.pack, shelf, FIRST).code == "snapshot_corrupt"
    assert place.stat().st_ino == before.st_ino


@pytest.mark.parametrize("expands", [False, True])
def test_a_full_disk(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, expands: bool) -> None:
    """All is as before, and nothing is left of it."""
    if expands:
        packing.pack(shelf, FIRST)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write", full)
        with pytest.raises(OSError, match="No space"):
            (packing.opened if expands else packing.pack)(shelf, FIRST)
    assert is_packed(shelf) == [expands, expands]
    assert sorted(os.listdir(shelf.path)) == [".pages", ".pins", FIRST, SECOND]
    check_plain(shelf, FIRST)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_without_zstd(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing is named, and how it is had; what is compressed stays so."""
    packing.pack(shelf, FIRST)
    monkeypatch.setattr(zstd, "LIBRARY", "libnothing.so.1")
    zstd._library.cache_clear()
    try:
        error = refused(packing.opened, shelf, FIRST)
    finally:
        zstd._library.cache_clear()
    assert (error.code, error.details) == ("backend_unavailable", {"required": "libnothing.so.1"})
    assert is_packed(shelf) == [True, True]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: data + b"x", lambda data: data[:9] + data[10:]]
)
def test_frames_that_are_not_whole(damage: Callable[[bytes], bytes]) -> None:
    """However they are cut into pieces."""
    data = b"".join(zstd.compressed([MEMORY_OF, b"", NAMED]))
    for size in (len(data), 1000, 1):
        assert b"".join(zstd.expanded(cut(data, size))) == MEMORY_OF + NAMED
    assert refused(b"".join, zstd.expanded(cut(damage(data), 1000))).code == "snapshot_corrupt"


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("expands", [False, True])
@pytest.mark.parametrize("call", POINTS)
def test_killed_at_any_point(shelf: Shelf, call: str, expands: bool) -> None:
    """Before and after each change of a name, each image can be used, and the next attempt succeeds."""
    done = False
    for number in range(30):
        if expands:
            packing.pack(shelf, SECOND)
        child = os.fork()
        if not child:
            die_at(call, number)
            (packing.opened if expands else packing.pack)(shelf, FIRST)
            os._exit(0)
        done = os.waitpid(child, 0)[1] == 0
        for image in (SECOND, FIRST):
            shelf.open(image).close()
            check_plain(shelf, image)
        if done:
            break
    assert done
    assert number > (0 if call == "fsync" else 1)
    packing.pack(shelf, FIRST)
    check_plain(shelf, SECOND)
    assert sorted(os.listdir(shelf.path)) == [".pages", ".pins", FIRST, SECOND]
    assert sorted(os.listdir(f"{shelf.path}/.pages")) == [PAGES, f"{PAGES}.json", f"{PAGES}.stat"]


def die_at(call: str, number: int) -> None:
    """End this process by SIGKILL: the first time before the system call is made, the next after it, and so on."""
    real, count = getattr(os, call), 0

    def counted(*arguments: object, **how: object) -> object:
        nonlocal count
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        done = real(*arguments, **how)
        if count + 1 == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 2
        return done

    setattr(os, call, counted)


def test_what_is_kept_for_the_next_dump_makes_room(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that is there can be restored, although the disk is full of what nobody needs."""
    packing.pack(shelf, FIRST)
    spare = Path(shelf.path, ".pages", ".spare")
    spare.write_bytes(b"s" * 4096)
    write = packing._write

    def full(fd: int, data: bytes, *, at: int | None = None) -> None:
        if spare.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(fd, data, at=at)

    monkeypatch.setattr(packing, "_write", full)
    packing.opened(shelf, FIRST).close()
    check_plain(shelf, FIRST)
    assert not spare.exists()
