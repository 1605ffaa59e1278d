"""Lazy images of dumps made by hand."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.sandbox.helper.made_images import (
    ANON_PRIVATE,
    ANON_SHARED,
    FILE_PRIVATE,
    GUARD,
    HEAP,
    LAZY,
    PRESENT,
    REGULAR,
    Entry,
    Process,
    Vma,
    decode,
    file_entry,
    memory,
    messages,
    write,
)
from warmcell.sandbox.helper.images import areas as areas_code
from warmcell.sandbox.helper.images import contents, criu, exchange, lazy
from warmcell.sandbox.helper.images.compact import compact
from warmcell.sandbox.helper.images.errors import ImageError

PAGE = 4096
PLAIN = {"prot": 3, "flags": 0x22, "status": REGULAR | ANON_PRIVATE, "madv": 0}
KINDS: list[dict[str, int]] = [
    PLAIN,
    PLAIN | {"status": REGULAR | ANON_PRIVATE | HEAP},
    PLAIN | {"prot": 1},
    PLAIN | {"madv": 1 << 14},
    PLAIN | {"madv": 1 << 18},
    PLAIN | {"prot": 0},
    PLAIN | {"prot": 7},
    PLAIN | {"flags": 0x4022},
    PLAIN | {"flags": 0x2022},
    PLAIN | {"flags": 0x122},
    PLAIN | {"flags": 0x40022},
    PLAIN | {"status": REGULAR | FILE_PRIVATE, "flags": 2, "shmid": 2, "pgoff": PAGE},
    PLAIN | {"status": REGULAR | ANON_PRIVATE | 1 << 20},
    PLAIN | {"status": REGULAR | ANON_PRIVATE | 1 << 15},
]


def page_of(number: int) -> bytes:
    """A page of zeros for each fifth number, else one that no other number has."""
    return bytes(PAGE) if number % 5 == 0 else number.to_bytes(8, "little") * (PAGE // 8)


@st.composite
def processes(draw: st.DrawFn, *, base: int = 0, pid: int = 1000) -> Process:
    """A process with areas of all kinds, some side by side, and dumped runs in them, some across areas."""
    process = Process(pid)
    page = base + draw(st.sampled_from([1, 1 << 20, 0x7F0000000]))
    serial = draw(st.integers(1, 1 << 40))
    for kind in draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6)):
        page += draw(st.sampled_from([0, 0, 3]))
        count = draw(st.integers(1, 40))
        process.vmas.append(Vma(page, count, **kind))
        at = page
        while at < page + count:
            at += draw(st.sampled_from([0, 0, 1, 7]))
            length = min(draw(st.sampled_from([1, 2, 9, 30])), page + count - at)
            if length <= 0:
                break
            if draw(st.integers(0, 9)) == 0:
                process.entries.append(Entry(at, length, None, LAZY))
            else:
                content = b"".join(page_of(serial + index) for index in range(length))
                serial += length
                process.entries.append(Entry(at, length, content, draw(st.sampled_from([PRESENT, PRESENT | LAZY]))))
            at += length
        page += count
    if draw(st.booleans()):
        process.vmas.append(Vma(process.vmas[0].page, 1, prot=0, flags=0, status=GUARD))
    return process


@st.composite
def dumps(draw: st.DrawFn) -> list[Process]:
    """One process or two."""
    first = draw(processes())
    return [first, draw(processes(pid=1001))] if draw(st.booleans()) else [first]


FILES = [file_entry(1, "/usr/bin/python3"), file_entry(2, "/usr/lib/libz.so")]


def next_dump(image: Path, new: Path, pids: list[int], data: st.DataObject) -> None:
    """What CRIU would write of the restored image after some pages were changed."""
    shutil.copytree(image, new, ignore=shutil.ignore_patterns("memory"))
    if (image / "memory").exists():
        shutil.copytree(image / "memory", new / "memory", copy_function=os.link)
    for pid in pids:
        before = memory(image, pid)
        writable = [page for page, (_, how) in before.items() if how[0] == 3]
        changed: set[int] = set()
        if writable:
            lengths = st.sampled_from([1, 2, 20, 1000])
            for begin, length in data.draw(st.lists(st.tuples(st.sampled_from(writable), lengths), max_size=8)):
                changed |= set(range(begin, begin + length)) & set(writable)
        head, *entries = messages(image / f"pagemap-{pid}.img")
        kept = set()
        for message in entries:
            entry = decode(message)
            first, count, flags = entry[1][0], entry[5][0], entry[4][0]
            assert isinstance(first, int)
            assert isinstance(count, int)
            assert isinstance(flags, int)
            if flags & PRESENT:
                kept |= set(range(first // PAGE, first // PAGE + count))
        dumped: list[Entry] = []
        for page in sorted(kept | changed):
            content = page_of(page * 7 + 1) if page in changed else before[page][0]
            last = dumped[-1] if dumped else Entry(0, 0, b"")
            if last.page + last.count == page and last.content is not None:  # across areas, too
                dumped[-1] = Entry(last.page, last.count + 1, last.content + content)
            else:
                dumped.append(Entry(page, 1, content))
        made = write(new.with_name("made"), [Process(pid, [], dumped)])
        number = decode(head)[1][0]
        (new / f"pages-{number!r}.img").write_bytes((made / "pages-1.img").read_bytes())
        raw = (made / f"pagemap-{pid}.img").read_bytes()
        top = criu.header("pagemap") + criu.framed(head)
        (new / f"pagemap-{pid}.img").write_bytes(top + raw[len(criu.header("pagemap")) + 6 :])
        shutil.rmtree(made)


@given(dumps(), st.sampled_from([1, 2, 16]), st.sampled_from([0, 1, 3, 4096]), st.data())
@settings(max_examples=60, deadline=None)
def test_a_restore_sees_the_same_memory(dump: list[Process], least: int, most: int, data: st.DataObject) -> None:
    """Whatever is edited, dumped again, edited again and compacted: each page and each area is what it was."""
    with tempfile.TemporaryDirectory() as directory:
        image = write(Path(directory) / "image", dump, FILES)
        pids = [process.pid for process in dump]
        before = {pid: memory(image, pid) for pid in pids}
        edited = lazy.edit(
            image, page_file="a" * 12, least_pages=least, most_mappings=most, least_bytes=1, durable=False
        )
        assert {pid: memory(image, pid) for pid in pids} == before
        assert edited.lazy == bool(edited.new_page_files)
        assert lazy.page_files(image) == edited.page_files
        dumped = sum(len(entry.content) for process in dump for entry in process.entries if entry.content)
        assert edited.mapped_bytes + edited.copied_bytes == dumped

        again = Path(directory) / "again"
        next_dump(image, again, pids, data)
        changed = {pid: memory(again, pid) for pid in pids}
        second = lazy.edit(
            again, page_file="b" * 12, least_pages=least, most_mappings=most, least_bytes=1, durable=False
        )
        assert {pid: memory(again, pid) for pid in pids} == changed
        assert set(second.page_files) <= {*edited.page_files, *second.new_page_files}
        assert {path.name for path in (again / "memory").glob("*")} == set(second.page_files)

        third = Path(directory) / "third"
        next_dump(again, third, pids, data)
        changed = {pid: memory(third, pid) for pid in pids}
        second = lazy.edit(
            third, page_file="d" * 12, least_pages=least, most_mappings=most, least_bytes=1, durable=False
        )
        assert {pid: memory(third, pid) for pid in pids} == changed

        again = third
        small = compact(again, page_file="c" * 12, least_pages=least, most_mappings=most, durable=False)
        assert {pid: memory(again, pid) for pid in pids} == changed
        assert small.dropped == second.page_files
        assert lazy.page_files(again) == small.page_files
        assert {path.name for path in (again / "memory").iterdir()} == set(small.page_files)
        assert len(small.page_files) <= len(dump)


def large(directory: Path, **kind: int) -> Path:
    """An image with one full area of this kind."""
    content = b"".join(page_of(number) for number in range(1, 101))
    stack = Vma(5000, 4, flags=0x122)
    vma = Vma(1000, 100, **(PLAIN | kind))
    return write(
        directory / "image", [Process(7, [vma, stack], [Entry(1000, 100, content), Entry(5000, 1, page_of(1))])], FILES
    )


def test_all_but_the_last_page_of_a_plain_area_is_mapped(tmp_path: Path) -> None:
    """An area then has an anonymous end, so that mremap(2) cannot lengthen the mapping of the file."""
    image = large(tmp_path)
    edited = lazy.edit(image, page_file="k3v9x0c2m1ab", least_bytes=1, durable=False)
    assert (edited.lazy, edited.mapped_bytes, edited.copied_bytes) == (True, 99 * PAGE, 2 * PAGE)
    statuses = [decode(raw)[7][0] for raw in decode(messages(image / "mm-7.img")[0])[14] if isinstance(raw, bytes)]
    assert statuses == [REGULAR | FILE_PRIVATE, REGULAR | ANON_PRIVATE, REGULAR | ANON_PRIVATE]


@pytest.mark.parametrize(
    "kind",
    [
        {"madv": 1 << 18},
        {"madv": 1 << 40},
        {"flags": 0x4022},
        {"flags": 0x2022},
        {"flags": 0x122},
        {"flags": 0x40022},
        {"flags": 0x21, "status": REGULAR | ANON_SHARED},
        {"prot": 0},
        {"prot": 7},
        {"status": REGULAR | ANON_PRIVATE | 1 << 18},
        {"status": REGULAR | ANON_PRIVATE | 1 << 10},
        {"shmid": 5},
    ],
)
def test_what_a_file_cannot_stand_in_for_stays_as_it_was(tmp_path: Path, kind: dict[str, int]) -> None:
    """Not one byte of such an image changes: wiped on fork, locked, huge, shared, closed, executable, unknown."""
    image = large(tmp_path, **kind)
    before = {path.name: path.read_bytes() for path in image.iterdir()}
    edited = lazy.edit(image, page_file="k3v9x0c2m1ab", least_bytes=1, durable=False)
    assert not edited.lazy
    assert edited.why_not
    assert {path.name: path.read_bytes() for path in image.iterdir()} == before


def test_page_files_are_the_dumped_pages_themselves(tmp_path: Path) -> None:
    """The large file is renamed, not copied; it is read-only, and longer than any mapping can grow."""
    image = large(tmp_path)
    inode = (image / "pages-1.img").stat().st_ino
    lazy.edit(image, page_file="k3v9x0c2m1ab", least_bytes=1, durable=False)
    status = (image / "memory" / "k3v9x0c2m1ab").stat()
    assert status.st_ino == inode
    assert status.st_mode & 0o777 == 0o400
    assert status.st_size > 1 << 40
    assert status.st_blocks * 512 <= 128 * PAGE
    (file,) = [decode(decode(entry)[3][0]) for entry in messages(image / "files.img")[2:]]  # type: ignore[arg-type]
    assert file[6] == [b"/.warmcell/k3v9x0c2m1ab"]
    assert file[8] == [status.st_size]
    assert file[10] == [status.st_mode]


@pytest.mark.root
def test_what_is_copied_takes_room_once(tmp_path: Path) -> None:
    """Dumped pages that restores copy lie in a file of their own, and no longer in the page file too."""
    content = b"".join(page_of(number) for number in range(1, 201) if number % 5)
    count = len(content) // PAGE
    closed = Vma(1000, count, prot=0)
    process = Process(7, [closed, Vma(5000, count + 1)], [Entry(1000, count, content), Entry(5000, count, content)])
    image = write(tmp_path / "image", [process])
    before = memory(image, 7)
    lazy.edit(image, page_file="a" * 12, least_bytes=1, durable=False)
    assert memory(image, 7) == before
    assert (image / "pages-1.img").stat().st_size == count * PAGE
    assert (image / "memory" / ("a" * 12)).stat().st_blocks * 512 < (count + 16) * PAGE


def dumped_again(directory: Path, pages: range, *, name: str = "again") -> Path:
    """A dump of the process of `large`, restored from its lazy image, after these of its pages were written."""
    first = directory / "image"
    new = shutil.copytree(first, directory / name, copy_function=os.link)
    content = b"".join(page_of(number) for number in range(1001, 1001 + len(pages)))
    dumped = [Entry(pages.start, len(pages), content), Entry(1099, 1, page_of(100)), Entry(5000, 1, page_of(1))]
    made = write(directory / "made", [Process(7, [], dumped)])
    for file in ("pages-1.img", "pagemap-7.img"):
        (made / file).replace(new / file)
    shutil.rmtree(made)
    return new


def areas_of_files(image: Path) -> list[tuple[int, int, int, int]]:
    """Mappings of page files: first page, pages, file id, offset in pages."""
    found = criu.areas(messages(image / "mm-7.img")[0])
    return [
        (area.start // PAGE, (area.end - area.start) // PAGE, area.shmid, area.pgoff // PAGE)
        for area in found
        if area.status & FILE_PRIVATE
    ]


def test_what_was_written_since_is_mapped_again(tmp_path: Path) -> None:
    """A run of written pages becomes a mapping of the new page file, what is around it stays one of the old."""
    lazy.edit(large(tmp_path), page_file="a" * 12, least_bytes=1, durable=False)
    again = dumped_again(tmp_path, range(1030, 1060))
    before = memory(again, 7)
    edited = lazy.edit(again, page_file="b" * 12, least_bytes=1, durable=False)
    assert memory(again, 7) == before
    assert edited.page_files == ("a" * 12, "b" * 12)
    assert (edited.mapped_bytes, edited.copied_bytes) == (30 * PAGE, 2 * PAGE)
    assert areas_of_files(again) == [(1000, 30, 3, 0), (1030, 30, 4, 0), (1060, 39, 3, 60)]


def test_few_written_pages_stay_copies(tmp_path: Path) -> None:
    """A run that is cheaper to copy leaves its area whole."""
    lazy.edit(large(tmp_path), page_file="a" * 12, least_bytes=1, durable=False)
    again = dumped_again(tmp_path, range(1030, 1045))
    assert not lazy.edit(again, page_file="b" * 12, least_bytes=1, durable=False).lazy
    assert areas_of_files(again) == [(1000, 99, 3, 0)]


def test_a_page_file_of_which_all_was_written_is_needed_no_more(tmp_path: Path) -> None:
    """And its pieces, whatever they were, are one mapping again."""
    lazy.edit(large(tmp_path), page_file="a" * 12, least_bytes=1, durable=False)
    again = dumped_again(tmp_path, range(1030, 1060))
    lazy.edit(again, page_file="b" * 12, least_bytes=1, durable=False)
    (tmp_path / "image").rename(tmp_path / "first")
    again.rename(tmp_path / "image")
    third = dumped_again(tmp_path, range(1000, 1099))
    before = memory(third, 7)
    edited = lazy.edit(third, page_file="c" * 12, least_bytes=1, durable=False)
    assert memory(third, 7) == before
    assert edited.page_files == ("c" * 12,) == lazy.page_files(third)
    assert [path.name for path in (third / "memory").iterdir()] == ["c" * 12]
    assert [area[:2] for area in areas_of_files(third)] == [(1000, 99)]


def test_a_child_may_keep_what_its_parent_has_written(tmp_path: Path) -> None:
    """Pieces of one old mapping that fall at the same addresses are no shared memory where they differ."""
    ours = file_entry(2, "/.warmcell/" + "a" * 12)
    mapped = {"prot": 3, "flags": 2, "status": REGULAR | FILE_PRIVATE, "shmid": 2}
    written = b"".join(page_of(number) for number in range(1, 41))
    stack = Vma(5000, 4, flags=0x122)
    kept = Entry(5000, 1, page_of(1))
    parent = Process(7, [Vma(1000, 80, pgoff=0, **mapped), stack], [Entry(1040, 40, written), kept])
    child = Process(8, [Vma(1000, 90, pgoff=100 * PAGE, **mapped), stack], [Entry(1040, 50, page_of(3) * 50), kept])
    image = write(tmp_path / "image", [parent, child], [file_entry(1, "/usr/bin/python3"), ours])
    (image / "memory").mkdir()
    (image / "memory" / ("a" * 12)).write_bytes(b"".join(page_of(number) for number in range(1, 300)))
    before = [memory(image, pid) for pid in (7, 8)]
    lazy.edit(image, page_file="b" * 12, least_bytes=1, durable=False)
    assert [memory(image, pid) for pid in (7, 8)] == before
    (one, *_), (other, *_) = (criu.areas(messages(image / f"mm-{pid}.img")[0]) for pid in (7, 8))
    assert (one.start, one.end) == (other.start, other.end)
    assert one.pgoff != other.pgoff
    assert one.shmid != other.shmid


def test_what_was_written_of_a_library_is_mapped(tmp_path: Path) -> None:
    """By whatever edits the image; what was not written, and the end, stays the library's, each part where it was."""
    library = {"prot": 3, "flags": 2, "status": REGULAR | FILE_PRIVATE, "shmid": 2}
    content = b"".join(page_of(number) for number in range(1, 51))
    vmas = [Vma(1000, 100, pgoff=8 * PAGE, **library), Vma(3000, 30, **library), Vma(5000, 4, flags=0x122)]
    entries = [Entry(1010, 50, content), Entry(3000, 30, content[: 30 * PAGE]), Entry(5000, 1, page_of(1))]
    for name in ("edited", "compacted"):
        image = write(tmp_path / name, [Process(7, vmas, entries)], FILES)
        before = memory(image, 7)
        if name == "edited":
            lazy.edit(image, page_file="a" * 12, least_bytes=1, durable=False)
        else:
            compact(image, page_file="a" * 12, durable=False)
        assert memory(image, 7) == before
        found = [area for area in criu.areas(messages(image / "mm-7.img")[0]) if area.start < 5000 * PAGE]
        ours = max(area.shmid for area in found)
        assert [(area.start // PAGE, area.shmid, area.pgoff // PAGE) for area in found] == [
            (1000, 2, 8),
            (1010, ours, 0),
            (1060, 2, 68),
            (3000, ours, 50),
            (3029, 2, 29),
        ]
        assert ours != 2


def test_pieces_are_bounded(tmp_path: Path) -> None:
    """Memory that is in many pieces gets few new ones, the longest; the rest is copied until it is compacted."""
    mapped = {"prot": 3, "flags": 2, "status": REGULAR | FILE_PRIVATE, "shmid": 2}
    vmas = [Vma(1000 + 20 * index, 20, pgoff=40 * index * PAGE, **mapped) for index in range(1000)]
    entries = [Entry(1000 + 20 * index, 1 + index % 2, page_of(1) * (1 + index % 2)) for index in range(1000)]
    process = Process(7, [*vmas, Vma(50000, 4, flags=0x122)], [*entries, Entry(50000, 1, page_of(1))])
    ours = file_entry(2, "/.warmcell/" + "a" * 12)
    image = write(tmp_path / "image", [process], [file_entry(1, "/usr/bin/python3"), ours])
    areas = criu.areas(messages(image / "mm-7.img")[0])
    found = lazy.read_pagemap(image, 7)
    assert areas_code.joints(areas, frozenset({2})) == 999
    chosen = areas_code.choose(areas, found, least_pages=1, most=1400, page_file_ids=frozenset({2}))
    assert len(chosen) == 256
    assert {mapped.run.end - mapped.run.start for mapped in chosen} == {2 * PAGE}
    ids = frozenset({2})
    assert not areas_code.choose(areas, found, least_pages=1, most=1400, page_file_ids=ids, again=False)


def test_other_files_of_the_directory_stay(tmp_path: Path) -> None:
    """What the helper keeps in the directory, and directories in it, are there afterwards."""
    image = large(tmp_path)
    (image / "pinned").mkdir()
    (image / "pinned" / "lib").write_text("x")
    (image / "image.json").write_text("{}")
    lazy.edit(image, page_file="k3v9x0c2m1ab", least_bytes=1, durable=False)
    assert (image / "pinned" / "lib").read_text() == "x"
    assert (image / "image.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_an_error_leaves_the_plain_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full at the last moment nothing has changed, and the same edit succeeds afterwards."""
    image = large(tmp_path)
    before, was = memory(image, 7), sorted(path.name for path in image.rglob("*"))

    def full(one: Path, other: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exchange, "swap", full)
        with pytest.raises(OSError, match="No space left"):
            lazy.edit(image, page_file="k3v9x0c2m1ab", least_bytes=1, durable=False)
    assert sorted(path.name for path in image.rglob("*")) == was
    assert [path.name for path in tmp_path.iterdir()] == ["image"]
    assert memory(image, 7) == before
    assert lazy.edit(image, page_file="k3v9x0c2m1ab", least_bytes=1, durable=False).lazy
    assert memory(image, 7) == before


def test_what_a_crash_left_beside_is_replaced(tmp_path: Path) -> None:
    """A half-made directory does not disturb the next edit."""
    image = large(tmp_path)
    exchange.beside(image).mkdir()
    (exchange.beside(image) / "files.img").write_text("half")
    assert lazy.edit(image, page_file="k3v9x0c2m1ab", least_bytes=1, durable=False).lazy
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


@pytest.mark.parametrize("flags", [1, 1 | PRESENT, 8 | PRESENT])
def test_an_unknown_page_map_stays_plain(tmp_path: Path, flags: int) -> None:
    """Pages of an earlier dump of a series, or marks of a newer CRIU, are left alone."""
    content = b"".join(page_of(number) for number in range(1, 101)) if flags & PRESENT else None
    image = write(tmp_path / "image", [Process(7, [Vma(1000, 100)], [Entry(1000, 100, content, flags)])])
    edited = lazy.edit(image, page_file="k3v9x0c2m1ab", least_bytes=1, durable=False)
    assert not edited.lazy
    assert "marks" in edited.why_not or "series" in edited.why_not
    with pytest.raises(ImageError) as caught:
        compact(image, page_file="k3v9x0c2m1ab")
    assert caught.value.code == "snapshot_incompatible"


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damage_is_told_and_never_endless(data: st.DataObject) -> None:
    """Cut or changed bytes in any image file give an ImageError or a result, nothing else."""
    with tempfile.TemporaryDirectory() as directory:
        image = large(Path(directory))
        name = data.draw(st.sampled_from(["files", "inventory", "mm-7", "pagemap-7", "pages-1", "pstree"]))
        path = image / f"{name}.img"
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, min(len(content), 600) - 1))
        if data.draw(st.booleans()):
            del content[place:]
        else:
            content[place] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        for act in (
            lambda: lazy.edit(image, page_file="a" * 12, least_bytes=1, durable=False),
            lambda: contents.describe(image),
            lambda: compact(image, page_file="b" * 12, durable=False),
        ):
            try:
                act()
            except ImageError as error:
                assert error.code in ("snapshot_corrupt", "snapshot_incompatible")
                assert error.hint


