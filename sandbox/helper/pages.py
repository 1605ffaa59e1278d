"""Page files of one user: memory that is mapped, not copied, by any number of images and of running kernels.

    .pages/NAME         a link of its own, for CRIU cannot save a kernel again whose page file has no name any more
    .pages/NAME.json    its checksum, sealed; computed once, however many images share the file
    .pages/NAME.stat    its inode as it was when that was right, sealed: a hint that spares to read all of it again
    .pages/.spare       one that has gone, and is written over by the next dump; see `spare`

A page file never changes while it is one. It goes when no image links it and no sandbox has it mounted.

Of cold ones there is a compressed form (`packing`), which is what all links are of then. Which of the two a file is of
tells its record, which has the compressed one's inode and sum as well. The change is one of the link that is kept here;
images whose links were not changed any more, as whoever did it was killed, have that made up for when they are opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from warmcell.sandbox.helper.criu import DOOR
from warmcell.sandbox.helper.images.lazy import TAIL_BYTES
from warmcell.sandbox.helper.problems import HelperError, corrupt
from warmcell.sandbox.helper.program import boot_id
from warmcell.sandbox.helper.seals import checksum, identity, synced
from warmcell.sandbox.helper.spare import Spare

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from typing import Any

    from warmcell.sandbox.helper.seals import Seals

LINKS_OF_ONE_IMAGE = 2
"""Its own, and the one that is kept here."""
PACKED = "packed"
NEW_LINK = ".link-"


class Pages:
    """The page files below one directory."""

    def __init__(self, path: str, seals: Seals) -> None:
        self._path, self._seals = path, seals
        self.spare = Spare(path)

    def place(self, name: str) -> str:
        """Where a file is, as long as anybody needs it."""
        return f"{self._path}/{name}"

    def adopt(self, path: str, name: str) -> None:
        """Keep a file that an image has brought."""
        with self._locked():
            os.link(path, f"{self._path}/{name}", follow_symlinks=False)

    def require(self, name: str, inode: int) -> None:
        """That the file which a kernel maps is here.

        Raises:
            HelperError: It is not.
        """
        with contextlib.suppress(OSError):
            if os.stat(f"{self._path}/{name}").st_ino == inode:
                return
        raise HelperError(
            "snapshot_failed",
            "The memory that this kernel was restored from is no longer kept",
            hint="Start the kernel anew; then it can be saved again.",
            details={"pages": name},
        )

    def give(self, name: str, target: str) -> None:
        """Link a file into an image."""
        with self._locked():
            self._relink(name, lambda: os.link(f"{self._path}/{name}", target, follow_symlinks=False))

    def take(self, path: str, name: str) -> None:
        """One link of an image less, whatever is known of the file."""
        with self._locked():
            self._relink(name, lambda: os.unlink(path))

    def verify(self, path: str, name: str, *, written: str) -> bool:
        """That an image's link is of the file as it was written. Reads it only where its inode has changed since.

        Args:
            path: The image's link.
            name: Of the file.
            written: The boot in which the image was made.

        Returns:
            Whether it is compressed.

        Raises:
            HelperError: It is not; or the machine stopped before its checksum was computed, so nobody can know.
        """
        with self._record(name) as record:
            found = os.stat(path)
            own = f"{self._path}/{name}"
            if not os.path.exists(own):
                os.link(path, own)
                found = os.stat(path)
            elif not os.path.samestat(found, os.stat(own)):
                if record is None or PACKED not in record:
                    raise corrupt(f"{name} is another file than was written")
                _replace(path, own, spare=f"{self._path}/{NEW_LINK}{name}")
                found = os.stat(path)
            if record is None:
                if written != boot_id():
                    raise corrupt("the machine stopped before all of it was on disk")
            elif self._seen(name) != identity(found):
                _compare(record, path, name)
                self._see(name, found)
            return _is_packed(record, found)

    def learn(self, name: str) -> None:
        """Put a file on disk and compute its checksum, once."""
        path = f"{self._path}/{name}"
        with self._record(name) as record:
            if record is not None:
                return
        before = identity(os.stat(path))[:3]
        synced(path)
        found = _checksum(path)
        with self._record(name) as record:
            now = identity(os.stat(path))
            if record is None and now[:3] == before:
                self._seals.write(f"{path}.json", {"name": name, "sha256": found})
                synced(self._path)
                self._see(name, os.stat(path))

    def check(self, path: str, name: str) -> bool:
        """Read all of an image's link of a file and compare its checksum; False where that is not known yet.

        Raises:
            HelperError: It is not what was written.
        """
        with self._record(name) as record:
            known = record
        if known is not None:
            _compare(known, path, name)
        return known is not None

    def is_packed(self, name: str) -> bool:
        """Whether a file is compressed."""
        with contextlib.suppress(FileNotFoundError, HelperError), self._record(name) as record:
            return _is_packed(record, os.stat(f"{self._path}/{name}"))
        return False

    def is_same(self, name: str, path: str) -> bool:
        """Whether another file has the content of this one, in whichever form this one is."""
        with self._record(name) as record:
            known = record
        own = f"{self._path}/{name}"
        return (_checksum(own) if known is None else known["sha256"]) == _checksum(path)

    def known(self, name: str) -> tuple[int, str]:
        """Size and SHA-256 of a file when it is not compressed.

        Raises:
            HelperError: Its checksum is not there yet.
        """
        with self._record(name) as record:
            if record is None:
                raise HelperError(
                    "conflict", "Not all of the snapshot is on the disk yet", hint="Try again in a minute."
                )
            size, _, sha256 = record["sha256"].partition(" ")
        return int(size), sha256

    def change_form(self, name: str, new: str, *, images: Collection[str], packed_sha256: str = "") -> bool:
        """Put a file's other form in its place, here and in all images; False if somebody else uses it as well.

        Whoever calls it holds the images. It counts from the moment in which the link here is of the new one.

        Args:
            name: Of the file.
            new: The other form, complete and on disk; this name of it goes.
            images: The links of images.
            packed_sha256: Of the other form, if that is the compressed one.
        """
        own = f"{self._path}/{name}"
        with self._record(name) as record:
            assert record is not None
            about = {one: said for one, said in record.items() if one != PACKED}
            if packed_sha256:
                if os.stat(own).st_nlink != 1 + len(images):
                    return False
                about[PACKED] = {"sha256": packed_sha256, "file": identity(os.stat(new))[:3]}
                self._seals.write(f"{own}.json", {**record, PACKED: about[PACKED]})
                synced(self._path)
            for link in (own, *images):
                with contextlib.suppress(FileNotFoundError):  # It was dropped meanwhile.
                    if link == own or os.path.lexists(link):
                        _replace(link, new, spare=f"{self._path}/{NEW_LINK}{name}")
            os.unlink(new)
            self._seals.write(f"{own}.json", about)
            synced(self._path)
            self._see(name, os.stat(own))
        return True

    def mounted(self, names: Collection[str]) -> bool:
        """Whether a sandbox of this machine has any of them."""
        return not _mounted().isdisjoint(names)

    def renew_spare(self) -> None:
        """Keep one file that nobody needs, to be written over. Removes none: that takes long where they are large."""
        for path in self._idle():
            if self._keep_spare(path):
                _forget(path)
                return

    def collect(self) -> None:
        """Remove what no image links and no sandbox has mounted."""
        found = os.listdir(self._path)
        for name in found:
            if name.startswith(NEW_LINK):
                with self._locked():
                    _unlink(f"{self._path}/{name}")
        for path in self._idle():
            if not self._keep_spare(path):
                os.unlink(path)
            _forget(path)
        for name in found:
            if not name.startswith(".") and name.count(".") > 1:  # Begun by somebody who was killed.
                with self._locked():
                    _unlink(f"{self._path}/{name}")

    def _idle(self) -> Iterator[str]:
        """Files that no image links and no sandbox has mounted, each locked as long as it is looked at."""
        idle = [name for name in os.listdir(self._path) if "." not in name and self._links(name) == 1]
        mounted = _mounted() if idle else set()
        for name in idle:
            with self._locked():
                if name not in mounted and self._links(name) == 1:
                    yield f"{self._path}/{name}"

    def _keep_spare(self, path: str) -> bool:
        return self.spare.keep(path, length_bytes=summed_bytes(os.stat(path).st_size))

    def _links(self, name: str) -> int:
        """How many there are of a file, which may have gone."""
        with contextlib.suppress(FileNotFoundError):
            return os.stat(f"{self._path}/{name}").st_nlink
        return 0

    def _relink(self, name: str, change: Callable[[], None]) -> None:
        """Change how many links there are, which changes the inode, and write that down if it was known before."""
        own = f"{self._path}/{name}"
        known = os.path.lexists(own) and self._seen(name) == identity(os.stat(own))
        change()
        if known:
            self._see(name, os.stat(own))

    def _seen(self, name: str) -> list[int] | None:
        """The inode of a file for which its checksum was right, if that is known."""
        with contextlib.suppress(FileNotFoundError, HelperError):
            said = self._seals.read(f"{self._path}/{name}.stat")
            if said["name"] == name:
                return list(said["stat"])
        return None

    def _see(self, name: str, found: os.stat_result) -> None:
        """Note it down. Not worth the wait for the disk: who finds nothing reads the file."""
        self._seals.write(f"{self._path}/{name}.stat", {"name": name, "stat": identity(found)}, durable=False)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def _record(self, name: str) -> Iterator[dict[str, Any] | None]:
        """What is known of a file, locked."""
        with self._locked():
            record = None
            with contextlib.suppress(FileNotFoundError):
                record = self._seals.read(f"{self._path}/{name}.json")
            if record is not None and record["name"] != name:
                raise corrupt(f"the record of {name} is that of another")
            yield record


def _is_packed(record: Mapping[str, Any] | None, found: os.stat_result) -> bool:
    return record is not None and PACKED in record and record[PACKED]["file"] == identity(found)[:3]


def _compare(record: Mapping[str, Any], path: str, name: str) -> None:
    """That a file is what was written, in whichever form it is."""
    if _is_packed(record, os.stat(path)):
        same = record[PACKED]["sha256"] == checksum(path)
    else:
        same = record["sha256"] == _checksum(path)
    if not same:
        raise corrupt(f"the memory in {name} is not what was written")


def _replace(link: str, by: str, *, spare: str) -> None:
    """Let a name be a link of another file."""
    _unlink(spare)
    os.link(by, spare)
    try:
        os.rename(spare, link)
    finally:
        _unlink(spare)  # It is there still if the link was one of that file already.


def _checksum(path: str) -> str:
    """Of what was dumped; behind it the file is only long, so that a mapping may grow."""
    size = os.stat(path).st_size
    return f"{size} {checksum(path, length_bytes=summed_bytes(size))}"


def summed_bytes(size: int) -> int:
    """How much of a page file of this size has anything in it."""
    return size - TAIL_BYTES if size > TAIL_BYTES else size


def _forget(path: str) -> None:
    """What was known of a page file that is gone."""
    for known in (".json", ".stat"):
        _unlink(f"{path}{known}")


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _mounted() -> set[str]:
    """Names of the page files that are mounted in any sandbox of this machine."""
    seen: set[str] = set()
    names: set[str] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            with open(f"/proc/{pid}/mountinfo", errors="surrogateescape") as file:
                places = [line.split(maxsplit=5)[4] for line in file]
            seen.add(namespace)
            names.update(place[len(DOOR) + 1 :] for place in places if place.startswith(f"{DOOR}/"))
    return names
