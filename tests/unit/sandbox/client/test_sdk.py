"""The SDK without a keeper: what it asks for, what it makes of answers, and what it lets onto this machine."""

import inspect
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

import warmcell
from warmcell.sandbox.client import trees
from warmcell.sandbox.client.async_commands import AsyncCommand
from warmcell.sandbox.client.async_files import AsyncFiles
from warmcell.sandbox.client.commands import Command
from warmcell.sandbox.client.files import Files
from warmcell.sandbox.client.results import CodeError, Showing
from warmcell.sandbox.client.wanted import Wanted, asked_of, size
from warmcell.sandbox.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("blocking", "waiting"),
    [(warmcell.Sandbox, warmcell.AsyncSandbox), (Command, AsyncCommand), (Files, AsyncFiles)],
)
def test_both_flavours_have_the_same_methods(blocking: type, waiting: type) -> None:
    """Each public method is in both, with the same parameters and defaults; only one of them is to be awaited."""
    names = {name for name in vars(blocking) if not name.startswith("_")}
    assert names == {name for name in vars(waiting) if not name.startswith("_")} - {"create"}
    for name in names:
        one, other = (inspect.getattr_static(kind, name) for kind in (blocking, waiting))
        if isinstance(one, property):
            assert isinstance(other, property)
            continue
        one, other = (getattr(kind, name) for kind in (blocking, waiting))
        assert inspect.signature(one).parameters == inspect.signature(other).parameters, name
        entered = name == "watch"  # by `async with`
        assert [inspect.iscoroutinefunction(each) for each in (one, other)] == [False, not entered], name


def test_the_arguments_of_both_are_the_same() -> None:
    """What `Sandbox` takes is what `AsyncSandbox` takes."""
    parameters = inspect.signature(warmcell.Sandbox).parameters
    assert set(parameters) == set(Wanted.__annotations__)


@pytest.mark.parametrize(
    ("said", "bytes_"), [("512MiB", 512 * 2**20), ("2 GiB", 2 * 2**30), ("1.5GB", 1_500_000_000), ("7", 7), (3, 3)]
)
def test_sizes_are_understood(said: int | str, bytes_: int) -> None:
    """Units in words, or bytes."""
    assert size(said) == bytes_


@pytest.mark.parametrize("said", ["2 apples", "", "-1", "1e9"])
def test_what_is_no_size_is_refused(said: str) -> None:
    """Rather than taken for something else."""
    with pytest.raises(InvalidRequestError):
        size(said)


def test_only_what_is_said_is_asked_for() -> None:
    """What a caller leaves out is the other side's to choose; time and tags always go along."""
    asked = asked_of({"gpu": "A100", "memory": "1GiB", "timeout": None, "tags": {"a": "b"}})
    assert asked.body["spec"] == {"gpu": "A100", "limits": {"memory_bytes": 2**30}}
    assert asked.body["terms"] == {
        "timeout_s": None,
        "on_timeout": "suspend",
        "auto_resume": True,
        "tags": {"a": "b"},
    }
    assert asked_of({}).key != asked_of({}).key


def shown(*entries: dict[str, Any]) -> Showing:
    showing = Showing()
    for entry in entries:
        showing.take(entry)
    return showing


def test_an_updated_display_takes_the_place_of_the_first() -> None:
    """A progress bar is one result, as it was last."""
    display = {"data": {"text/plain": "1 %"}, "transient": {"display_id": "bar"}}
    update = {"data": {"text/plain": "2 %"}, "transient": {"display_id": "bar"}}
    showing = shown(
        {"msg_type": "display_data", "content": display},
        {"msg_type": "update_display_data", "content": update},
        {"msg_type": "execute_result", "content": {"data": {"text/plain": "7"}}},
    )
    done = showing.execution({"status": "ok", "execution_count": 3})
    assert [result.text for result in done.results] == ["2 %", "7"]
    assert (done.text, done.execution_count) == ("7", 3)
    assert done.check() is done


def test_a_failure_is_data_until_it_is_checked() -> None:
    """The traceback comes without colours."""
    error = {"ename": "ValueError", "evalue": "no", "traceback": ["\x1b[31mValueError\x1b[0m: no"]}
    done = shown({"msg_type": "error", "content": error}).execution({"status": "error"})
    assert done.error is not None
    assert str(done.error) == "ValueError: no"
    with pytest.raises(CodeError, match="ValueError: no"):
        done.check()


def hostile_tar() -> io.BytesIO:
    """Names and kinds that lead elsewhere, among which is one good file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"bad") -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, link
            member.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(content))

        add("../escaped")
        add("/tmp/wc-escaped")
        add("a/../../escaped")
        add("link", tarfile.SYMTYPE, "/")
        add("link/escaped")  # becomes a folder: there is no link
        add("hard", tarfile.LNKTYPE, "/etc/passwd")
        add("pipe", tarfile.FIFOTYPE)
        add("device", tarfile.CHRTYPE)
        add("sub/good", content=b"good")
    return file


def test_a_tar_from_a_sandbox_writes_nothing_elsewhere(tmp_path: Path) -> None:
    """Links, devices and names that lead out are left out and named; files below the folder come."""
    target = tmp_path / "in" / "here"
    left = trees.unpack(hostile_tar(), target)
    assert left == ["../escaped", "/tmp/wc-escaped", "a/../../escaped", "link", "hard", "pipe", "device"]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "in/here/link/escaped",
        "in/here/sub/good",
    ]
    assert not Path("/tmp/wc-escaped").exists()


def test_a_tar_does_not_write_through_links_that_are_there(tmp_path: Path) -> None:
    """A link in the target is not followed as a folder, and is replaced as a file."""
    target, outside = tmp_path / "in", tmp_path / "out"
    outside.mkdir()
    target.mkdir()
    (target / "sub").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        trees.unpack(hostile_tar(), target)
    assert list(outside.iterdir()) == []


def test_a_tar_does_not_grow_on_its_way_to_the_disk(tmp_path: Path) -> None:
    """A sparse file of three bytes and any size of nothing is left out and named."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as made:
        member = tarfile.TarInfo("holes")
        member.size = 3
        member.pax_headers = {"GNU.sparse.map": "0,3", "GNU.sparse.size": str(2**25), "GNU.sparse.name": "holes"}
        made.addfile(member, io.BytesIO(b"abc"))
    assert trees.unpack(archive, tmp_path) == ["holes"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_tar_is_said_to_be_none(tmp_path: Path) -> None:
    """Instead of an error of the library."""
    with pytest.raises(InvalidRequestError):
        trees.unpack(io.BytesIO(b"no tar" * 1000), tmp_path)


def test_a_folder_survives_its_way(tmp_path: Path) -> None:
    """What is packed here comes out the same: contents, folders, and who may execute."""
    source = tmp_path / "from"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "run").write_bytes(bytes(range(256)))
    (source / "deep" / "er" / "run").chmod(0o755)
    with trees.packed(source) as file:
        archive = io.BytesIO(b"".join(trees.pieces(file)))
    assert trees.unpack(archive, tmp_path / "to") == []
    arrived = tmp_path / "to" / "deep" / "er" / "run"
    assert arrived.read_bytes() == bytes(range(256))
    assert arrived.stat().st_mode & 0o111
