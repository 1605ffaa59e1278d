"""An image as one stream, handed out of the helper and taken in. Nothing in it is a path of the host's.

A stream is records: a JSON line each, and behind it as many bytes as it says.

    {"image": FORMAT, "bytes"}                     what is known of the image, as JSON
    {"file": NAME, "size", "mode", "changed_ns"}   a file begins: `NAME.img`, `memory/PAGEFILE` or `pinned/NUMBER`
    {"at": OFFSET, "bytes"}                        data of that file; the rest of it is holes
    {"end": SHA256, "seal"}                        of all before; the seal is the helper's that wrote it

What is taken in comes from anybody. CRIU does as root what an image says, so one that this helper has not itself handed
out to the same user is refused where the operator has not allowed it, and an allowed one is held against the machine
here and against the sandbox's rights at each restore.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

from warmcell.sandbox.helper import packing, restore
from warmcell.sandbox.helper.enter import Cancelled
from warmcell.sandbox.helper.images import contents, lazy
from warmcell.sandbox.helper.images.errors import ImageError
from warmcell.sandbox.helper.problems import HelperError, corrupt
from warmcell.sandbox.helper.program import IMPORTS_VARIABLE
from warmcell.sandbox.helper.seals import checksum
from warmcell.sandbox.helper.shelf import MEMORY, PINNED
from warmcell.sandbox.helper.stream import PIECE_BYTES, In, Out, are_numbers, is_number, is_path, number, segments

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from warmcell.sandbox.helper.shelf import Image, Shelf
    from warmcell.sandbox.helper.wire import Conversation

FORMAT = 1
ABOUT_MAX_BYTES = 16 << 20
SIZE_MAX_BYTES = 1 << 44
FILES_MAX = 100_000
NUMBER_MAX = 1 << 22

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,80}\.img|memory/[a-z0-9]{12}|pinned/[0-9]{1,6}", re.ASCII)


def hand_out(conversation: Conversation, shelf: Shelf, *, image: str) -> None:
    """Send an image to the caller.

    Raises:
        HelperError: There is none, or it is damaged.
        OSError: The caller has gone.
    """
    found = packing.opened(shelf, image)
    try:
        conversation.say({"ok": True, "stream": FORMAT})
        out = Out(conversation.pour)
        _write(out, found)
        total = out.digest()
        seal = shelf.seals.sign({"stream": total, "uid": conversation.uid})
        out.record({"end": total, "seal": seal})
        out.flush()
        conversation.say({"ok": True, "bytes": out.sent_bytes})
    finally:
        found.close()


def take_in(conversation: Conversation, shelf: Shelf, *, image: str, version: str, foreign: bool) -> dict[str, object]:
    """Make an image of what the caller sends; returns what is said to the caller.

    Args:
        conversation: With the caller.
        shelf: Where it goes.
        image: Its id here.
        version: Of the criu that would restore it.
        foreign: Whether one that this helper has not written is taken.

    Raises:
        HelperError: It is no image, does not fit this machine, or is not allowed; nothing is left of it.
        Cancelled: The caller has gone; likewise.
    """
    draft = shelf.draft(image)
    keep = False
    try:
        known, own = _read(In(conversation.piece), shelf, draft.path, version=version, uid=conversation.uid)
        if not (own or foreign):
            raise HelperError(
                "unsupported",
                "This helper takes no images from elsewhere: one decides what root does when it is restored",
                hint=f"If all users are trusted, let root set {IMPORTS_VARIABLE}=1 for the helper.",
            )
        _check(draft.path, known)
        draft.commit(known, old_pages=_shared(shelf, f"{draft.path}/{MEMORY}"))
        keep = True
        draft.finish()
        return {"image_bytes": draft.own_bytes(), "memory_bytes": known["memory_bytes"]}
    except EOFError:
        raise Cancelled from None
    except ImageError as error:
        raise HelperError(error.code, error.message, hint=error.hint) from error
    finally:
        draft.close(keep=keep)


def verify(shelf: Shelf, *, image: str) -> dict[str, object]:
    """Read all of an image and compare it with its sums; returns what is said to the caller.

    Raises:
        HelperError: It is not what was written.
    """
    found = shelf.open(image)
    try:
        finished = found.about["finished"]
        unknown = 0
        for name in found.about["plain"]:
            if finished is None:
                unknown += 1
            elif checksum(f"{found.path}/{name}") != finished[name][0]:
                raise corrupt(f"the memory in {name} is not what was written")
        for name in found.about["memory"]:
            unknown += not shelf.pages.check(f"{found.path}/{MEMORY}/{name}", name)
        return {"files": sum(1 for _ in _files(found)), "bytes": _bytes(found), "unknown": unknown}
    finally:
        found.close()


KNOWN = (
    *("criu", "linux", "cpu", "pid", "pids", "last_pid", "user"),
    *("memory_bytes", "stopped", "open", "pinned", "lazy"),
)
"""What of all that is known of an image goes with it."""


def _write(out: Out, image: Image) -> None:
    about = json.dumps({name: image.about[name] for name in KNOWN}).encode()
    out.record({"image": FORMAT, "bytes": len(about)})
    out.put(about)
    for name in _files(image):
        if not NAME.fullmatch(name):
            raise HelperError("snapshot_failed", f"The image has a file {name!r}, which cannot be handed out")
        fd = os.open(f"{image.path}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            mode = found.st_mode & 0o777
            out.record({"file": name, "size": found.st_size, "mode": mode, "changed_ns": found.st_mtime_ns})
            for begin, end in segments(fd, found.st_size):
                out.record({"at": begin, "bytes": end - begin})
                while begin < end:
                    piece = os.pread(fd, min(PIECE_BYTES, end - begin), begin)
                    if not piece:
                        raise corrupt(f"{name} became shorter while it was read")
                    out.put(piece)
                    begin += len(piece)
        finally:
            os.close(fd)


def _files(image: Image) -> Iterator[str]:
    yield from sorted([*image.about["files"], *image.about["plain"]])
    yield from (f"{MEMORY}/{name}" for name in image.about["memory"])
    yield from (f"{PINNED}/{name}" for name in sorted(os.listdir(f"{image.path}/{PINNED}")))


def _bytes(image: Image) -> int:
    return sum(os.stat(f"{image.path}/{name}").st_blocks * 512 for name in _files(image))


def _read(source: In, shelf: Shelf, path: str, *, version: str, uid: int) -> tuple[dict[str, Any], bool]:
    """Write the files, and say what is known of the image and whether it was this helper that handed it out."""
    first = source.record()
    if first.get("image") != FORMAT:
        raise HelperError(
            "snapshot_incompatible",
            f"The image is of format {first.get('image')!r}, this helper reads {FORMAT}",
            hint="Use the version of Warmcell that made it.",
            details={"what": "format", "expected": FORMAT, "found": str(first.get("image"))},
        )
    known = _known(b"".join(source.take(number(first, "bytes", ABOUT_MAX_BYTES))))
    restore.check_machine(known, version)
    for folder in (MEMORY, PINNED):
        os.mkdir(f"{path}/{folder}", 0o700)
    said = source.record()
    for _ in range(FILES_MAX):
        if "file" not in said:
            break
        said = _read_file(source, said, path)
    total = source.before
    if said.get("end") != total or not source.ended():
        raise corrupt("the stream of the image is not what was written")
    return known, shelf.seals.is_signed({"stream": total, "uid": uid}, said.get("seal"))


def _read_file(source: In, said: dict[str, Any], path: str) -> dict[str, Any]:
    """Write one file; the record that follows it."""
    name, size = said["file"], number(said, "size", SIZE_MAX_BYTES)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise corrupt("the image has a file that no image has")
    try:
        fd = os.open(f"{path}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise corrupt(f"the image has {name} twice") from None
    try:
        end = 0
        while "at" in (part := source.record()):
            at, count = number(part, "at", size), number(part, "bytes", size)
            if at < end or at + count > size:
                raise corrupt(f"parts of {name} do not fit together")
            end = at + count
            for piece in source.take(count):
                os.pwrite(fd, piece, at)
                at += len(piece)
        os.ftruncate(fd, size)
        if "/" in name:
            os.fchmod(fd, number(said, "mode", 0o777))
            changed_ns = number(said, "changed_ns", 1 << 63)
            os.utime(fd, ns=(changed_ns, changed_ns))
        return part
    finally:
        os.close(fd)


def _known(data: bytes) -> dict[str, Any]:
    """What a stream says of its image, if it can be that."""
    try:
        said = json.loads(data)
        found = {name: said[name] for name in KNOWN}
        fits = (
            all(isinstance(found[name], str) for name in ("criu", "linux"))
            and all(isinstance(flag, str) for flag in found["cpu"])
            and all(is_number(found[name], NUMBER_MAX) and found[name] for name in ("pid", "last_pid"))
            and all(is_number(pid, NUMBER_MAX) for name in ("pids", "stopped") for pid in found[name])
            and [is_number(one, 1 << 32) for one in found["user"]] == [True, True]
            and is_number(found["memory_bytes"], SIZE_MAX_BYTES)
            and isinstance(found["lazy"], bool)
            and all(is_path(path) and are_numbers(seen, 2) for path, seen in found["open"].items())
            and all(
                is_path(path) and are_numbers(seen[:3], 3) and re.fullmatch(r"[0-9]{0,6}", seen[3]) and len(seen) == 4
                for path, seen in found["pinned"].items()
            )
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        fits = False
    if not fits:
        raise corrupt("what is said of it cannot be read")
    return {**found, "engine": "criu", "created_at": time.time()}


def _check(path: str, known: dict[str, Any]) -> None:
    """That files and what is said of them belong together."""
    described = contents.describe(Path(path))
    if set(lazy.page_files(Path(path))) != set(os.listdir(f"{path}/{MEMORY}")):
        raise corrupt("it needs other memory than it brings")
    if known["pid"] != described.root_pid:
        raise corrupt("it is of another kernel than it says")
    pinned = {seen[3] for seen in known["pinned"].values()} - {""}
    if not pinned <= set(os.listdir(f"{path}/{PINNED}")):
        raise corrupt("mapped files of it are missing")


def _shared(shelf: Shelf, memory: str) -> dict[str, int]:
    """Page files that are here already, such as those of an earlier snapshot of the same kernel: they are kept once."""
    shared = {}
    for name in os.listdir(memory):
        brought, here = f"{memory}/{name}", shelf.pages.place(name)
        if os.path.exists(here):
            if not shelf.pages.is_same(name, brought):
                raise corrupt(f"its memory {name} is another than the one that is here")
            os.unlink(brought)
            shared[name] = os.stat(here).st_ino
    return shared
