"""A writable layer as a tar stream and back: exact to the nanosecond, the hole and the attribute.

What tar has no field for stands in a header of ours, `WARMCELL.entry`, so that any tar can still list what there is and
take files out. Names are any bytes and come from a guest; what is read may come from anybody. Everything here blocks.
"""

import contextlib
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from warmcell.sandbox.errors import WarmcellError
from warmcell.sandbox.snapshots import listing
from warmcell.sandbox.snapshots.contents import opened, segments
from warmcell.sandbox.snapshots.manifest import corrupt
from warmcell.sandbox.wire import Wire

HEADER = "WARMCELL.entry"
PIECE = 2**20
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)

_KEPT_ATTRIBUTES = ("user.", "trusted.overlay.")
"""Those that are taken from an archive of unknown origin: a capability of a file is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Wire):
    """What one entry of a layer is."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int = 0
    segments: tuple[tuple[int, ...], ...] = ()
    """Begin and end of its data; the member's content is these one after the other."""
    target: str = ""
    device: int = 0
    attributes: dict[str, str]


def pack(layer: Path, prefix: str) -> Iterator[bytes]:
    """The entries of a layer as tar members below `prefix`."""
    skip = len(os.fsencode(layer)) + 1
    for path, found in listing.walk(layer):
        name = prefix + os.fsdecode(path[skip:])
        if stat.S_ISREG(found.st_mode):
            with opened(path) as descriptor:
                parts = tuple(segments(descriptor, found.st_size))
                total = sum(end - begin for begin, end in parts)
                yield header(name, total, _entry(path, found, parts))
                for begin, end in parts:
                    yield from _read(descriptor, begin, end)
            yield padding(total)
        else:
            yield header(name, 0, _entry(path, found, ()))


def header(name: str, size: int, entry: Entry | None = None) -> bytes:
    """The header of one member with `size` bytes of content."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    if entry is not None:
        member.mode = stat.S_IMODE(entry.mode)
        member.mtime = entry.mtime_ns // 10**9
        member.pax_headers = {HEADER: json.dumps(entry.to_json())}
        if stat.S_ISDIR(entry.mode):
            member.type = tarfile.DIRTYPE
        elif stat.S_ISLNK(entry.mode):
            member.type, member.linkname = tarfile.SYMTYPE, entry.target
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding(size: int) -> bytes:
    """What fills up the last block of a member's content."""
    return bytes(-size % BLOCK)


class Unpacker:
    """Puts members into an empty directory, which nobody else writes to, and nowhere else."""

    def __init__(self, layer: Path, *, ours: bool) -> None:
        """`ours`: we packed it ourselves on this machine, so owners and all attributes are set as they were."""
        self._layer = layer
        self._ours = ours
        self._directories: dict[str, Entry | None] = {"": None}

    def put(self, name: str, member: tarfile.TarInfo, content: IO[bytes] | None) -> None:
        """Make one entry.

        Raises:
            SnapshotCorruptError: No layer can have such an entry.
            OSError: The disk does not take it.
        """
        parent = name.rpartition("/")[0]
        odd = "\0" in name or any(part in {"", ".", ".."} for part in name.split("/"))  # "/x" is of two parts.
        # A directory that we made ourselves cannot be a link to elsewhere.
        if odd or parent not in self._directories:
            raise corrupt(f"The archive has an entry {name!r}, which no layer has")
        entry = _read_entry(member, name)
        path = self._layer / name
        try:
            self._make(path, name, entry, content)
            if not stat.S_ISDIR(entry.mode):
                self._dress(path, entry)
        except FileExistsError as error:
            raise corrupt(f"The archive has two entries {name!r}") from error
        except (ValueError, OverflowError) as error:
            raise corrupt(f"The archive says of {name!r} what cannot be: {error}") from error

    def finish(self) -> None:
        """Give directories their modes and times, which what was put into them has changed."""
        try:
            for name, entry in reversed(self._directories.items()):
                if entry is not None:
                    self._dress(self._layer / name, entry)
        except (ValueError, OverflowError) as error:
            raise corrupt(f"The archive says of a directory what cannot be: {error}") from error

    def _make(self, path: Path, name: str, entry: Entry, content: IO[bytes] | None) -> None:
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFDIR:
            path.mkdir(mode=0o700)
            self._directories[name] = entry
        elif kind == stat.S_IFLNK:
            os.symlink(entry.target, path)
        elif kind == stat.S_IFREG and content is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(path, flags, 0o600), "wb") as file:
                _fill(file, entry, content, name)
        elif kind in {stat.S_IFIFO, stat.S_IFSOCK} or (kind == stat.S_IFCHR and entry.device == 0):
            os.mknod(path, kind | 0o600, 0)
        else:
            raise corrupt(f"The archive has a device {name!r}")

    def _dress(self, path: Path, entry: Entry) -> None:
        if entry.uid != os.getuid() or entry.gid != os.getgid():
            # Only root can give files away; an ordinary user's kernel made none that are somebody else's.
            with contextlib.suppress(PermissionError):
                os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
        for name, value in entry.attributes.items():
            if self._ours or name.startswith(_KEPT_ATTRIBUTES):
                with contextlib.suppress(OSError):  # What this file system does not take, the check after it finds.
                    os.setxattr(path, name, bytes.fromhex(value), follow_symlinks=False)
        if not stat.S_ISLNK(entry.mode):
            path.chmod(stat.S_IMODE(entry.mode))
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)


def _entry(path: bytes, found: os.stat_result, parts: tuple[tuple[int, int], ...]) -> Entry:
    mode = found.st_mode
    return Entry(
        mode=mode,
        uid=found.st_uid,
        gid=found.st_gid,
        mtime_ns=found.st_mtime_ns,
        size=found.st_size if stat.S_ISREG(mode) else 0,
        segments=parts,
        target=os.fsdecode(os.readlink(path)) if stat.S_ISLNK(mode) else "",
        device=found.st_rdev,
        attributes=listing.attributes(path),
    )


def _read_entry(member: tarfile.TarInfo, name: str) -> Entry:
    try:
        entry = Entry.from_json(json.loads(member.pax_headers[HEADER]))
    except (KeyError, ValueError, RecursionError, WarmcellError) as error:
        raise corrupt(f"The archive says nothing of {name!r} that can be read") from error
    at = 0
    for part in entry.segments:
        if len(part) != 2 or not at <= part[0] < part[1] <= entry.size:
            raise corrupt(f"The archive has parts of {name!r} that do not fit together")
        at = part[1]
    if sum(end - begin for begin, end in entry.segments) != member.size:
        raise corrupt(f"The archive has another length of {name!r} than it says")
    return entry


def _fill(file: IO[bytes], entry: Entry, content: IO[bytes], name: str) -> None:
    for begin, end in entry.segments:
        file.seek(begin)
        left = end - begin
        while left:
            piece = content.read(min(left, PIECE))
            if not piece:
                raise corrupt(f"The archive ends within {name!r}")
            file.write(piece)
            left -= len(piece)
    file.truncate(entry.size)


def _read(descriptor: int, begin: int, end: int) -> Iterator[bytes]:
    while begin < end:
        piece = os.pread(descriptor, min(end - begin, PIECE), begin)
        if not piece:
            raise corrupt("A file of the layer became shorter while it was read")
        yield piece
        begin += len(piece)
