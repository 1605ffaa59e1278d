"""Image directories of one user: made under a temporary name, sealed, verified, dropped.

    BASE/key                    secret of the seals, root's alone
    BASE/UID/ID/                an image
        *.img, pages-*.img      criu's own files
        memory/PAGEFILE         hard links of the page files that it maps; an inode may serve many images
        pinned/NUMBER           hard links or copies of the library files that the kernel maps
        image.json              what the helper knows of it, sealed
    BASE/UID/.pages/PAGEFILE    checksum of a page file, sealed: computed once, however many images share it

An image is privileged input: it says what a restore makes. So nobody but root can reach it, every small file of it is
covered by the seal, and page files by their checksums. Those take long, hence are computed after the image can be used
already; until then an image counts only as long as the machine that wrote it runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import time

from warmcell.sandbox.helper.problems import HelperError, corrupt, no_room, not_found
from warmcell.sandbox.helper.program import boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

ID = re.compile(r"[a-z0-9]{12}", re.ASCII)
PAGES = re.compile(r"pages-\d+\.img", re.ASCII)
ABOUT, MEMORY, PINNED, RECORDS = "image.json", "memory", "pinned", ".pages"
READ_BYTES = 1 << 20
LOCK_WAIT_S = 30.0


class Shelf:
    """The images of one user."""

    def __init__(self, base: str, uid: int) -> None:
        self.path = f"{base}/{uid}"
        self._uid = uid
        for path in (base, self.path, f"{self.path}/{RECORDS}"):
            _own_directory(path)
        self._key = _key(f"{base}/key")

    def draft(self, image: str) -> Draft:
        """A new image of this id, under a temporary name.

        Raises:
            HelperError: There is one already.
        """
        if os.path.exists(self._path(image)):
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
        """Id, bytes and time of each."""
        listed: list[dict[str, object]] = []
        for name in sorted(os.listdir(self.path)):
            if not ID.fullmatch(name):
                continue
            with contextlib.suppress(OSError):
                created = os.stat(f"{self.path}/{name}").st_mtime
                about = _read_json(f"{self.path}/{name}/{ABOUT}").get("about", {})
                listed.append(
                    {
                        "id": name,
                        "bytes": own_bytes(f"{self.path}/{name}"),
                        "created_at": about.get("created_at", created),
                    }
                )
        return listed

    def drop(self, image: str) -> None:
        """Remove an image, once nobody restores it any more. Idempotent."""
        gone = f"{self.path}/.gone-{image}-{secrets.token_hex(4)}"
        try:
            os.rename(self._path(image), gone)
        except FileNotFoundError:
            return
        with contextlib.suppress(BlockingIOError), locked(gone, exclusive=True):
            self.remove(gone)

    def remove(self, path: str) -> None:
        """Take a directory away, and tell the records of page files that links of them went."""
        memory = f"{path}/{MEMORY}"
        for name in os.listdir(memory) if os.path.isdir(memory) else []:
            self.unlink_pages(f"{memory}/{name}", name)
        shutil.rmtree(path, ignore_errors=True)

    def clean(self) -> None:
        """Remove what operations that were killed have left."""
        for name in os.listdir(self.path):
            if name.startswith((".new-", ".gone-", ".work-")):
                with contextlib.suppress(OSError), locked(f"{self.path}/{name}", exclusive=True, wait_s=0):
                    self.remove(f"{self.path}/{name}")

    def seal(self, about: Mapping[str, Any]) -> str:
        """The seal of what is said, which nobody without the key can make."""
        said = json.dumps(about, sort_keys=True, separators=(",", ":")).encode()
        return hmac.new(self._key, said, hashlib.sha256).hexdigest()

    def sealed(self, path: str) -> dict[str, Any]:
        """What a sealed file says.

        Raises:
            HelperError: Its seal is not ours.
        """
        said = _read_json(path)
        about = said.get("about")
        if not isinstance(about, dict) or not hmac.compare_digest(self.seal(about), str(said.get("seal"))):
            raise corrupt(f"{os.path.basename(path)} is not what was written")
        return about

    def write(self, path: str, about: Mapping[str, Any]) -> None:
        """Write and seal, at once or not at all."""
        made = f"{path}.{secrets.token_hex(4)}"
        with open(made, "x") as file:
            json.dump({"about": about, "seal": self.seal(about)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(made, path)

    def link_pages(self, source: str, target: str, name: str) -> None:
        """Another link of a page file, whose record then knows its new time of change."""
        with self._record(name) as record:
            known = record is not None and record["stat"] == identity(os.stat(source))
            os.link(source, target, follow_symlinks=False)
            if record is not None and known:
                self._write_record(name, {**record, "stat": identity(os.stat(target))})

    def unlink_pages(self, path: str, name: str) -> None:
        """One link of a page file less, and its record with the last of them."""
        with self._record(name) as record:
            found = os.stat(path)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.unlink(path)
                left = os.fstat(fd)
            finally:
                os.close(fd)
            if left.st_nlink == 0:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.path}/{RECORDS}/{name}")
            elif record is not None and record["stat"] == identity(found):
                self._write_record(name, {**record, "stat": identity(left)})

    def verify_pages(self, path: str, name: str, *, written: str) -> None:
        """That a page file is as it was written; reads it only where its inode has changed since that was known.

        Raises:
            HelperError: It is not, or nobody can know: the machine stopped before its checksum was computed.
        """
        with self._record(name) as record:
            now = identity(os.stat(path))
            if record is None:
                if written != boot_id():
                    raise corrupt("the machine stopped before all of it was on disk")
            elif record["stat"] != now:
                if record["sha256"] != checksum(path):
                    raise corrupt(f"the memory in {name} is not what was written")
                self._write_record(name, {**record, "stat": now})

    def learn_pages(self, path: str, name: str) -> None:
        """Compute the checksum of a page file that has none yet, and put it on disk."""
        with self._record(name) as record:
            if record is not None:
                return
        before = identity(os.stat(path))[:3]
        synced(path)
        found = checksum(path)
        with self._record(name) as record:
            now = identity(os.stat(path))
            if record is None and now[:3] == before:
                self._write_record(name, {"name": name, "sha256": found, "stat": now})

    @contextlib.contextmanager
    def _record(self, name: str) -> Iterator[dict[str, Any] | None]:
        """What is known of a page file, locked."""
        lock = os.open(f"{self.path}/{RECORDS}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = f"{self.path}/{RECORDS}/{name}"
            record = self.sealed(path) if os.path.exists(path) else None
            if record is not None and record["name"] != name:
                raise corrupt(f"the record of {name} is that of another")
            yield record
        finally:
            os.close(lock)

    def _write_record(self, name: str, record: Mapping[str, Any]) -> None:
        self.write(f"{self.path}/{RECORDS}/{name}", record)

    def _path(self, image: str) -> str:
        if not ID.fullmatch(image):
            raise HelperError("invalid_request", "That is no id of an image", hint="Ids are twelve letters and digits.")
        return f"{self.path}/{image}"


class Draft:
    """An image that is being made."""

    def __init__(self, shelf: Shelf, image: str) -> None:
        self.image = image
        self.path = f"{shelf.path}/.new-{image}-{secrets.token_hex(4)}"
        self._shelf = shelf
        os.mkdir(self.path, 0o700)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self.fd, fcntl.LOCK_SH)
        for name in (MEMORY, PINNED):
            os.mkdir(f"{self.path}/{name}", 0o700)

    def commit(self, about: Mapping[str, Any]) -> None:
        """Give it its name. It is complete then; its checksums follow by `finish`."""
        files = {}
        for name in sorted(os.listdir(self.path)):
            path = f"{self.path}/{name}"
            if os.path.isdir(path):
                continue
            os.chown(path, 0, 0) if os.getuid() == 0 else None
            if not PAGES.fullmatch(name):
                files[name] = checksum(path)
        said = {
            **about,
            "id": self.image,
            "files": files,
            "plain": sorted(name for name in os.listdir(self.path) if PAGES.fullmatch(name)),
            "memory": sorted(os.listdir(f"{self.path}/{MEMORY}")),
            "boot_id": boot_id(),
            "finished": None,
        }
        self._shelf.write(f"{self.path}/{ABOUT}", said)
        target = f"{self._shelf.path}/{self.image}"
        try:
            os.rename(self.path, target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise HelperError("conflict", f"There is an image {self.image} already") from error
            raise
        self.path = target
        synced(self._shelf.path)

    def finish(self) -> None:
        """Put all of it on disk, and compute the checksums of its memory."""
        path = f"{self.path}/{ABOUT}"
        about = self._shelf.sealed(path)
        for name in about["memory"]:
            self._shelf.learn_pages(f"{self.path}/{MEMORY}/{name}", name)
        finished = {}
        for name in about["plain"]:
            synced(f"{self.path}/{name}")
            finished[name] = [checksum(f"{self.path}/{name}"), identity(os.stat(f"{self.path}/{name}"))]
        for name in about["files"]:
            synced(f"{self.path}/{name}")
        synced(self.path)
        if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
            self._shelf.write(path, {**about, "finished": finished})

    def own_bytes(self) -> int:
        """What it takes on disk by itself."""
        return own_bytes(self.path)

    def versions(self) -> dict[str, str]:
        """What a restore needs to be equal."""
        about = self._shelf.sealed(f"{self.path}/{ABOUT}")
        named = {"engine": about["engine"], "criu": about["criu"], "linux": about["linux"]}
        return {**named, "cpu": " ".join(about["cpu"])}

    def close(self, *, keep: bool) -> None:
        """Let go of it; what has no name yet is removed."""
        if not keep:
            self._shelf.remove(self.path)
        os.close(self.fd)


class Image:
    """An image, held against removal."""

    def __init__(self, shelf: Shelf, image: str) -> None:
        self.path = shelf._path(image)
        self.about: dict[str, Any] = {}
        self._image, self._shelf = image, shelf
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise not_found(image) from None
        fcntl.flock(self.fd, fcntl.LOCK_SH)
        self._hold()

    def _hold(self) -> None:
        """Whoever drops an image renames it first and then waits for this lock."""
        try:
            if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                return
        except FileNotFoundError:
            pass
        os.close(self.fd)
        raise not_found(self._image)

    def verify(self) -> None:
        """Compare everything with what was written.

        Raises:
            HelperError: It differs.
        """
        try:
            about = self._shelf.sealed(f"{self.path}/{ABOUT}")
            if about["id"] != self._image:
                raise corrupt("it is that of another")
            found = {name for name in os.listdir(self.path) if not os.path.isdir(f"{self.path}/{name}")}
            expected = {*about["files"], *about["plain"], ABOUT}
            extra = {name for name in found - expected if not name.startswith(ABOUT)}
            if extra or expected - found or sorted(os.listdir(f"{self.path}/{MEMORY}")) != about["memory"]:
                raise corrupt("files of it are missing, or there are others")
            for name, known in about["files"].items():
                if checksum(f"{self.path}/{name}") != known:
                    raise corrupt(f"{name} is not what was written")
            self._verify_plain(about)
            for name in about["memory"]:
                self._shelf.verify_pages(f"{self.path}/{MEMORY}/{name}", name, written=about["boot_id"])
        except FileNotFoundError as error:
            raise corrupt(f"{os.path.basename(str(error.filename))} is missing") from error
        self.about = about

    def _verify_plain(self, about: dict[str, Any]) -> None:
        if about["finished"] is None:
            if about["boot_id"] != boot_id():
                raise corrupt("the machine stopped before all of it was on disk")
            return
        changed = False
        for name in about["plain"]:
            known, inode = about["finished"][name]
            now = identity(os.stat(f"{self.path}/{name}"))
            if now != inode:
                if checksum(f"{self.path}/{name}") != known:
                    raise corrupt(f"the memory in {name} is not what was written")
                about["finished"][name][1] = now
                changed = True
        if changed:
            self._shelf.write(f"{self.path}/{ABOUT}", about)

    def close(self) -> None:
        """Let it be dropped again."""
        os.close(self.fd)


def own_bytes(path: str) -> int:
    """What a directory takes on disk by itself: files that nothing else links."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(f"{folder}/{name}")
                total += found.st_blocks * 512 if found.st_nlink == 1 else 0
    return total


