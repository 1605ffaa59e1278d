"""What a snapshot keeps of the files that a kernel maps."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from warmcell.sandbox.helper import held, linux
from warmcell.sandbox.helper.pins import Pins

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_groups")]


@pytest.fixture
def own_groups() -> Iterator[None]:
    """A process of the helper gives its groups away for good; this one takes them back."""
    groups = os.getgroups()
    yield
    os.setgroups(groups)


def seen(path: Path) -> list[int]:
    """What a sandbox sees of a file."""
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def pinned(tmp_path: Path, path: Path, about: list[int], name: str = "pinned", *, code: bool = True) -> list[object]:
    """What is said of a file, a library or data, after it was to be kept below `tmp_path`."""
    into, pins = tmp_path / name, tmp_path / "pins"
    into.mkdir()
    pins.mkdir(exist_ok=True)
    reader = (os.getuid(), os.getgid())
    kept = {str(path)} if code else set[str]()
    return held.pin({str(path): about}, str(into), pins=Pins(str(pins)), reader=reader, code=kept)[str(path)]


def test_a_library_is_kept_without_a_second_copy(tmp_path: Path) -> None:
    """It is the same file under another name, so it takes no room, and stays when the package is upgraded."""
    library = tmp_path / "lib.so"
    library.write_bytes(b"first version")
    about = seen(library)
    assert pinned(tmp_path, library, about) == [*about, "0"]
    kept = tmp_path / "pinned" / "0"
    assert kept.samefile(library)
    library.unlink()
    library.write_bytes(b"second version")
    assert kept.read_bytes() == b"first version"


def test_one_of_another_file_system_is_copied(tmp_path: Path) -> None:
    """Its copy has its content and its time of change, by which a restore knows it."""
    with tempfile.TemporaryDirectory(prefix="wc-", dir="/dev/shm") as directory:
        library = Path(directory, "lib.so")
        library.write_bytes(b"content")
        about = seen(library)
        assert pinned(tmp_path, library, about) == [*about, "0"]
        kept = tmp_path / "pinned" / "0"
        assert kept.read_bytes() == b"content"
        assert not kept.samefile(library)
        assert kept.stat().st_mtime_ns == about[2]


def test_one_copy_serves_all_snapshots(tmp_path: Path) -> None:
    """However many keep a file of another file system; another version is another copy, and the last one's goes."""
    pins = tmp_path / "pins"
    with tempfile.TemporaryDirectory(prefix="wc-", dir="/dev/shm") as directory:
        library = Path(directory, "lib.so")
        library.write_bytes(b"content")
        for name in ("one", "two"):
            assert pinned(tmp_path, library, seen(library), name)[-1] == "0"
        library.unlink()
        library.write_bytes(b"another")
        pinned(tmp_path, library, seen(library), "three")
    kept = {name: tmp_path / name / "0" for name in ("one", "two", "three")}
    assert kept["one"].samefile(kept["two"])
    assert [kept[name].read_bytes() for name in ("one", "three")] == [b"content", b"another"]
    assert len(list(pins.iterdir())) == 2
    kept["three"].unlink()
    kept["one"].unlink()
    Pins(str(pins)).collect()
    (left,) = pins.iterdir()
    assert left.samefile(kept["two"])


def test_another_file_at_that_place_is_not_kept(tmp_path: Path) -> None:
    """The sandbox maps its own file there, or one that was replaced meanwhile."""
    library = tmp_path / "lib.so"
    library.write_bytes(b"content")
    about = [library.stat().st_ino + 1, *seen(library)[1:]]
    assert pinned(tmp_path, library, about) == [*about, ""]
    assert not list((tmp_path / "pinned").iterdir())


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """What a path leads to is nobody's choice but that of who asks for the very file."""
    library, link = tmp_path / "lib.so", tmp_path / "link.so"
    library.write_bytes(b"content")
    link.symlink_to(library)
    about = seen(library)
    assert pinned(tmp_path, link, about) == [*about, ""]


def test_large_data_of_another_file_system_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's weights, for one: a snapshot would take minutes. A library of that size is; what is small, too."""
    monkeypatch.setattr(held, "DATA_MAX_BYTES", 1 << 20)
    with tempfile.TemporaryDirectory(prefix="wc-", dir="/dev/shm") as directory:
        large = Path(directory, "weights")
        large.write_bytes(b"w" * (2 << 20))
        assert pinned(tmp_path, large, seen(large), "data", code=False) == [*seen(large), ""]
        assert not list((tmp_path / "data").iterdir())
        assert pinned(tmp_path, large, seen(large), "code") == [*seen(large), "0"]
        small = Path(directory, "small")
        small.write_bytes(b"s")
        assert pinned(tmp_path, small, seen(small), "small", code=False) == [*seen(small), "0"]


def test_a_copy_has_the_holes_of_the_file(tmp_path: Path) -> None:
    """Somebody's empty file of a terabyte fills no disk."""
    with tempfile.TemporaryDirectory(prefix="wc-", dir="/dev/shm") as directory:
        sparse = Path(directory, "sparse")
        with sparse.open("wb") as file:
            file.truncate(1 << 40)
            file.seek(1 << 30)
            file.write(b"data")
        assert pinned(tmp_path, sparse, seen(sparse), code=False) == [*seen(sparse), "0"]
        kept = tmp_path / "pinned" / "0"
        assert kept.stat().st_size == 1 << 40
        assert kept.stat().st_blocks * 512 < 1 << 20
        with kept.open("rb") as file:
            file.seek(1 << 30)
            assert file.read(5) == b"data\0"


def test_rights_that_cannot_be_taken_on_open_nothing() -> None:
    """setfsuid never says that it has failed; with root's rights a user could have any file kept."""
    with pytest.raises(PermissionError), linux.files_of(1 << 32 | 5, 0):  # No number of a user.
        pytest.fail("files could be opened")
    assert linux._libc.setfsuid(-1) == os.getuid()


def test_each_of_many_is_kept_under_its_own_name(tmp_path: Path) -> None:
    """They are opened many at a time; those that cannot be, or are others by now, are in nobody's way."""
    into, pins = tmp_path / "pinned", tmp_path / "pins"
    into.mkdir()
    pins.mkdir()
    paths = [tmp_path / f"{number:03}.so" for number in range(2 * held.AT_ONCE + 10)]
    for path in paths:
        path.write_text(path.name)
    about = {str(path): seen(path) for path in paths}
    paths[5].unlink()
    paths[held.AT_ONCE].write_text("another version")
    before = os.listdir("/proc/self/fd")
    found = held.pin(about, str(into), pins=Pins(str(pins)))
    assert os.listdir("/proc/self/fd") == before
    kept = {path: str(found[str(path)][3]) for path in paths}
    assert [path for path in paths if not kept[path]] == [paths[5], paths[held.AT_ONCE]]
    assert all((into / name).read_text() == path.name for path, name in kept.items() if name)
    assert [found[path][:3] for path in about] == list(about.values())
