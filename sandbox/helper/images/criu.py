"""CRIU's image files: magic numbers, then messages with their length in front. Field numbers as of CRIU 4.2.

An image of format 1.1 begins with two magic numbers, the inventory with one. Only fields that Warmcell needs are named.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.helper.images.errors import ImageError, corrupt
from warmcell.sandbox.helper.images.protobuf import BYTES, fields, inner, message, numbers, repeated, replaced, varint

PAGE_BYTES = 4096

COMMON_MAGIC = 0x54564319
MAGICS = {
    "core": 0x55053847,
    "fdinfo": 0x56213732,
    "files": 0x56303138,
    "ids": 0x54432030,
    "inventory": 0x58313116,
    "mm": 0x57492820,
    "pagemap": 0x56084025,
    "pstree": 0x50273030,
    "remap-fpath": 0x59133954,
    "seccomp": 0x64413049,
}
IMAGES_V1_1 = 2
_LARGEST_FILE_BYTES = 1 << 30
_U32 = struct.Struct("<I")

# Status bits of an area.
REGULAR, HEAP, FILE_PRIVATE, FILE_SHARED, ANON_PRIVATE = 1 << 0, 1 << 5, 1 << 6, 1 << 7, 1 << 9
MEMFD, GUARD = 1 << 14, 1 << 16
# mmap(2) flags of an area.
MAP_PRIVATE, MAP_ANONYMOUS = 0x02, 0x20
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4

_START, _END, _PGOFF, SHMID, _PROT, _FLAGS, _STATUS, _MADV, _FDFLAGS = 1, 2, 3, 4, 5, 6, 7, 9, 10
_START_TAG, _END_TAG, _PGOFF_TAG = (varint(number << 3) for number in (_START, _END, _PGOFF))
_NO_OFFSET = _PGOFF_TAG + varint(0)
_MM_EXE, _MM_VMAS = 12, 14
FILE_REG = 1


def read(path: Path) -> list[bytes]:
    """The messages of an image file; which kind it is, its name says (`mm-17.img` is of kind `mm`).

    Raises:
        ImageError: The file is missing, cut short, or of another kind.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise corrupt(f"{path.name} is larger than an image file can be")
        data = path.read_bytes()
    except OSError as error:
        raise corrupt(f"{path.name} cannot be read ({error.strerror})") from error
    return messages(data, kind_of(path), name=path.name)


def kind_of(path: Path) -> str:
    """`mm` for `mm-17.img`."""
    stem = path.name.removesuffix(".img")
    return stem if stem in MAGICS else stem.rpartition("-")[0]


def header(kind: str) -> bytes:
    """What a file of this kind begins with."""
    own = _U32.pack(MAGICS[kind])
    return own if kind == "inventory" else _U32.pack(COMMON_MAGIC) + own


def messages(data: bytes, kind: str, *, name: str) -> list[bytes]:
    """Split the bytes of an image file.

    Raises:
        ImageError: It is cut short, or of another kind.
    """
    head = header(kind)
    if not data.startswith(head):
        raise corrupt(f"{name} is no image file of kind {kind}")
    found: list[bytes] = []
    at = len(head)
    while at < len(data):
        body = at + _U32.size
        if body > len(data):
            raise corrupt(f"{name} is cut short")
        at = body + _U32.unpack_from(data, at)[0]
        if at > len(data):
            raise corrupt(f"{name} is cut short")
        found.append(data[body:at])
    return found


def framed(payload: bytes) -> bytes:
    """A message with its length in front."""
    return _U32.pack(len(payload)) + payload


def joined(kind: str, payloads: Iterable[bytes]) -> bytes:
    """The bytes of an image file."""
    return header(kind) + b"".join(map(framed, payloads))


def only(path: Path) -> bytes:
    """The message of a file that holds exactly one.

    Raises:
        ImageError: It holds another number of them.
    """
    found = read(path)
    if len(found) != 1:
        raise corrupt(f"{path.name} holds {len(found)} entries where one belongs")
    return found[0]


def check_inventory(image: Path) -> None:
    """Refuse a dump of an unknown format.

    Raises:
        ImageError: `snapshot_incompatible`, or the inventory is damaged.
    """
    version = numbers(only(image / "inventory.img")).get(1)
    if version != IMAGES_V1_1:
        raise ImageError("snapshot_incompatible", f"the image has format {version}, not {IMAGES_V1_1}")


