"""What is in an image, and the rights of its tasks."""

from pathlib import Path

import pytest

from tests.unit.sandbox.helper.made_images import (
    FILE_PRIVATE,
    REGULAR,
    Entry,
    Process,
    Vma,
    encode,
    file_entry,
    image_file,
    write,
)
from warmcell.sandbox.helper.images.contents import describe
from warmcell.sandbox.helper.images.credentials import check
from warmcell.sandbox.helper.images.errors import ImageError

PAGE = 4096
UID, GID = 100_000, 100_001
Creds = dict[int, int | list[int]]


def creds(**changes: int | list[int]) -> bytes:
    """The credentials of a kernel, or worse."""
    plain: dict[str, int | list[int]] = {
        "uid": UID,
        "gid": GID,
        "euid": UID,
        "egid": GID,
        "suid": UID,
        "sgid": GID,
        "fsuid": UID,
        "fsgid": GID,
        "cap_inh": [0, 0],
        "cap_prm": [0, 0],
        "cap_eff": [0, 0],
        "cap_bnd": [0, 0],
        "secbits": 0,
        "groups": [GID],
        "no_new_privs": 1,
        "cap_amb": [0, 0],
    }
    numbers = dict(zip(plain, [*range(1, 15), 18, 19], strict=True))
    found = plain | changes
    pairs = [
        (numbers[name], number)
        for name, value in found.items()
        for number in (value if isinstance(value, list) else [value])
    ]
    return encode(*pairs)


def core(rights: bytes | None, *, mode: int | None = 2, chain: int = 0, state: int = 1) -> bytes:
    """A task or thread."""
    thread = encode((1, 0), (2, 24))
    if rights is not None:
        thread += encode((10, rights))
    if mode is not None:
        thread += encode((11, mode), (12, chain))
    task = encode((1, state), (2, 0), (3, 0), (4, 0), (5, 0), (6, b"python"))
    return image_file("core", encode((1, 1), (3, task), (5, thread)))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """One process with two threads, all as they should be; the second thread gets its filter from the first."""
    made = write(tmp_path / "image", [Process(7, [Vma(1000, 4)], [Entry(1000, 1, bytes(PAGE))])])
    tree = encode((1, 7), (2, 0), (3, 7), (4, 7), (5, 7), (5, 8))
    (made / "pstree.img").write_bytes(image_file("pstree", tree))
    (made / "core-7.img").write_bytes(core(creds()))
    (made / "core-8.img").write_bytes(core(creds(), mode=None))
    (made / "seccomp.img").write_bytes(image_file("seccomp", encode((1, encode((1, b"\6" * 8), (3, 1))))))
    return made


def checked(image: Path) -> None:
    check(image, uid=UID, gid=GID, groups=(GID, 44))


def test_a_kernel_may_be_restored(image: Path) -> None:
    """Its own uid and gid, no capabilities, no way to more, a filter; some of its groups or all."""
    checked(image)
    (image / "core-7.img").write_bytes(core(creds(groups=[44])))
    checked(image)


@pytest.mark.parametrize("task", [7, 8])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"uid": 0}, "uid 0 where 100000 belongs"),
        ({"euid": 0}, "euid 0"),
        ({"suid": 0}, "suid 0"),
        ({"fsuid": 0}, "fsuid 0"),
        ({"gid": 0}, "gid 0 where 100001 belongs"),
        ({"fsgid": 0}, "fsgid 0"),
        ({"groups": [GID, 0]}, r"the groups \[0\]"),
        ({"cap_inh": [0, 1]}, "inheritable capabilities 0x0, 0x1"),
        ({"cap_prm": [1, 0]}, "permitted capabilities"),
        ({"cap_eff": [1, 0]}, "effective capabilities"),
        ({"cap_bnd": [1 << 21, 0]}, "bounding capabilities"),
        ({"cap_amb": [0, 4]}, "ambient capabilities"),
        ({"no_new_privs": 0}, "no no_new_privs"),
    ],
)
def test_any_right_of_any_thread_is_refused(image: Path, task: int, changes: Creds, said: str) -> None:
    """The message names who has what."""
    mode = 2 if task == 7 else None
    (image / f"core-{task}.img").write_bytes(core(creds(**changes), mode=mode))  # type: ignore[arg-type]
    who = "task 7" if task == 7 else "thread 8 of task 7"
    with pytest.raises(ImageError, match=f"^{who} of the image has {said}") as caught:
        checked(image)
    assert caught.value.code == "snapshot_corrupt"