def test_a_page_file_that_is_too_short_is_corrupt(tmp_path: Path) -> None:
    """A restore would end in the middle; the edit says so first."""
    image = large(tmp_path)
    with open(image / "pages-1.img", "r+b") as file:
        file.truncate(50 * PAGE)
    with pytest.raises(ImageError, match=r"pages-1\.img has 204800 bytes where 413696 belong"):
        lazy.edit(image, page_file="k3v9x0c2m1ab")


def test_ids_of_page_files_are_letters_and_digits(tmp_path: Path) -> None:
    """Nothing else may become a path."""
    image = large(tmp_path)
    with pytest.raises(ValueError, match="no id"):
        lazy.edit(image, page_file="../../../etc")
    names = lazy.derived("k3v9x0c2m1ab", 50)
    assert len(set(names)) == 50
    assert all(len(name) == 12 and name.isalnum() and name == name.lower() for name in names)


def test_compacting_drops_zeros_and_what_nobody_uses(tmp_path: Path) -> None:
    """The new page file has only pages in use that are not zero, in the order of memory."""
    content = page_of(1) * 50 + bytes(PAGE) * 100 + page_of(2) * 50
    process = Process(
        7, [Vma(1000, 201), Vma(5000, 4, flags=0x122)], [Entry(1000, 200, content), Entry(5000, 1, page_of(1))]
    )
    image = write(tmp_path / "image", [process])
    lazy.edit(image, page_file="a" * 12, least_bytes=1, durable=False)
    before = memory(image, 7)
    done = compact(image, page_file="b" * 12, durable=False)
    assert memory(image, 7) == before
    assert done.dropped == ("a" * 12,)
    assert done.page_files == ("b" * 12,)
    assert done.memory_bytes <= 110 * PAGE
    assert [path.name for path in (image / "memory").iterdir()] == ["b" * 12]