@dataclass(frozen=True, slots=True)
class Area:
    """One area of an address space as the image describes it. Addresses and `pgoff` in bytes."""

    start: int
    end: int
    pgoff: int
    shmid: int
    prot: int
    flags: int
    status: int
    madv: int
    raw: bytes

    @classmethod
    def from_message(cls, raw: bytes) -> "Area":
        """Read one.

        Raises:
            ImageError: It is damaged, or not made of whole pages.
        """
        found = numbers(raw)
        try:
            area = cls(
                start=found[_START],
                end=found[_END],
                pgoff=found[_PGOFF],
                shmid=found[SHMID],
                prot=found[_PROT],
                flags=found[_FLAGS],
                status=found[_STATUS],
                madv=found.get(_MADV, 0),
                raw=raw,
            )
        except KeyError as missing:
            raise corrupt(f"an area of the image lacks field {missing}") from None
        if area.start >= area.end or (area.start | area.end) % PAGE_BYTES:
            raise corrupt(f"an area of the image is {area.start:#x}-{area.end:#x}")
        return area

    def anonymous(self) -> bytes:
        """What all parts of this anonymous area have in common; `placed` makes the message of one."""
        return replaced(self.raw, {_START: None, _END: None, _PGOFF: None}) + _NO_OFFSET

    def part(self, start: int, end: int) -> bytes:
        """The message of a part of this area that stays what it was."""
        if self.flags & MAP_ANONYMOUS:
            return placed(self.anonymous(), start, end)
        return placed(self.other_mapping(self.shmid), start, end, self.pgoff + start - self.start)

    def mapping(self, file_id: int) -> bytes:
        """What parts of this anonymous area have in common when they are private mappings of a file."""
        values = {
            _START: None,
            _END: None,
            _PGOFF: None,
            SHMID: file_id,
            _FLAGS: self.flags & ~MAP_ANONYMOUS,
            _STATUS: self.status & ~(ANON_PRIVATE | HEAP) | FILE_PRIVATE,
            _FDFLAGS: 0,  # O_RDONLY: writes to a private mapping stay in the process
        }
        return replaced(self.raw, values)

    def other_mapping(self, file_id: int) -> bytes:
        """What parts of this mapping of a file, and its neighbours, have in common when they are of another file."""
        values = {_START: None, _END: None, _PGOFF: None, SHMID: file_id}
        if file_id != self.shmid:
            values[_FDFLAGS] = 0  # Its own file may have been open for writing.
        return replaced(self.raw, values)


def placed(common: bytes, start: int, end: int, offset_bytes: int | None = None) -> bytes:
    """The message of an area from what it has in common with others, its addresses and its offset in the file."""
    place = _START_TAG + varint(start) + _END_TAG + varint(end)
    return place + common if offset_bytes is None else place + _PGOFF_TAG + varint(offset_bytes) + common


def areas(mm: bytes) -> list[Area]:
    """The areas of an `mm` message, in their order: by address, then those that only say where guard pages are.

    Raises:
        ImageError: Damaged, out of order, or overlapping.
    """
    found = [
        Area.from_message(field.value)
        for field in fields(mm)
        if field.number == _MM_VMAS and isinstance(field.value, bytes)
    ]
    last = 0
    for area in found:
        if area.status & GUARD:
            continue
        if area.start < last:
            raise corrupt("the areas of the image are out of order")
        last = area.end
    return found


def with_areas(mm: bytes, new: Iterable[bytes]) -> bytes:
    """`mm` with the areas `new` in place of its own; all else is kept byte for byte."""
    block = b"".join(b"%c%b%b" % (_MM_VMAS << 3 | BYTES, varint(len(raw)), raw) for raw in new)
    parts: list[bytes] = []
    placed = False
    for field in fields(mm):
        if field.number != _MM_VMAS:
            parts.append(mm[field.start : field.end])
        elif not placed:
            parts.append(block)
            placed = True
    return b"".join(parts if placed else [*parts, block])


def executable_id(mm: bytes) -> int:
    """The file id of the program."""
    return numbers(mm).get(_MM_EXE, 0)


@dataclass(frozen=True, slots=True)
class RegularFile:
    """A regular file that is open or mapped."""

    id: int
    path: str
    flags: int
    size_bytes: int | None
    mode: int | None


def file_entries(image: Path) -> list[bytes]:
    """The messages of `files.img`."""
    return read(image / "files.img")


def entry_id(entry: bytes) -> int:
    """The id under which areas and descriptors name a file entry."""
    return numbers(entry).get(2, 0)


def regular_file(entry: bytes) -> RegularFile | None:
    """The regular file of a file entry, None where it is something else.

    Raises:
        ImageError: It is damaged.
    """
    reg = inner(entry, 3)
    if numbers(entry).get(1) != FILE_REG or reg is None:
        return None
    found, name = numbers(reg), inner(reg, 6)
    if name is None:
        raise corrupt("a file of the image has no name")
    return RegularFile(
        entry_id(entry), name.decode(errors="surrogateescape"), found.get(2, 0), found.get(8), found.get(10)
    )


def renumbered(entry: bytes, new_id: int) -> bytes:
    """The same file under another id."""
    return replaced(entry, {2: new_id, 3: replaced(inner(entry, 3) or b"", {1: new_id})})


def new_regular_file(file: RegularFile) -> bytes:
    """A file entry, opened read-only at its begin, owned by nobody's signals."""
    nobody = message({1: 0, 2: 0, 3: 0, 4: 0, 5: 0})
    reg: dict[int, int | bytes] = {1: file.id, 2: file.flags, 3: 0, 5: nobody, 6: file.path.encode()}
    if file.size_bytes is not None:
        reg[8] = file.size_bytes
    if file.mode is not None:
        reg[10] = file.mode
    return message({1: FILE_REG, 2: file.id, 3: message(reg)})


@dataclass(frozen=True, slots=True)
class Task:
    """One process of the tree; ids as the process sees them."""

    pid: int
    parent: int
    threads: tuple[int, ...]


def tasks(image: Path) -> list[Task]:
    """The process tree, root first.

    Raises:
        ImageError: There is none, or it is damaged.
    """
    found = []
    for entry in read(image / "pstree.img"):
        plain = numbers(entry)
        if 1 not in plain or 2 not in plain:
            raise corrupt("pstree.img holds a process without an id")
        found.append(Task(plain[1], plain[2], tuple(repeated(entry, 5))))
    if not found:
        raise corrupt("pstree.img holds no process")
    return found
