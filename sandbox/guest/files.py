"""Does one thing with the sandbox's files: `PYTHON -I -S files.py`, started by init for the host.

A line of JSON on standard input says what, raw data may follow it; a line of JSON on standard output says what became
of it, raw data may follow that. Whatever a path leads to is what this very sandbox sees.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

LISTED_MAX = 10_000
LISTED_BYTES = 8 * 2**20
"""Of one answer, half of what the host reads: names may be long, and have much noted on them."""
PIECE_BYTES = 256 * 1024
FILE_MODE = 0o666
"""Of a new one, without the bits of the umask."""
METADATA = "user.e2b."
"""How the attributes begin in which a file's metadata is kept: as E2B's sandboxes have it."""


class Refused(Exception):
    """Cannot be done, for a reason that has a name of errno's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def full(path: str) -> str:
    """An absolute path; a relative one begins at the home. Links in it stay."""
    return os.path.normpath(os.path.join(os.environ.get("HOME", "/"), path))


def told(path: str, *, follow: bool = False) -> dict[str, Any]:
    """What there is to know of a file."""
    found = os.stat(path) if follow else os.lstat(path)
    kinds = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "directory"), (stat.S_ISLNK, "symlink"))
    return {
        "path": path,
        "name": os.path.basename(path) or "/",
        "type": next((name for is_it, name in kinds if is_it(found.st_mode)), "other"),
        "size_bytes": found.st_size,
        "mode": stat.S_IMODE(found.st_mode),
        "owner": _user(found.st_uid),
        "group": _group(found.st_gid),
        "modified_at": found.st_mtime,
        "target": os.readlink(path) if stat.S_ISLNK(found.st_mode) else None,
        "metadata": {} if stat.S_ISLNK(found.st_mode) else _metadata(path),
    }


def read(request: Mapping[str, Any]) -> None:
    """The content of a file. A device or a pipe is refused: it might never end."""
    path = _regular(full(request["path"]))
    with os.fdopen(_opened(path), "rb", buffering=0) as file:
        say(file=told(path, follow=True))
        while piece := file.read(PIECE_BYTES):
            give(piece)


def write(request: Mapping[str, Any]) -> None:
    """A new content, of which nobody ever sees a part: it gets its name when all of it has come."""
    path = os.path.realpath(full(request["path"]))

    def fill(file: int) -> None:
        while piece := sys.stdin.buffer.read(PIECE_BYTES):
            view = memoryview(piece)
            while view:
                view = view[os.write(file, view) :]

    _made(path, fill, request)
    say(file=told(path))


def compose(request: Mapping[str, Any]) -> None:
    """A new content: that of other files, one after the other. They are gone then."""
    target = os.path.realpath(full(request["target"]))
    sources = [os.path.realpath(full(one)) for one in request["sources"]]
    if target in sources:
        raise Refused("EINVAL", f"{target} is to be made of itself")
    for source in sources:
        _regular(source)

    def fill(file: int) -> None:
        for source in sources:
            with os.fdopen(_opened(source), "rb", buffering=0) as part:
                while os.sendfile(file, part.fileno(), None, PIECE_BYTES):
                    pass

    _made(target, fill, request)
    for source in dict.fromkeys(sources):
        os.unlink(source)
    say(file=told(target))


def _umask() -> int:
    """This process's own, which can only be had by setting another."""
    found = os.umask(0o077)
    os.umask(found)
    return found


def _made(path: str, fill: Callable[[int], None], request: Mapping[str, Any]) -> None:
    if request.get("parents", True):
        _make_folder(os.path.dirname(path))
    mode = request.get("mode")
    if os.path.lexists(path):
        before = os.stat(_regular(path)).st_mode
        mode = stat.S_IMODE(before) if mode is None else mode
    with _replacing(path) as file:
        fill(file)
        os.fchmod(file, FILE_MODE & ~_umask() if mode is None else mode)
        for key, value in request.get("metadata", {}).items():
            os.setxattr(file, METADATA + key, value.encode())


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[int]:
    """A descriptor to write to; what was written is at `path` afterwards, or, if that fails, all is as it was."""
    directory, name = os.path.split(path)
    work = os.path.join(directory, f".{name[:200]}.{os.getpid()}.new")
    try:
        file = os.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o600)  # Killed now, nothing is left of it.
        unnamed = True
    except OSError:
        file = os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        unnamed = False
    try:
        yield file
        if unnamed:
            links = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
            os.link(str(file), work, src_dir_fd=links)  # Without a directory Python would link the link.
            os.close(links)
        os.rename(work, path)
    except BaseException:
        if os.path.lexists(work):
            os.unlink(work)
        raise
    finally:
        os.close(file)


