"""A whole kernel in a file: out of one keeper, into another, and what becomes of archives that are not whole."""

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.server import end_keeper
from tests.integration.snapshots.boxes import boxes_of
from tests.integration.snapshots.notebooks import keeper, notebook
from tests.leaks import Places, own_places
from warmcell.sandbox.errors import SnapshotCorruptError, SnapshotIncompatibleError, WarmcellError
from warmcell.sandbox.models import SnapshotId
from warmcell.sandbox.snapshots.carrying import CriuImages

pytestmark = pytest.mark.criu

FIRST, SECOND, BROUGHT = SnapshotId("first0000000"), SnapshotId("second000000"), SnapshotId("brought00000")


@pytest.fixture
def elsewhere() -> Iterator[Places]:
    """The directories of another keeper."""
    with own_places() as made:
        yield made


async def cli(*arguments: str, code: int = 0, env: Any = None) -> Any:
    """What a command of `warmcell snapshots` says as JSON."""
    return json.loads(await printed(*arguments, "--json", code=code, env=env))


async def printed(*arguments: str, code: int = 0, env: Any = None) -> str:
    """What it prints."""
    argv = [sys.executable, "-m", "warmcell.extension.cli", "snapshots", *arguments]
    pipe = asyncio.subprocess.PIPE
    done = await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=pipe, env=env)
    async with asyncio.timeout(120):
        stdout, stderr = await done.communicate()
    assert done.returncode == code, (stdout.decode(), stderr.decode())
    return stdout.decode()