@pytest.mark.parametrize(
    ("task", "mode", "chain"), [(7, 0, 0), (7, 1, 0), (7, None, 0), (7, 2, 1), (8, 0, 0), (8, 2, 9), (8, 1, 0)]
)
def test_a_thread_without_filter_is_refused(image: Path, task: int, mode: int | None, chain: int) -> None:
    """None at all, another mode, or one that the image does not hold. (Mode 0 of thread 8 is the first one's.)"""
    (image / f"core-{task}.img").write_bytes(core(creds(), mode=mode, chain=chain))
    if (task, mode) == (8, 0):
        checked(image)
        return
    with pytest.raises(ImageError, match="no seccomp filter in force"):
        checked(image)
    check(image, uid=UID, gid=GID, groups=(), seccomp=False)


def test_a_filter_that_is_not_for_all_threads_does_not_count_for_the_others(image: Path) -> None:
    """Unless CRIU would set it for all at once, each thread needs its own."""
    (image / "seccomp.img").write_bytes(image_file("seccomp", encode((1, encode((1, b"\6" * 8))))))
    with pytest.raises(ImageError, match="thread 8 of task 7 of the image has no seccomp filter"):
        checked(image)
    (image / "seccomp.img").unlink()
    with pytest.raises(ImageError, match=r"^task 7 of the image has no seccomp filter"):
        checked(image)


def test_what_is_missing_is_refused(image: Path) -> None:
    """No credentials, or no image of a thread at all."""
    (image / "core-8.img").write_bytes(core(None))
    with pytest.raises(ImageError, match="has no credentials"):
        checked(image)
    (image / "core-8.img").unlink()
    with pytest.raises(ImageError, match=r"core-8\.img cannot be read"):
        checked(image)


def test_a_zombie_has_no_rights(image: Path) -> None:
    """It runs nothing any more, and CRIU writes no credentials for it."""
    for thread in (9, 0, 2323739184):  # CRIU 4.2 writes anything for the thread of such a process.
        tree = [encode((1, 7), (2, 0), (3, 7), (4, 7), (5, 7)), encode((1, 9), (2, 7), (3, 7), (4, 7), (5, thread))]
        (image / "pstree.img").write_bytes(image_file("pstree", *tree))
        for state in (2, 6):
            (image / "core-9.img").write_bytes(core(None, state=state))
            checked(image)
        (image / "core-9.img").write_bytes(core(None, state=1))
        with pytest.raises(ImageError, match="task 9 of the image has no credentials"):
            checked(image)


def test_files_that_an_image_needs(tmp_path: Path) -> None:
    """Program, libraries, data, open files: each once, with what it is used for."""
    files = [
        file_entry(1, "/usr/bin/python3"),
        file_entry(2, "/usr/lib/libz.so", 30),
        file_entry(3, "/home/data", 40),
        file_entry(4, "/home/log"),
        file_entry(5, "/home/log"),
        file_entry(6, "/.warmcell/k3v9x0c2m1ab"),
        file_entry(7, "/nobody/needs/it"),
        file_entry(8, "/tmp/gone"),
    ]
    vmas = [
        Vma(1000, 1, flags=2, status=REGULAR | FILE_PRIVATE, shmid=2, prot=5),
        Vma(1001, 1, flags=1, status=REGULAR | 1 << 7, shmid=3),
        Vma(1010, 1, flags=2, status=REGULAR | FILE_PRIVATE, shmid=6),
        Vma(1020, 1),
    ]
    made = write(tmp_path / "image", [Process(7, vmas, [Entry(1020, 1, bytes(PAGE))])], files)
    open_files = [encode((1, number), (2, 0), (3, 1), (4, number)) for number in (4, 5, 8)]
    (made / "fdinfo-2.img").write_bytes(image_file("fdinfo", *open_files))
    (made / "remap-fpath.img").write_bytes(image_file("remap-fpath", encode((1, 8), (2, 1), (3, 1))))
    found = describe(made)
    assert (found.root_pid, found.pids, found.thread_ids) == (7, (7,), (7,))
    assert (found.page_files, found.copied_bytes) == (("k3v9x0c2m1ab",), PAGE)
    by_path = {file.path: file for file in found.files}
    assert set(by_path) == {"/usr/bin/python3", "/usr/lib/libz.so", "/home/data", "/home/log", "/tmp/gone"}
    assert {path for path, file in by_path.items() if file.executable} == {"/usr/bin/python3", "/usr/lib/libz.so"}
    assert {path for path, file in by_path.items() if file.pinned} == {"/usr/bin/python3", "/usr/lib/libz.so"}
    assert by_path["/usr/lib/libz.so"].size_bytes == 30
    assert by_path["/home/data"].shared
    assert by_path["/home/log"].open_flags == (0, 0)
    assert by_path["/tmp/gone"].unlinked