def listed(request: Mapping[str, Any]) -> None:
    """What is in a directory, and below it down to a depth, from after a file on; links are not followed."""
    top = full(request["path"])
    start = _place(top, request["after"]) if request.get("after") else ()
    files: list[dict[str, Any]] = []
    size = 0
    for path in _below(top, request.get("depth", 1), start):
        try:
            one = told(path)
        except FileNotFoundError:
            continue
        size += len(json.dumps(one))
        if files and (len(files) >= request.get("limit", LISTED_MAX) or size > LISTED_BYTES):
            say(files=files, truncated=True)
            return
        files.append(one)
    say(files=files, truncated=False)


def _place(top: str, path: str) -> tuple[str, ...]:
    """The names on the way to a file that was listed."""
    names = tuple(os.path.relpath(path, top).split("/"))
    if names[0] in (".", ".."):
        raise Refused("EINVAL", f"{path} is not below {top}")
    return names


def _below(top: str, depth: int, start: tuple[str, ...]) -> Iterator[str]:
    """Paths of what comes after a place, the least deep first, else by their names: also where others come and go."""
    pending: list[tuple[str, ...]] = [()]
    for parents in pending:
        directory = os.path.join(top, *parents)
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            if not parents:
                raise
            continue
        for name in names:
            place, path = (*parents, name), os.path.join(directory, name)
            if (len(place), place) > (len(start), start):
                yield path
            if len(place) < depth and os.path.isdir(path) and not os.path.islink(path):
                pending.append(place)


def stated(request: Mapping[str, Any]) -> None:
    """What a path is."""
    say(file=told(full(request["path"]), follow=bool(request.get("follow"))))


def move(request: Mapping[str, Any]) -> None:
    """Another name, also on another file system. What has that name already stays, and it is refused."""
    source, target = full(request["source"]), full(request["target"])
    if os.path.lexists(target):
        raise Refused("EEXIST", f"{target} exists")
    _make_folder(os.path.dirname(target))
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != 18:  # EXDEV
            raise
        import shutil

        shutil.move(source, target)
    say(file=told(target))


def remove(request: Mapping[str, Any]) -> None:
    """A file, an empty directory, or with `recursive` all that is in it."""
    path = full(request["path"])
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
    elif request.get("recursive"):
        import shutil

        shutil.rmtree(path)
    else:
        os.rmdir(path)
    say()


def mkdir(request: Mapping[str, Any]) -> None:
    """A directory; one that is there already is fine."""
    path = full(request["path"])
    there = os.path.isdir(path)
    if not there and request.get("parents", True):
        os.makedirs(path, exist_ok=True)
    elif not there:
        os.mkdir(path)
    say(file=told(path), created=not there)


def pack(request: Mapping[str, Any]) -> None:
    """What is in a directory, as a tar. Sockets, pipes and devices are left out, and what is gone meanwhile."""
    import tarfile

    top = full(request["path"])
    names = sorted(os.listdir(top))
    say()
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        while names:
            name = names.pop(0)
            try:
                names[:0] = _packed(archive, os.path.join(top, name), name)
            except (FileNotFoundError, NotADirectoryError, Refused):
                continue
    sys.stdout.buffer.flush()


def _packed(archive: Any, path: str, name: str) -> list[str]:
    """Add one file to a tar; the names of what is in it, where it is a directory."""
    member = archive.gettarinfo(path, name)
    if member is None or member.isdev():
        return []
    if not member.isreg():
        archive.addfile(member)
        return [os.path.join(name, one) for one in sorted(os.listdir(path))] if member.isdir() else []
    with os.fdopen(_opened(path, os.O_NOFOLLOW), "rb") as file:
        member.size = os.fstat(file.fileno()).st_size
        archive.addfile(member, _Whole(file))
    return []