async def test_a_kernel_goes_on_elsewhere(
    places: Places, elsewhere: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported by one keeper and imported by another, it goes on where it was; the archive can be verified there.

    The other one has a key of its own, as on another machine, and takes it only where its operator says so.
    """
    archive = tmp_path / "archive"
    async with keeper(places) as client, notebook(client, tmp_path) as book:
        await book.run("import os; data = os.urandom(1 << 24); count = 41; private = open('/tmp/own', 'w+')")
        said = await book.run("private.write('kept'); private.flush(); print(hash(data))")
        await book.do("snapshot", name="mine")
        wrote = await cli("export", "mine", str(archive))
        assert wrote["bytes"] == archive.stat().st_size > 1 << 24
    for name, value in elsewhere.env.items():
        monkeypatch.setenv(name, value)
    async with keeper(elsewhere):
        error = (await cli("import", str(archive), code=1))["error"]
        assert (error["code"], "c.Warmcell.import_snapshots" in error["hint"]) == ("unsupported", True)
        assert (await cli("ls"))["snapshots"] == []
    await asyncio.to_thread(end_keeper, elsewhere)
    async with keeper(elsewhere, import_snapshots=True) as client, notebook(client, tmp_path) as book:
        brought = await cli("import", str(archive), "--name", "theirs")
        assert (brought["kind"], brought["engine"], brought["memory_bytes"] > 1 << 24) == ("named", "criu", True)
        assert [one["state"] for one in (await cli("verify", "theirs"))["snapshots"]] == ["whole"]
        keys = [(each.state / "images" / "key").read_bytes() for each in (places, elsewhere)]
        assert keys[0] != keys[1]
        await book.do("restore", snapshot=brought["id"])
        assert await book.run("count += 1; private.seek(0); print(count, private.read())") == "42 kept"
        assert await book.run("print(hash(data))") == said
        await spoilt_archives(archive, tmp_path / "spoilt", brought["id"])
        damage(elsewhere.state / "images" / "0" / brought["id"])
        (one,) = (await cli("verify", code=1))["snapshots"]
        assert (one["id"], one["state"], one["error"]["code"]) == (brought["id"], "damaged", "snapshot_corrupt")


async def spoilt_archives(archive: Path, spoilt: Path, kept: str) -> None:
    """Each is one error with its cure, and leaves nothing behind."""
    data = archive.read_bytes()
    for content in (flipped(data), data[: len(data) // 2], data[:-10], data + b"x"):
        spoilt.write_bytes(content)
        error = (await cli("import", str(spoilt), "--name", "other", code=1))["error"]
        assert error["code"] == "snapshot_corrupt"
        assert error["hint"]
    assert [one["id"] for one in (await cli("ls"))["snapshots"]] == [kept]


def flipped(data: bytes) -> bytes:
    """With another bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def damage(image: Path) -> None:
    """Flip a byte of the memory behind the back of whoever wrote it, as a disk does: times are as before."""
    page_file = next(iter((image / "memory").iterdir()))
    before = page_file.stat()
    with page_file.open("r+b") as file:
        file.seek(1 << 20)
        byte = file.read(1)
        file.seek(1 << 20)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(page_file, ns=(before.st_atime_ns, before.st_mtime_ns))


async def pieces(stream: bytes) -> AsyncIterator[bytes]:
    """A stream as an archive gives it."""
    for at in range(0, len(stream), 1 << 16):
        yield stream[at : at + (1 << 16)]


async def exported(images: CriuImages, image: SnapshotId) -> bytes:
    return b"".join([piece async for piece in images.export_image(image)])


Change = Callable[[dict[str, Any]], None]


def doctored(
    stream: bytes, *, about: Change | None = None, file: str = "", swap: tuple[bytes, bytes] = (b"", b"")
) -> bytes:
    """The stream with other content, and with the right sum: as somebody makes it who knows the format."""
    out, at = bytearray(), 0
    name = ""
    while at < len(stream):
        end = stream.index(b"\n", at) + 1
        said = json.loads(stream[at:end])
        data = stream[end : end + said.get("bytes", 0)]
        at = end + len(data)
        name = said.get("file", name)
        if "image" in said and about is not None:
            known = json.loads(data)
            about(known)
            data = json.dumps(known).encode()
            said["bytes"] = len(data)
        elif "at" in said and file and name.startswith(file):
            assert swap[0] in data
            data = data.replace(*swap)
        elif "end" in said:
            said["end"] = hashlib.sha256(out).hexdigest()
        out += json.dumps(said).encode() + b"\n" + data
    return bytes(out)


def other_processor(known: dict[str, Any]) -> None:
    known["cpu"] = [*known["cpu"], "avx9000"]


def other_linux(known: dict[str, Any]) -> None:
    known["linux"] = "9.9.9"


def other_libraries(known: dict[str, Any]) -> None:
    known["pinned"] = {path: [seen[0] + bool(seen[3]), *seen[1:]] for path, seen in known["pinned"].items()}


def path_of_the_host(known: dict[str, Any]) -> None:
    known["pinned"] = {path: [*seen[:3], "../../../etc/passwd"] for path, seen in known["pinned"].items()}


async def test_images_from_elsewhere(places: Places) -> None:
    """Memory along a chain is kept once; what does not fit or was doctored is refused, and nothing is left of it."""
    async with boxes_of(places) as boxes:
        images = CriuImages(boxes.engine)
        box = await boxes.running(mib=8)
        await boxes.dump(box, FIRST)
        count = await box.goes_on(past=await box.count())
        stream = await exported(images, FIRST)
        shelf = places.state / "images" / str(os.getuid())
        memory = {path.name: path.stat().st_ino for path in (shelf / FIRST / "memory").iterdir()}

        await images.import_image(BROUGHT, pieces(stream))
        assert {path.name: path.stat().st_ino for path in (shelf / BROUGHT / "memory").iterdir()} == memory
        assert await images.verify_image(BROUGHT)
        restored = await boxes.restored(BROUGHT)
        assert await restored.goes_on() <= count + 40
        await boxes.dump(restored, SECOND, then="stop")
        chained = await exported(images, SECOND)
        for image in (FIRST, BROUGHT, SECOND):
            await boxes.engine.drop(image)
        await images.import_image(BROUGHT, pieces(chained))
        back = await boxes.restored(BROUGHT)
        await back.goes_on(past=await back.count())
        await boxes.engine.drop(BROUGHT)

        await images.import_image(BROUGHT, pieces(doctored(stream, about=other_libraries)))
        back = await boxes.restored(BROUGHT)
        await back.goes_on(past=await back.count())
        mounted = {line.split()[4] for line in Path(f"/proc/{back.pid}/mountinfo").read_text().splitlines()}
        assert any(".so" in path for path in mounted)  # What it has mapped came with it, and is there for it.
        await boxes.engine.drop(BROUGHT)

        refused: list[tuple[bytes, type[WarmcellError], str]] = [
            (doctored(stream, about=other_processor), SnapshotIncompatibleError, "avx9000"),
            (doctored(stream, about=other_linux), SnapshotIncompatibleError, "Linux"),
            (doctored(stream, about=path_of_the_host), SnapshotCorruptError, "cannot be read"),
            (stream[: len(stream) // 2], SnapshotCorruptError, "breaks off"),
            (stream.replace(b'{"file": "core-', b'{"file": "../../', 1), SnapshotCorruptError, "no image has"),
            (flipped(stream), SnapshotCorruptError, "damaged"),
            (stream + b"{}\n", SnapshotCorruptError, "not what was written"),
            (b"", SnapshotCorruptError, "breaks off"),
        ]
        for content, kind, says in refused:
            with pytest.raises(kind, match=says) as raised:
                await images.import_image(BROUGHT, pieces(content))
            assert raised.value.hint
        assert await boxes.engine.images() == []
        assert [name for name in os.listdir(shelf) if name not in (".pages", ".pins")] == []


async def test_an_image_that_asks_for_more_than_its_guest_has(places: Places) -> None:
    """Doctored to be root's, with the right sums, it can be brought in but not restored."""
    async with boxes_of(places) as boxes:
        images = CriuImages(boxes.engine)
        box = await boxes.running()
        await boxes.dump(box, FIRST, then="stop")
        stream = await exported(images, FIRST)
        await images.import_image(
            BROUGHT, pieces(doctored(stream, file="core-", swap=credentials_of(boxes_uid(stream))))
        )
        with pytest.raises(SnapshotCorruptError, match="belongs"):
            await boxes.restored(BROUGHT)
        box = await boxes.restored(FIRST)
        await box.goes_on(past=await box.count())


def boxes_uid(stream: bytes) -> int:
    """The user whose processes are in an image."""
    end = stream.index(b"\n") + 1
    known = json.loads(stream[end : end + json.loads(stream[:end])["bytes"]])
    return int(known["user"][0])


def credentials_of(uid: int) -> tuple[bytes, bytes]:
    """The uid and the euid of an image's task, with what is next to them, and root's of the same length."""
    number = bytearray()
    left = uid
    while left > 0x7F:
        number.append(left & 0x7F | 0x80)
        left >>= 7
    number.append(left)
    zero = b"\x80" * (len(number) - 1) + b"\x00"
    return b"\x08" + bytes(number) + b"\x10", b"\x08" + zero + b"\x10"
