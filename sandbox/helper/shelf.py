"""Image directories of one user: made under a temporary name, sealed, verified, dropped.

    BASE/key                    secret of the seals, root's alone
    BASE/UID/ID/                an image
        *.img, pages-*.img      criu's own files
        memory/PAGEFILE         hard links of the page files that it maps; see `pages`
        pinned/NUMBER           hard links of the library files that the kernel maps, or of copies; see `pins`
        image.json              what the helper knows of it, sealed
    BASE/UID/.pages/            page files, by name
    BASE/UID/.pins/             copies of library files

An image is privileged input: it says what a restore makes. So nobody but root can reach it, every small file of it is
covered by the seal, and memory by checksums. Those take long, hence are computed after the image can be used already;
until then an image counts only as long as the machine that wrote it runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import time

from warmcell.sandbox.helper.pages import LINKS_OF_ONE_IMAGE, Pages
from warmcell.sandbox.helper.pins import Pins
from warmcell.sandbox.helper.problems import HelperError, corrupt, no_room, not_found
from warmcell.sandbox.helper.program import boot_id
from warmcell.sandbox.helper.seals import Seals, checksum, identity, synced, unsealed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from typing import Any

ID = re.compile(r"[a-z0-9]{12}", re.ASCII)
PLAIN = re.compile(r"pages-\d+\.img", re.ASCII)
ABOUT, MEMORY, PINNED, PAGES, PINS = "image.json", "memory", "pinned", ".pages", ".pins"
YOUNG_S = 2.0
"""A directory that was made, or has taken its place, so lately may not be locked yet by whoever made it."""

LOCK_WAIT_S = 30.0
SETTLE_WAIT_S = 600.0


class Shelf:
    """The images of one user."""

    def __init__(self, base: str, uid: int, *, store: str = "") -> None:
        """Make its directories.

        Args:
            base: Directory of all users' images.
            uid: Whose.
            store: Which of the user's stores is asking; new images are of it, and it is told of its own alone.
        """
        self.store = store
        self.path = f"{base}/{uid}"
        for path in (base, self.path, f"{self.path}/{PAGES}", f"{self.path}/{PINS}"):
            _own_directory(path)
        self.seals = Seals(f"{base}/key")
        self.pages = Pages(f"{self.path}/{PAGES}", self.seals)
        self.pins = Pins(f"{self.path}/{PINS}")

    def draft(self, image: str) -> Draft:
        """A new image of this id, under a temporary name.

        Raises:
            HelperError: There is one already.
        """
        if os.path.exists(self.place(image)):
            raise HelperError("conflict", f"There is an image {image} already", hint="Choose another id.")
        return Draft(self, image)

    def open(self, image: str) -> Image:
        """An image that is as it was written; it cannot be dropped until it is closed.

        Raises:
            HelperError: There is none, or it is damaged.
        """
        found = Image(self, image)
        try:
            found.verify()
        except BaseException:
            found.close()
            raise
        return found

    def images(self) -> list[dict[str, object]]:
        """Id, bytes and time of each that is of this store; `shared` is its part of what others have as well.

        `packed` says whether any of its memory is compressed.
        """
        listed: list[dict[str, object]] = []
        copies = self.pins.inodes()
        for name in sorted(os.listdir(self.path)):
            if ID.fullmatch(name):
                with contextlib.suppress(OSError, HelperError):
                    path = f"{self.path}/{name}"
                    about = unsealed(f"{path}/{ABOUT}").get("about", {})
                    if about.get("store", "") != self.store:
                        continue
                    created = about.get("created_at", os.stat(path).st_mtime)
                    own, shared = sizes(path, copies)
                    packed = any(map(self.pages.is_packed, os.listdir(f"{path}/{MEMORY}")))
                    one = {"id": name, "bytes": own, "shared": shared, "created_at": created, "packed": packed}
                    listed.append(one)
        return listed

    def drop(self, image: str) -> None:
        """Remove an image, once nobody restores it any more, or have it not come to be. Idempotent."""
        place = self.place(image)
        drafts = [f"{self.path}/{name}" for name in os.listdir(self.path) if name.startswith(f".new-{image}-")]
        for path in (*drafts, place):  # The image last: a draft may become it meanwhile.
            gone = f"{self.path}/.gone-{image}-{secrets.token_hex(4)}"
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                os.rename(path, gone)
                with locked(gone, exclusive=True, wait_s=LOCK_WAIT_S if path == place else 0.0):
                    self.remove(gone)

    def remove(self, path: str) -> None:
        """Take a directory away."""
        memory = f"{path}/{MEMORY}"
        for name in os.listdir(memory) if os.path.isdir(memory) else []:
            with contextlib.suppress(FileNotFoundError):
                self.pages.take(f"{memory}/{name}", name)
        shutil.rmtree(path, ignore_errors=True)

    def clean(self) -> None:
        """Remove what operations that were killed have left, and memory that nobody maps any more."""
        for name in os.listdir(self.path):
            if name.startswith((".new-", "..new-", ".gone-")):
                with contextlib.suppress(OSError, HelperError):
                    self._remove_left(name)
        self.pages.collect()
        self.pages.spare.expire()
        self.pins.collect()

    def _remove_left(self, name: str) -> None:
        path = f"{self.path}/{name}"
        if not name.startswith(".gone-") and time.time() - os.stat(path).st_ctime < YOUNG_S:
            return
        with contextlib.ExitStack() as held:
            if name.startswith("..new-"):  # Made beside a draft, which it is to replace.
                draft = f"{self.path}/{name.removeprefix('.').removesuffix('.new')}"
                if os.path.exists(draft):
                    held.enter_context(locked(draft, exclusive=True, wait_s=0))
            held.enter_context(locked(path, exclusive=True, wait_s=0))
            self.remove(path)

    def finish(self) -> None:
        """Finish images whose maker was killed before it had computed their checksums."""
        for name in filter(ID.fullmatch, os.listdir(self.path)):
            path = f"{self.path}/{name}"
            with contextlib.suppress(OSError, HelperError), locked(path, exclusive=True, wait_s=0) as fd:
                about = self.seals.read(f"{path}/{ABOUT}")
                if about["finished"] is None and about["boot_id"] == boot_id():
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    _finish(self, path, fd, about)

    def settle(self, image: str) -> None:
        """Return when all of an image is on disk, so that it outlives a loss of power.

        Raises:
            HelperError: There is none, the machine stopped before it was there, or it takes too long.
        """
        path = self.place(image)
        try:
            with locked(path, exclusive=True, wait_s=SETTLE_WAIT_S) as fd:  # Who makes it has the lock until then.
                about = self.seals.read(f"{path}/{ABOUT}")
                if about["finished"] is None:
                    _check_boot(about["boot_id"])
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    _finish(self, path, fd, about)
        except FileNotFoundError:
            raise not_found(image) from None
        except BlockingIOError:
            raise HelperError("timeout", "The image is not on disk yet", details={"timeout": SETTLE_WAIT_S}) from None

    def place(self, image: str) -> str:
        """Where an image of this id is.

        Raises:
            HelperError: That is no id.
        """
        if not ID.fullmatch(image):
            raise HelperError("invalid_request", "That is no id of an image", hint="Ids are twelve letters and digits.")
        return f"{self.path}/{image}"


class Draft:
    """An image that is being made."""

    def __init__(self, shelf: Shelf, image: str) -> None:
        self.image = image
        self.path = f"{shelf.path}/.new-{image}-{secrets.token_hex(4)}"
        self._shelf = shelf
        self._about: dict[str, Any] = {}
        os.mkdir(self.path, 0o700)
        self.fd = -1
        self.reopen()

    def reopen(self) -> None:
        """Take up the directory anew, after another was put into its place."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self.fd, fcntl.LOCK_SH)

    def commit(self, about: Mapping[str, Any], *, old_pages: Mapping[str, int]) -> None:
        """Give it its name; see `seal`."""
        self.seal(about, old_pages=old_pages)
        target = self._shelf.place(self.image)
        try:
            os.rename(self.path, target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise HelperError("conflict", f"There is an image {self.image} already") from error
            raise
        self.path = target

    def seal(self, about: Mapping[str, Any], *, old_pages: Mapping[str, int]) -> None:
        """Say that it is complete; its checksums follow by `finish`.

        Args:
            about: What is to be known of it.
            old_pages: Page files of other images that it maps too.
        """
        memory = f"{self.path}/{MEMORY}"
        for name in os.listdir(memory):
            self._shelf.pages.adopt(f"{memory}/{name}", name)
        for name in old_pages:
            self._shelf.pages.give(name, f"{memory}/{name}")
        files: dict[str, str] = {}
        plain: list[str] = []
        for name in sorted(os.listdir(self.path)):
            path = f"{self.path}/{name}"
            if os.path.isdir(path):
                continue
            os.chown(path, os.geteuid(), os.getegid())
            if PLAIN.fullmatch(name):
                plain.append(name)
            else:
                files[name] = checksum(path)
        said = {"store": self._shelf.store, **about, "id": self.image}
        said |= {"files": files, "plain": plain, "memory": sorted(os.listdir(memory))}
        self._about = {**said, "boot_id": boot_id(), "finished": None}
        self._shelf.seals.write(f"{self.path}/{ABOUT}", self._about, durable=False)

    def finish(self) -> None:
        """Put all of it on disk, and compute the checksums of its memory. Stops when it is dropped meanwhile."""
        _finish(self._shelf, self.path, self.fd, self._about)

    def own_bytes(self) -> int:
        """What it takes on disk by itself."""
        return sizes(self.path, self._shelf.pins.inodes())[0]

    def close(self, *, keep: bool) -> None:
        """Let go of it; what has no name yet is removed."""
        now = os.readlink(f"/proc/self/fd/{self.fd}")
        os.close(self.fd)
        if not keep:
            self._shelf.remove(self.path)
            if os.path.basename(now).startswith(".gone-"):  # It was dropped before it was an image.
                self._shelf.remove(now)


class Image:
    """An image, held against removal."""

    def __init__(self, shelf: Shelf, image: str) -> None:
        self.path = shelf.place(image)
        self.about: dict[str, Any] = {}
        self.packed: tuple[str, ...] = ()
        """Page files that are compressed, once it is verified."""
        self._image, self._shelf = image, shelf
        while True:
            try:
                self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                raise not_found(image) from None
            fcntl.flock(self.fd, fcntl.LOCK_SH)
            # Whoever drops an image renames it first and then waits for this lock; one that was compacted is another.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                    self.path = f"/proc/self/fd/{self.fd}"
                    return
            os.close(self.fd)

    def verify(self) -> None:
        """Compare everything with what was written.

        Raises:
            HelperError: It differs.
        """
        try:
            self.about = self._shelf.seals.read(f"{self.path}/{ABOUT}")
            if self.about["id"] != self._image:
                raise corrupt("it is that of another")
            found = {name for name in os.listdir(self.path) if name not in (MEMORY, PINNED)}
            expected = {*self.about["files"], *self.about["plain"], ABOUT}
            extra = {name for name in found - expected if not name.startswith(ABOUT)}
            if extra or expected - found or sorted(os.listdir(f"{self.path}/{MEMORY}")) != self.about["memory"]:
                raise corrupt("files of it are missing, or there are others")
            for name, known in self.about["files"].items():
                if checksum(f"{self.path}/{name}") != known:
                    raise corrupt(f"{name} is not what was written")
            self._verify_plain()
            self.packed = tuple(
                name
                for name in self.about["memory"]
                if self._shelf.pages.verify(f"{self.path}/{MEMORY}/{name}", name, written=self.about["boot_id"])
            )
        except FileNotFoundError as error:
            raise corrupt(f"{os.path.basename(str(error.filename))} is missing") from error

    def _verify_plain(self) -> None:
        if self.about["finished"] is None:
            _check_boot(self.about["boot_id"])
            return
        changed = False
        for name in self.about["plain"]:
            known, inode = self.about["finished"][name]
            now = identity(os.stat(f"{self.path}/{name}"))
            if now != inode:
                if checksum(f"{self.path}/{name}") != known:
                    raise corrupt(f"the memory in {name} is not what was written")
                self.about["finished"][name][1] = now
                changed = True
        if changed:
            self._shelf.seals.write(f"{self.path}/{ABOUT}", self.about)

    def release(self) -> None:
        """Let it be dropped, though it can be looked at still."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let it be dropped again."""
        os.close(self.fd)


def _check_boot(written: str) -> None:
    """Of an image whose checksums are not known: only the machine's present run has all of it for certain."""
    if written != boot_id():
        raise corrupt("the machine stopped before all of it was on disk")


def _finish(shelf: Shelf, path: str, fd: int, about: Mapping[str, Any]) -> None:
    for name in about["memory"]:
        shelf.pages.learn(name)
    finished: dict[str, list[object]] = {}
    for name in about["plain"]:
        plain = f"/proc/self/fd/{fd}/{name}"
        synced(plain)
        finished[name] = [checksum(plain), identity(os.stat(plain))]
    for name in about["files"]:
        synced(f"{path}/{name}")
    for folder in (MEMORY, PINNED):
        with contextlib.suppress(FileNotFoundError):
            synced(f"{path}/{folder}")
    synced(path)
    if os.path.samestat(os.fstat(fd), os.stat(path)):
        shelf.seals.write(f"{path}/{ABOUT}", {**about, "finished": finished})
        synced(path)
        synced(shelf.path)


def sizes(path: str, copies: Collection[int]) -> tuple[int, int]:
    """What a directory takes on disk by itself, and its equal part of what it shares with other images.

    All parts of all images together are what is on the disk. Links of the machine's own files are in neither.
    """
    own, shared = 0, 0.0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(f"{folder}/{name}")
                taken = found.st_blocks * 512
                ours = os.path.basename(folder) == MEMORY or found.st_ino in copies
                if found.st_nlink <= (LINKS_OF_ONE_IMAGE if ours else 1):
                    own += taken
                elif ours:
                    shared += taken / (found.st_nlink - LINKS_OF_ONE_IMAGE + 1)
    return own, round(shared)


@contextlib.contextmanager
def locked(path: str, *, exclusive: bool, wait_s: float = LOCK_WAIT_S) -> Iterator[int]:
    """Hold the lock of a directory.

    Raises:
        BlockingIOError: Others hold it all the time.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.02)
        yield fd
    finally:
        os.close(fd)


def full(error: OSError, where: str) -> HelperError | None:
    """The error for a full disk, if it is that."""
    return no_room(where) if error.errno in (errno.ENOSPC, errno.EDQUOT) else None


def _own_directory(path: str) -> None:
    os.makedirs(path, 0o700, exist_ok=True)
    found = os.lstat(path)
    if found.st_uid != os.getuid() or found.st_mode & 0o170000 != 0o040000:
        raise HelperError("backend_unavailable", f"{path} is not a directory of root's", hint=f"Remove {path}.")
    if found.st_mode & 0o077:
        os.chmod(path, 0o700)