class _Whole:
    """A file that is as long as it was, although it is written to: zeros stand for what is gone."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        """As of a file."""
        data: bytes = self._file.read(size)
        return data + bytes(size - len(data))


def unpack(request: Mapping[str, Any]) -> None:
    """A tar into a directory, which is made. All of it belongs to who runs here; each file is there whole or not."""
    import tarfile

    class Archive(tarfile.TarFile):
        def makefile(self, tarinfo: tarfile.TarInfo, targetpath: Any) -> None:
            with _replacing(os.fspath(targetpath)) as file:
                super().makefile(tarinfo, f"/proc/self/fd/{file}")

    top = full(request["path"])
    os.makedirs(top, exist_ok=True)
    count = 0

    def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        nonlocal count
        for member in archive:
            if member.isdev():
                continue
            member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
            count += member.isfile()
            yield member

    try:
        with Archive.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
            how: dict[str, Any] = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
            archive.extractall(top, members=members(archive), **how)  # noqa: S202 - outside is its own sandbox.
    except tarfile.TarError as error:
        raise Refused("EINVAL", f"it is no tar: {error}") from error
    say(files=count)


def room(request: Mapping[str, Any]) -> None:
    """How much is written to home and /tmp. Where they are no file systems of their own, their files are counted."""
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        own = {fields[1] for fields in (line.split() for line in mounts) if fields[2] == "tmpfs"}
    used = 0
    for path in dict.fromkeys((os.environ.get("HOME", "/tmp"), "/tmp")):
        if path in own:
            found = os.statvfs(path)
            used += (found.f_blocks - found.f_bfree) * found.f_frsize
        else:
            used += sum(_sizes(path))
    say(used_bytes=used)


def _sizes(top: str) -> Iterator[int]:
    counted = 0
    for directory, _, names in os.walk(top):
        for name in names:
            counted += 1
            if counted > LISTED_MAX:
                return
            try:
                yield os.lstat(os.path.join(directory, name)).st_blocks * 512
            except OSError:  # It has gone.
                continue


_answered = False


def say(**answer: Any) -> None:
    """The line of the answer."""
    global _answered
    _answered = True
    give(json.dumps({"ok": True, **answer}).encode() + b"\n")


def give(data: bytes) -> None:
    """Data of the answer."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _make_folder(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError as error:
        raise Refused("ENOTDIR", f"{error.filename} is no directory") from error


def _regular(path: str) -> str:
    kind = os.stat(path).st_mode
    if stat.S_ISDIR(kind):
        raise Refused("EISDIR", f"{path} is a directory")
    if not stat.S_ISREG(kind):
        raise Refused("EINVAL", f"{path} is no regular file")
    return path


def _metadata(path: str) -> dict[str, str]:
    try:
        names = [name for name in os.listxattr(path) if name.startswith(METADATA)]
        return {name[len(METADATA) :]: os.getxattr(path, name).decode(errors="replace") for name in sorted(names)}
    except OSError:  # A file system without attributes, or a file that has gone.
        return {}


def _opened(path: str, flags: int = 0) -> int:
    """A descriptor of a regular file: what has its name may be a pipe from one moment to the next."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | flags)
    except OSError as error:
        if error.errno in (6, 40):  # ENXIO: a socket; ELOOP: a link.
            raise Refused("EINVAL", f"{path} is no regular file") from error
        raise
    if stat.S_ISREG(os.fstat(file).st_mode):
        return file
    os.close(file)
    raise Refused("EINVAL", f"{path} is no regular file")


def _user(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


OPERATIONS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "read": read,
    "write": write,
    "list": listed,
    "stat": stated,
    "move": move,
    "remove": remove,
    "mkdir": mkdir,
    "compose": compose,
    "room": room,
    "pack": pack,
    "unpack": unpack,
}


def main() -> int:
    """Do what the first line says."""
    import errno

    try:
        request = json.loads(sys.stdin.buffer.readline())
        OPERATIONS[request["op"]](request)
    except Refused as error:
        give(json.dumps({"ok": False, "errno": error.code, "message": str(error)}).encode() + b"\n")
    except (OSError, ValueError, RecursionError) as error:  # The latter: thousands of folders, one in another.
        if _answered:  # What follows is a file, which breaks off: its end says so.
            return 1
        number = getattr(error, "errno", None)
        name = errno.errorcode.get(number or 0, "EINVAL")
        where = getattr(error, "filename", None)
        words = getattr(error, "strerror", None) or str(error)
        text = f"{where}: {words}" if where is not None else words
        give(json.dumps({"ok": False, "errno": name, "message": text}).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
