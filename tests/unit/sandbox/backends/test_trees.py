"""Copies of trees that somebody hostile has made, and of an overlay's layer above an earlier one."""

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from warmcell.sandbox.backends import trees
from warmcell.sandbox.backends.files import remove_tree

MARK = "user.overlay.opaque"
Tree = Mapping[str, Any]
WHITEOUT = object()
OPAQUE = object()
"""As a name in a tree: nothing of lower layers shows through."""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str, Tree], Path]]:
    """Makes trees of nested mappings; a string is a file's content."""

    def made(name: str, tree: Tree) -> Path:
        top = tmp_path / name
        top.mkdir()
        _fill(top, tree)
        return top

    yield made
    for left in tmp_path.iterdir():
        remove_tree(left)


def _fill(top: Path, tree: Tree) -> None:
    for name, value in tree.items():
        path = top / name
        if value is OPAQUE:
            os.setxattr(top, MARK, b"y")
        elif value is WHITEOUT:
            os.mknod(path, stat.S_IFCHR | 0o600, 0)
        elif isinstance(value, str):
            path.write_text(value)
        else:
            path.mkdir()
            _fill(path, value)


def _read(top: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if MARK in os.listxattr(top):
        found["!"] = OPAQUE
    for path in top.iterdir():
        if path.is_symlink():
            found[path.name] = ("link", os.readlink(path))
        elif path.is_char_device():
            found[path.name] = WHITEOUT
        elif path.is_dir():
            found[path.name] = _read(path)
        elif path.is_file():
            found[path.name] = path.read_text()
        else:
            found[path.name] = ("special", stat.S_IFMT(path.lstat().st_mode))
    return found


def copy(
    source: Path,
    target: Path,
    *,
    base: Path | None = None,
    overlay: str = "",
    lowest: Path | None = None,
    most: int = 2**30,
    entries: int = 10**6,
    onto: bool = False,
) -> int:
    """Copy `source` to `target`, which is made; the bytes that were counted."""
    target.mkdir(exist_ok=onto)
    handles = [os.open(path, trees.DIRECTORY) if path is not None else -1 for path in (source, target, base, lowest)]
    try:
        return trees.Copy(
            handles[0],
            handles[1],
            most_bytes=most,
            most_entries=entries,
            owners=os.getuid() == 0,
            overlay=overlay,
            base=handles[2],
            lowest=handles[3],
            onto=onto,
        ).run()
    finally:
        for handle in set(handles) - {-1}:
            os.close(handle)


MERGES = [
    pytest.param({"a": "1"}, {}, {"a": "1"}, id="what is not touched stays"),
    pytest.param({"a": "1"}, {"a": "2"}, {"a": "2"}, id="a file is replaced"),
    pytest.param({"a": "1"}, {"a": WHITEOUT}, {"a": WHITEOUT}, id="a removed file stays hidden in the environment"),
    pytest.param({"a": WHITEOUT}, {}, {"a": WHITEOUT}, id="what was removed earlier stays removed"),
    pytest.param({"a": WHITEOUT}, {"a": "2"}, {"a": "2"}, id="a file is made where one was removed"),
    pytest.param(
        {"d": WHITEOUT}, {"d": {"x": "1"}}, {"d": {"!": OPAQUE, "x": "1"}}, id="a directory made where one was removed"
    ),
    pytest.param(
        {"d": "file"}, {"d": {"x": "1"}}, {"d": {"!": OPAQUE, "x": "1"}}, id="a directory made where a file was"
    ),
    pytest.param({"d": {"x": "1"}}, {"d": "file"}, {"d": "file"}, id="a file made where a directory was"),
    pytest.param({"d": {"x": "1"}}, {"d": {"y": "2"}}, {"d": {"x": "1", "y": "2"}}, id="directories become one"),
    pytest.param(
        {"d": {"x": "1"}}, {"d": {"!": OPAQUE, "y": "2"}}, {"d": {"!": OPAQUE, "y": "2"}}, id="a directory is replaced"
    ),
    pytest.param(
        {"d": {"!": OPAQUE, "x": "1", "y": "2"}},
        {"d": {"x": WHITEOUT}},
        {"d": {"!": OPAQUE, "y": "2"}},
        id="no whiteout is left where nothing is below",
    ),
    pytest.param(
        {"d": {"!": OPAQUE, "e": {"x": "1"}}},
        {"d": {"e": {"x": WHITEOUT, "y": "2"}}},
        {"d": {"!": OPAQUE, "e": {"y": "2"}}},
        id="nor deeper in it",
    ),
    pytest.param(
        {"d": {"e": {"f": {"x": "1"}}}}, {"d": {}}, {"d": {"e": {"f": {"x": "1"}}}}, id="whole trees stay as they are"
    ),
]


@pytest.mark.parametrize(("base", "upper", "expected"), MERGES)
def test_a_layer_above_an_earlier_one_becomes_one(
    make: Callable[[str, Tree], Path], tmp_path: Path, base: Tree, upper: Tree, expected: Tree
) -> None:
    """The copy stands for both, whatever lies below them."""
    copy(make("upper", upper), tmp_path / "copy", base=make("base", base), overlay="user")
    assert _without_inner_marks(_read(tmp_path / "copy")) == expected


def _without_inner_marks(tree: dict[str, Any], *, below: bool = True) -> dict[str, Any]:
    """A tree without marks in what lies in a marked directory: nothing is below that they could hide."""
    marked = "!" in tree
    return {
        name: _without_inner_marks(value, below=below and not marked) if isinstance(value, dict) else value
        for name, value in tree.items()
        if name != "!" or below
    }


def test_marks_are_left_out_where_nothing_is_below(make: Callable[[str, Tree], Path], tmp_path: Path) -> None:
    """An overlay lists them in a directory that only one of its layers has, as files that cannot be opened."""
    lowest = make("lowest", {"d": {"x": "0"}, "f": "0"})
    base = make("base", {"d": {"x": WHITEOUT, "z": WHITEOUT}, "new": {"x": "1", "y": "1"}, "f": {"x": "1"}})
    upper = make("upper", {"d": {"y": WHITEOUT}, "new": {"x": WHITEOUT}, "f": {"x": WHITEOUT}})
    copy(upper, tmp_path / "copy", base=base, overlay="user", lowest=lowest)
    assert _read(tmp_path / "copy") == {"d": {"x": WHITEOUT}, "new": {"y": "1"}, "f": {}}


def test_unchanged_files_are_not_copied_again(make: Callable[[str, Tree], Path], tmp_path: Path) -> None:
    """They are hard links; what is replaced in the copy is not replaced in the earlier layer."""
    base = make("base", {"d": {"x": "1", "y": "1"}, "gone": WHITEOUT})
    copy(make("upper", {"d": {"y": "2"}}), tmp_path / "copy", base=base, overlay="user")
    assert (tmp_path / "copy" / "d" / "x").samefile(base / "d" / "x")
    assert (base / "d" / "y").read_text() == "1"
    assert _read(base) == {"d": {"x": "1", "y": "1"}, "gone": WHITEOUT}


def test_metadata_of_the_upper_directory_wins(make: Callable[[str, Tree], Path], tmp_path: Path) -> None:
    """A directory whose mode has changed keeps what lies in it."""
    base, upper = make("base", {"d": {"x": "1"}}), make("upper", {"d": {}})
    (base / "d").chmod(0o755)
    (upper / "d").chmod(0o500)
    os.utime(upper / "d", ns=(1, 2))
    copy(upper, tmp_path / "copy", base=base, overlay="user")
    found = (tmp_path / "copy" / "d").stat()
    assert stat.S_IMODE(found.st_mode) == 0o500
    assert found.st_mtime_ns == 2
    assert (tmp_path / "copy" / "d" / "x").read_text() == "1"


def test_marks_that_name_former_layers_are_left_out(make: Callable[[str, Tree], Path], tmp_path: Path) -> None:
    """Those of a guest's own overlay, which the kernel escapes, are kept; other attributes too."""
    upper = make("upper", {"d": {"x": "1"}})
    for name in ("user.overlay.origin", "user.overlay.impure", "user.overlay.overlay.origin", "user.mine"):
        os.setxattr(upper / "d", name, b"value")
    copy(upper, tmp_path / "copy", overlay="user")
    assert sorted(os.listxattr(tmp_path / "copy" / "d")) == ["user.mine", "user.overlay.overlay.origin"]


def test_everything_but_devices_is_copied_as_it_is(tmp_path: Path) -> None:
    """Links, fifos, sockets, holes, hard links, odd names, modes and times."""
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "d" / "file").write_bytes(b"x" * 10000)
    os.link(source / "d" / "file", source / "twin")
    os.symlink("/etc/shadow", source / "link")
    os.mkfifo(source / "fifo", 0o622)
    os.mknod(source / "socket", stat.S_IFSOCK | 0o600)
    with (source / "sparse").open("wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"middle")
    odd = os.fsdecode(b"\xff\n \\")
    (source / odd).touch()
    (source / odd).chmod(0o4711)
    os.utime(source / "link", ns=(5, 6), follow_symlinks=False)
    assert copy(source, tmp_path / "copy") < 100_000
    made = tmp_path / "copy"
    assert (made / "d" / "file").samefile(made / "twin")
    assert os.readlink(made / "link") == "/etc/shadow"
    assert (made / "link").lstat().st_mtime_ns == 6
    assert stat.S_ISFIFO((made / "fifo").stat().st_mode)
    assert stat.S_IMODE((made / "fifo").stat().st_mode) == stat.S_IMODE((source / "fifo").stat().st_mode)
    assert stat.S_ISSOCK((made / "socket").stat().st_mode)
    assert (made / "sparse").stat().st_size == 1 << 30
    assert (made / "sparse").stat().st_blocks < 1000
    with (made / "sparse").open("rb") as file:
        file.seek(1 << 29)
        assert file.read(6) == b"middle"
    assert stat.S_IMODE((made / odd).stat().st_mode) == 0o4711


@pytest.mark.parametrize(("most", "entries"), [(10_000, 100), (10**6, 5)])
def test_a_tree_that_is_larger_than_it_may_be_is_refused(tmp_path: Path, most: int, entries: int) -> None:
    """By its bytes in whole pages, and by its number of entries."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(6):
        (source / str(number)).write_text("x")
    with pytest.raises(trees.Refused) as refused:
        copy(source, tmp_path / "copy", most=most, entries=entries)
    assert refused.value.full


def test_a_tree_deeper_than_paths_can_be_is_refused_and_removed(tmp_path: Path) -> None:
    """Nothing recurses, and no descriptor is held for each level."""
    source = tmp_path / "source"
    source.mkdir()
    here = os.open(source, trees.DIRECTORY)
    for _ in range(5000):
        os.mkdir("d", dir_fd=here)
        deeper = os.open("d", trees.DIRECTORY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(here)
    with pytest.raises(trees.Refused, match="too deeply"):
        copy(source, tmp_path / "copy")
    for tree in (source, tmp_path / "copy"):
        remove_tree(tree)
        assert not tree.exists()


def test_whoever_swaps_directories_for_links_meanwhile_gets_nothing_of_what_they_lead_to(tmp_path: Path) -> None:
    """A thread that changes names all the time while the tree is copied again and again."""
    outside, source = tmp_path / "outside", tmp_path / "source"
    for path in (outside, source / "d", source / "e"):
        path.mkdir(parents=True)
    for name in ("file", "only-outside"):
        (outside / name).write_text("secret")
    for top in ("d", "e"):
        for number in range(20):
            (source / top / f"{number}").write_text("own")
        (source / top / "file").write_text("own")
    (source / "to-folder").symlink_to(outside)
    (source / "to-file").symlink_to(outside / "file")
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for one, other in (("d", "to-folder"), ("e/file", "to-file")):
                os.rename(source / one, source / "aside")
                os.rename(source / other, source / one)
                os.rename(source / one, source / other)
                os.rename(source / "aside", source / one)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for number in range(60):
            copy(source, tmp_path / f"copy{number}")
    finally:
        done.set()
        swapper.join()
    read = [path for path in tmp_path.glob("copy*/**/*") if path.is_file() and not path.is_symlink()]
    assert len(read) > 60 * 20
    assert not [path for path in read if path.read_text() != "own" or path.name == "only-outside"]


def test_an_open_of_a_link_is_refused_by_the_kernel(tmp_path: Path) -> None:
    """What the copying of directories rests on."""
    (tmp_path / "top" / "real").mkdir(parents=True)
    (tmp_path / "top" / "link").symlink_to("real")
    (tmp_path / "top" / "up").symlink_to("..")
    top = os.open(tmp_path / "top", trees.DIRECTORY)
    try:
        os.close(trees.beneath(top, "real"))
        for name, why in (("link", errno.ENOTDIR), ("up/top", errno.ELOOP), ("..", errno.EXDEV), ("/etc", errno.EXDEV)):
            with pytest.raises(OSError) as refused:
                trees.beneath(top, name)
            assert refused.value.errno == why, name
    finally:
        os.close(top)


def test_directories_that_are_there_already_stay_as_they_are(tmp_path: Path) -> None:
    """Those that lead to what is mounted are somebody else's; what lies in them is copied nevertheless."""
    (tmp_path / "from" / "way").mkdir(parents=True)
    (tmp_path / "from" / "way" / "file").write_text("content")
    (tmp_path / "from" / "way").chmod(0o700)
    (tmp_path / "to" / "way").mkdir(parents=True)
    (tmp_path / "to" / "way").chmod(0o751)
    copy(tmp_path / "from", tmp_path / "to", onto=True)
    assert (tmp_path / "to" / "way" / "file").read_text() == "content"
    assert (tmp_path / "to" / "way").stat().st_mode & 0o777 == 0o751
