"""Images made by hand, and the memory that a restore of an image would give, read without the code under test."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

PAGE = 4096
PREFIX = "/.warmcell"
MAGICS = {
    "core": 0x55053847,
    "fdinfo": 0x56213732,
    "files": 0x56303138,
    "inventory": 0x58313116,
    "mm": 0x57492820,
    "pagemap": 0x56084025,
    "pstree": 0x50273030,
    "remap-fpath": 0x59133954,
    "seccomp": 0x64413049,
}
REGULAR, HEAP, FILE_PRIVATE, ANON_SHARED, ANON_PRIVATE, GUARD = 1, 1 << 5, 1 << 6, 1 << 8, 1 << 9, 1 << 16
PRESENT, LAZY = 4, 2
UNKNOWN = b"\xa2\x06\x03new"  # field 100, which no version of CRIU has


def number(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def encode(*pairs: tuple[int, int | bytes]) -> bytes:
    out = b""
    for key, value in pairs:
        if isinstance(value, int):
            out += number(key * 8) + number(value)
        else:
            out += number(key * 8 + 2) + number(len(value)) + value
    return out


def decode(data: bytes) -> dict[int, list[int | bytes]]:
    found: dict[int, list[int | bytes]] = {}
    at = 0

    def take() -> int:
        nonlocal at
        value, place = 0, 1
        while True:
            byte = data[at]
            at += 1
            value += byte % 128 * place
            place *= 128
            if byte < 128:
                return value

    while at < len(data):
        tag = take()
        plain = take()
        value: int | bytes = plain
        if tag % 8 == 2:
            value, at = data[at : at + plain], at + plain
        found.setdefault(tag // 8, []).append(value)
    return found


def image_file(kind: str, *messages: bytes) -> bytes:
    head = b"" if kind == "inventory" else struct.pack("<I", 0x54564319)
    head += struct.pack("<I", MAGICS[kind])
    return head + b"".join(struct.pack("<I", len(message)) + message for message in messages)


def messages(path: Path) -> list[bytes]:
    data, found = path.read_bytes(), []
    at = 4 if path.name == "inventory.img" else 8
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return found


@dataclass
class Entry:
    """One entry of a page map: its first page, its pages' content (None: it is not in the page file)."""

    page: int
    count: int
    content: bytes | None
    flags: int = PRESENT


@dataclass
class Vma:
    """One area, in pages."""

    page: int
    count: int
    prot: int = 3
    flags: int = 0x22
    status: int = REGULAR | ANON_PRIVATE
    madv: int = 0
    shmid: int = 0
    pgoff: int = 0

    def message(self) -> bytes:
        pairs: list[tuple[int, int | bytes]] = [
            (1, self.page * PAGE),
            (2, (self.page + self.count) * PAGE),
            (3, self.pgoff),
            (4, self.shmid),
            (5, self.prot),
            (6, self.flags),
            (7, self.status),
            (8, 1),
        ]
        if self.madv:
            pairs.append((9, self.madv))
        return encode(*pairs, (100, b"new"))


@dataclass
class Process:
    """One process of an image."""

    pid: int
    vmas: list[Vma] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


def file_entry(file_id: int, path: str, size: int = 10) -> bytes:
    owner = encode((1, 0), (2, 0), (3, 0), (4, 0), (5, 0))
    reg = encode((1, file_id), (2, 0), (3, 0), (5, owner), (6, path.encode()), (8, size), (10, 0o100644))
    return encode((1, 1), (2, file_id), (3, reg)) + UNKNOWN


def write(image: Path, processes: list[Process], files: list[bytes] | None = None) -> Path:
    """An image directory of these processes, each the child of the one before."""
    image.mkdir()
    (image / "inventory.img").write_bytes(image_file("inventory", encode((1, 2)) + UNKNOWN))
    tree = [
        encode((1, process.pid), (2, processes[index - 1].pid if index else 0), (3, 1), (4, 1), (5, process.pid))
        for index, process in enumerate(processes)
    ]
    (image / "pstree.img").write_bytes(image_file("pstree", *tree))
    (image / "files.img").write_bytes(image_file("files", *(files or [file_entry(1, "/usr/bin/python3")])))
    for index, process in enumerate(processes, start=1):
        mm = encode((1, 4096), (12, 1)) + b"".join(encode((14, vma.message())) for vma in process.vmas) + UNKNOWN
        (image / f"mm-{process.pid}.img").write_bytes(image_file("mm", mm))
        page_map = [
            encode((1, entry.page * PAGE), (2, 0), (4, entry.flags), (5, entry.count)) for entry in process.entries
        ]
        head = encode((1, index))
        (image / f"pagemap-{process.pid}.img").write_bytes(image_file("pagemap", head, *page_map))
        content = b"".join(entry.content for entry in process.entries if entry.content is not None)
        (image / f"pages-{index}.img").write_bytes(content)
    return image


Page = tuple[bytes, tuple[int, ...]]


def memory(image: Path, pid: int) -> dict[int, Page]:
    """What a restore gives: for each page of each area its content, and what the area is but for how it is backed.

    What backs a page counts only where it is a file of the sandbox's and the page is still as it is there.
    """
    names = {}
    for message in messages(image / "files.img"):
        entry = decode(message)
        reg = decode(entry[3][0])  # type: ignore[arg-type]
        names[entry[2][0]] = reg[6][0].decode()  # type: ignore[union-attr]
    found: dict[int, Page] = {}
    of_files: set[int] = set()
    order = 0
    for raw in decode(messages(image / f"mm-{pid}.img")[0])[14]:
        assert isinstance(raw, bytes)
        area = {key: value[0] for key, value in decode(raw).items()}
        start, end, pgoff, status = area[1], area[2], area[3], area[7]
        assert isinstance(start, int)
        assert isinstance(end, int)
        assert isinstance(pgoff, int)
        assert isinstance(status, int)
        assert area[100] == b"new"
        if status & GUARD:
            continue
        assert start >= order, "areas are out of order"
        order = end
        name = names.get(area[4], "") if status & FILE_PRIVATE else ""
        ours = name.startswith(PREFIX)
        access = (area[5], area[6] & ~0x20, area.get(9, 0))  # type: ignore[operator]
        if status & FILE_PRIVATE:
            of_files.update(range(start // PAGE, end // PAGE))
        plain = ours or status & ~HEAP == REGULAR | ANON_PRIVATE
        for address in range(start, end, PAGE):
            kind = () if plain else (status, area[4], pgoff + address - start)
            content = bytes(PAGE)
            if ours:
                with open(image / "memory" / name.rpartition("/")[2], "rb") as file:
                    file.seek(pgoff + address - start)
                    content = file.read(PAGE)
            found[address // PAGE] = (content, (*access, *kind))  # type: ignore[arg-type]
    head, *entries = messages(image / f"pagemap-{pid}.img")
    pages = (image / f"pages-{decode(head)[1][0]!r}.img").read_bytes()
    offset = last = 0
    for message in entries:
        entry = decode(message)
        first, count, flags = entry[1][0], entry[5][0], entry[4][0]
        assert isinstance(first, int)
        assert isinstance(count, int)
        assert isinstance(flags, int)
        assert first >= last, "entries are out of order"
        assert count > 0, "an entry is empty"
        last = first + count * PAGE
        for page in range(first // PAGE, first // PAGE + count):
            if flags & PRESENT:
                how = found[page][1]
                found[page] = (pages[offset : offset + PAGE], how[:3] if page in of_files else how)
                offset += PAGE
            else:
                assert page in found
    return found
