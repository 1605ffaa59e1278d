"""Image directories: sealed, verified, dropped, and what they say that they take."""

import os
from pathlib import Path

import pytest

from warmcell.sandbox.helper import pages, spare
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.seals import Seals
from warmcell.sandbox.helper.shelf import MEMORY, PINNED, Shelf

FIRST, SECOND, PAGES = "a" * 12, "b" * 12, "p" * 12


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(str(tmp_path / "images"), 1000)


def made(shelf: Shelf, image: str, *, pages: bytes = b"", old: tuple[str, ...] = (), finish: bool = True) -> Path:
    """An image with a small file, plain memory and a page file."""
    draft = shelf.draft(image)
    path = Path(draft.path)
    for name in (MEMORY, PINNED):
        (path / name).mkdir()
    (path / "core-1.img").write_bytes(b"small")
    (path / "pages-1.img").write_bytes(b"plain memory")
    if pages:
        (path / MEMORY / PAGES).write_bytes(pages)
    draft.commit({"created_at": 1.0}, old_pages=dict.fromkeys(old, 0))
    if finish:
        draft.finish()
    draft.close(keep=True)
    return Path(shelf.place(image))


def refused(shelf: Shelf, image: str) -> HelperError:
    """Why an image cannot be opened."""
    with pytest.raises(HelperError) as raised:
        shelf.open(image)
    return raised.value


def test_what_is_written_can_be_opened(shelf: Shelf) -> None:
    """Again and again, by anybody with the same base."""
    made(shelf, FIRST, pages=b"m" * 5000)
    for _ in range(2):
        image = shelf.open(FIRST)
        assert image.about["memory"] == [PAGES]
        image.close()
    assert [one["id"] for one in shelf.images()] == [FIRST]


def test_a_store_is_told_of_its_own_images(tmp_path: Path) -> None:
    """Somebody with two state directories has two stores; neither takes the other's images for lost ones."""
    base = str(tmp_path / "images")
    one, other = (Shelf(base, 1000, store=store) for store in ("s" * 12, "t" * 12))
    made(one, FIRST)
    made(other, SECOND)
    assert [[image["id"] for image in shelf.images()] for shelf in (one, other)] == [[FIRST], [SECOND]]
    assert Shelf(base, 1000).images() == []
    one.open(SECOND).close()


@pytest.mark.parametrize("name", ["core-1.img", "pages-1.img", f"{MEMORY}/{PAGES}", "image.json"])
def test_every_file_counts(shelf: Shelf, name: str) -> None:
    """A byte that changes anywhere is found, although the size is the same."""
    path = made(shelf, FIRST, pages=b"m" * 5000) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert refused(shelf, FIRST).code == "snapshot_corrupt"


@pytest.mark.parametrize("change", ["missing", "added", "memory"])
def test_files_that_are_missing_or_too_many(shelf: Shelf, change: str) -> None:
    """criu would read what is there; so it has to be what was written, no more and no less."""
    path = made(shelf, FIRST, pages=b"m")
    if change == "missing":
        (path / "core-1.img").unlink()
    elif change == "added":
        (path / "core-2.img").write_bytes(b"foreign")
    else:
        (path / MEMORY / PAGES).unlink()
    assert refused(shelf, FIRST).code == "snapshot_corrupt"


def test_a_seal_of_another_key(shelf: Shelf, tmp_path: Path) -> None:
    """What somebody else sealed is not ours; nor is another image's file, though sealed by us."""
    path, other = made(shelf, FIRST), made(shelf, SECOND)
    about = str(path / "image.json")
    genuine = shelf.seals.read(about)
    Seals(str(tmp_path / "key")).write(about, genuine)
    assert refused(shelf, FIRST).code == "snapshot_corrupt"
    os.replace(other / "image.json", about)
    assert refused(shelf, FIRST).code == "snapshot_corrupt"