def checksum(path: str) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(READ_BYTES):
            found.update(data)
    return found.hexdigest()


def identity(found: os.stat_result) -> list[int]:
    """What changes when a file does, or when another comes into its place."""
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def synced(path: str) -> None:
    """Put a file or a directory on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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


def _own_directory(path: str) -> None:
    os.makedirs(path, 0o700, exist_ok=True)
    found = os.lstat(path)
    if found.st_uid != os.getuid() or found.st_mode & 0o170000 != 0o040000:
        raise HelperError("backend_unavailable", f"{path} is not a directory of root's", hint=f"Remove {path}.")
    if found.st_mode & 0o077:
        os.chmod(path, 0o700)


def _key(path: str) -> bytes:
    """The secret of the seals, made once."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    made = f"{path}.{secrets.token_hex(4)}"
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, secrets.token_bytes(32))
        os.fsync(fd)
    finally:
        os.close(fd)
    with contextlib.suppress(FileExistsError):
        os.link(made, path)
    os.unlink(made)
    with open(path, "rb") as file:
        return file.read()


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            said = json.load(file)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise corrupt(f"{os.path.basename(path)} cannot be read")
    return said


def full(error: OSError, where: str) -> HelperError | None:
    """The error for a full disk, if it is that."""
    return no_room(where) if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