def test_an_image_that_was_not_on_disk_when_the_machine_stopped(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory cannot be trusted after another boot; one that was finished can."""
    made(shelf, FIRST, pages=b"m", finish=False)
    made(shelf, SECOND, finish=True)
    shelf.open(FIRST).close()
    for module in ("shelf", "pages"):
        monkeypatch.setattr(f"warmcell.sandbox.helper.{module}.boot_id", lambda: "another boot")
    assert "machine stopped" in refused(shelf, FIRST).message
    shelf.open(SECOND).close()


def test_an_image_whose_maker_was_killed_is_finished_later(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same boot, by the next helper; then it outlives the next boot."""
    made(shelf, FIRST, pages=b"m", finish=False)
    shelf.finish()
    for module in ("shelf", "pages"):
        monkeypatch.setattr(f"warmcell.sandbox.helper.{module}.boot_id", lambda: "another boot")
    shelf.open(FIRST).close()


def test_memory_is_read_again_only_when_its_inode_has_changed(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another image that shares it, and dropping that, is no such change."""
    path = made(shelf, FIRST, pages=b"m" * 5000)
    made(shelf, SECOND, old=(PAGES,))
    assert (path / MEMORY / PAGES).stat().st_nlink == 3
    read: list[str] = []
    monkeypatch.setattr("warmcell.sandbox.helper.pages._checksum", lambda path: read.append(path) or "")
    shelf.open(FIRST).close()
    shelf.drop(SECOND)
    shelf.open(FIRST).close()
    assert read == []
    os.utime(path / MEMORY / PAGES)
    assert refused(shelf, FIRST).code == "snapshot_corrupt"
    assert len(read) == 1


def test_shared_memory_counts_for_nobody(shelf: Shelf) -> None:
    """An image's bytes are what its removal would give back."""
    made(shelf, FIRST, pages=b"m" * 100_000)
    alone = shelf.images()[0]["bytes"]
    made(shelf, SECOND, old=(PAGES,))
    first, second = (one["bytes"] for one in shelf.images())
    assert isinstance(alone, int)
    assert isinstance(first, int)
    assert alone - first >= 100_000
    assert first == second


def test_dropped_images_go_and_their_memory_with_the_last(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whatever an operation that was killed has left, unless it was made just now."""
    made(shelf, FIRST, pages=b"m")
    made(shelf, SECOND, old=(PAGES,))
    (Path(shelf.path) / ".new-cccccccccccc-1").mkdir()
    shelf.drop(FIRST)
    shelf.clean()
    assert sorted(os.listdir(shelf.path)) == [".new-cccccccccccc-1", ".pages", ".pins", SECOND]
    monkeypatch.setattr("warmcell.sandbox.helper.shelf.YOUNG_S", 0.0)
    shelf.clean()
    assert sorted(os.listdir(shelf.path)) == [".pages", ".pins", SECOND]
    assert PAGES in os.listdir(f"{shelf.path}/.pages")
    shelf.drop(SECOND)
    shelf.drop(SECOND)
    shelf.clean()
    assert sorted(os.listdir(shelf.path)) == [".pages", ".pins"]
    assert os.listdir(f"{shelf.path}/.pages") == []
    assert refused(shelf, FIRST).code == "snapshot_not_found"


def test_what_is_being_made_is_not_cleaned_away(shelf: Shelf) -> None:
    """Another operation's clean-up leaves a draft alone; its own failure removes it."""
    draft = shelf.draft(FIRST)
    shelf.clean()
    assert os.path.isdir(draft.path)
    draft.close(keep=False)
    assert sorted(os.listdir(shelf.path)) == [".pages", ".pins"]


def test_memory_that_images_share_counts_once(shelf: Shelf) -> None:
    """In equal parts, beside what each has alone; whole for the one that is left."""
    made(shelf, FIRST, pages=os.urandom(1 << 20))
    alone = {str(image["id"]): image for image in shelf.images()}[FIRST]
    made(shelf, SECOND, old=(PAGES,))
    assert alone["shared"] == 0
    shared = [image["shared"] for image in shelf.images()]
    assert shared == [1 << 19, 1 << 19]
    shelf.drop(FIRST)
    (left,) = shelf.images()
    assert (left["bytes"], left["shared"]) == (alone["bytes"], 0)


@pytest.mark.parametrize("damage", ["empty", "missing"])
def test_a_record_that_cannot_be_read_is_in_nobodys_way(shelf: Shelf, damage: str) -> None:
    """Its images cannot be opened, but they go, and so does all else that nobody needs."""
    made(shelf, FIRST, pages=b"m")
    made(shelf, SECOND, old=(PAGES,))
    record = Path(shelf.path, ".pages", f"{PAGES}.json")
    if damage == "empty":
        record.write_bytes(b"")
        assert refused(shelf, FIRST).code == "snapshot_corrupt"
        assert [one["id"] for one in shelf.images()] == [FIRST, SECOND]
    else:
        record.unlink()
    for image in (FIRST, SECOND):
        shelf.drop(image)
        shelf.clean()
    assert sorted(os.listdir(shelf.path)) == [".pages", ".pins"]
    assert os.listdir(f"{shelf.path}/.pages") == []


def test_what_is_known_of_memory_is_on_the_disk_once_it_is_settled(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record, and the names of both: else the checksum that says that it is whole is what a loss of power takes."""
    made(shelf, FIRST, pages=b"m", finish=False)
    synced: list[str] = []
    sync = os.fsync

    def remembered(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    monkeypatch.setattr(os, "fsync", remembered)
    shelf.settle(FIRST)
    there = {path.partition(".json.")[0] for path in synced}  # Written under another name first.
    folder = f"{shelf.path}/.pages"
    assert {f"{folder}/{PAGES}", folder, f"{shelf.place(FIRST)}/{MEMORY}", shelf.place(FIRST), shelf.path} <= there
    assert any(path.startswith(f"{folder}/{PAGES}.json.") for path in synced)


def test_a_hint_that_cannot_be_read_costs_a_look_only(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether memory is as it was written is found out by reading it, once."""
    made(shelf, FIRST, pages=b"m" * 5000)
    Path(shelf.path, ".pages", f"{PAGES}.stat").write_bytes(b"")
    read: list[str] = []
    checksum = pages._checksum
    monkeypatch.setattr(pages, "_checksum", lambda path: read.append(path) or checksum(path))
    for _ in range(2):
        shelf.open(FIRST).close()
    assert len(read) == 1


@pytest.mark.parametrize("least", [4096, 1 << 20])
def test_a_dump_takes_a_file_that_nobody_needs_and_removes_none(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    """To remove gigabytes takes seconds, in which a kernel would stand still; afterwards they go."""
    monkeypatch.setattr(spare, "LEAST_BYTES", least)
    folder = Path(shelf.path, ".pages")
    idle = [folder / name for name in ("q" * 12, "r" * 12)]
    for path in idle:
        path.write_bytes(b"m" * 8192)
        for known in (".json", ".stat"):
            Path(f"{path}{known}").write_text("{}")
    image = made(shelf, FIRST, pages=b"m" * 8192)
    shelf.pages.renew_spare()
    left = {one.name.partition(".")[0] for one in folder.iterdir() if not one.name.startswith(".")}
    taken = {one.name for one in idle} - left
    assert (len(taken), shelf.pages.spare.is_there()) == ((1, True) if least == 4096 else (0, False))
    assert PAGES in left
    shelf.pages.collect()
    assert not any(path.exists() or Path(f"{path}.json").exists() for path in idle)
    assert (folder / PAGES).stat().st_nlink == 2
    assert image.exists()
