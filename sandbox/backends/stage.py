"""Between the keeper and a sandbox: a process that makes what a sandbox needs, then becomes it.

Joining control groups and making private mounts concern a whole process, hence one of its own. It reads a plan from a
socket (its length in eight bytes, then marshalled); answers with one JSON line and, where it made mounts, a descriptor
of the run directory; and replaces itself by the plan's `argv`. Its mounts live in a mount namespace that only it and
its descendants are in, so nothing of them is ever seen on the host, and nothing is left when the sandbox ends.

Standard library only, and as little of it as can be (no socket, no json): this start is part of every sandbox's start.
"""

from __future__ import annotations

import _socket
import ctypes
import errno
import fcntl
import marshal
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_NOSYMFOLLOW, MS_REC, MS_PRIVATE = 2, 4, 0x100, 0x4000, 0x40000
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, 0o2000000
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_IDMAP = 0x00100000
MOVE_MOUNT_T_EMPTY_PATH = 0x40
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH = 2, 4, 8
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_OPENAT2, SYS_MOUNT_SETATTR = 428, 429, 437, 442
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ID_MAX = 2**32 - 1

libc = ctypes.CDLL(None, use_errno=True)


class MountAttr(ctypes.Structure):
    """`struct mount_attr` of mount_setattr(2)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


class OpenHow(ctypes.Structure):
    """`struct open_how` of openat2(2)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


class Refused(Exception):
    """The kernel refused a step."""

    def __init__(self, step: str, error: int) -> None:
        super().__init__(f"{step}: {os.strerror(error)}")
        self.step = step
        self.errno = error


def call(step: str, result: int) -> int:
    """The result of a libc call, or `Refused` with its errno."""
    if result < 0:
        raise Refused(step, ctypes.get_errno())
    return result


def main(fd: int) -> None:
    """Carry out the plan that comes on `fd`."""
    control = _socket.socket(fileno=fd)
    step = "read the plan"
    try:
        size = int.from_bytes(receive(control, 8), "big")
        plan = marshal.loads(receive(control, size))  # noqa: S302  # It comes from the keeper that started this.
        step = "join its control group"
        for file in plan["cgroups"]:
            with open(file, "w") as procs:
                procs.write("0")
        call("die with the keeper", libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0))
        if os.getppid() != plan["keeper"]:
            sys.exit(1)
        if plan["session"]:
            os.setsid()
            call("adopt orphans", libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        report: dict[str, Any] = {}
        run: list[int] = []
        if plan["mounts"] is not None:
            step = "make its mounts"
            report, run = make_mounts(plan["mounts"])
        argv = [word for part in plan["argv"] for word in choose(part, report)]
        step = f"start {argv[0]}"
        answer(
            control, f'"stage": {{{", ".join(f"{quoted(name)}: {quoted(why)}" for name, why in report.items())}}}', run
        )
        if plan["most_processes"] is not None:
            resource.setrlimit(resource.RLIMIT_NPROC, (plan["most_processes"],) * 2)
        hand_on(control, plan["inherit"])
        os.execve(argv[0], argv, plan["env"])
    except Refused as error:
        answer(control, f'"failed": {quoted(error.step)}, "errno": {error.errno}')
    except OSError as error:
        answer(control, f'"failed": {quoted(step)}, "errno": {error.errno or 0}')
    sys.exit(1)


def receive(control: _socket.socket, size: int) -> bytes:
    """Exactly `size` bytes."""
    data = bytearray()
    while len(data) < size:
        more = control.recv(size - len(data))
        if not more:
            sys.exit(1)  # The keeper is gone.
        data += more
    return bytes(data)


def answer(control: _socket.socket, members: str, fds: list[int] = []) -> None:  # noqa: B006  # Never changed.
    """Send a JSON object, and descriptors with it."""
    rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if fds else []
    control.sendmsg([f"{{{members}}}\n".encode()], ancillary)


def quoted(text: str) -> str:
    """A JSON string."""
    return (
        '"' + "".join(c if (c.isalnum() and c.isascii()) or c in " ./-_:()" else f"\\u{ord(c):04x}" for c in text) + '"'
    )


def choose(part: Any, report: Mapping[str, Any]) -> list[str]:
    """Words of the command line: as given, or those that hold if a tree could be made as asked, else the others."""
    if isinstance(part, str):
        return [part]
    words: list[str] = part["else"] if report[part["tree"]] else part["ok"]
    return words


def hand_on(control: _socket.socket, inherit: Mapping[str, Any]) -> None:
    """Let what is executed have the control socket, and files with the given content, under the numbers it expects.

    Whatever else is open closes at exec.
    """
    kept = {int(number): fcntl.fcntl(control.fileno(), fcntl.F_DUPFD_CLOEXEC, 64) for number in inherit["control"]}
    for number, content in inherit["files"].items():
        made = os.memfd_create("warmcell")
        os.write(made, bytes.fromhex(content))
        os.lseek(made, 0, os.SEEK_SET)
        kept[int(number)] = fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, 64)
    os.set_inheritable(control.fileno(), False)
    for number, fd in kept.items():
        os.dup2(fd, number)


def make_mounts(plan: Mapping[str, Any]) -> tuple[dict[str, str], list[int]]:
    """A private mount namespace with the sandbox's own file systems below `plan["base"]`.

    With a `user` in the plan this is root, who makes it for somebody else: what is read or written of that user's files
    is so with that user's rights.

    Returns why each of the plan's trees is not as asked (empty where it is), and a descriptor of the run directory.
    """
    uid, gid = os.geteuid(), os.getegid()
    user: tuple[int, int] | None = plan.get("user")
    if plan["user_namespace"]:
        call("make a user namespace", libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
        write("/proc/self/setgroups", b"deny")
        write("/proc/self/uid_map", f"0 {uid} 1".encode())
        write("/proc/self/gid_map", f"0 {gid} 1".encode())
    else:
        call("make a mount namespace", libc.unshare(CLONE_NEWNS))
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    # First of all, since a workspace may contain the very directory that the rest is mounted in.
    clones = [(made, *open_clone(made)) for made in plan["clones"]]
    base = plan["base"]
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=16m,nr_inodes=65536")
    os.chdir(base)
    os.umask(0)
    for made in plan["file_systems"]:
        os.mkdir(made["path"], 0o755)
        links = 0 if made["follow"] else MS_NOSYMFOLLOW
        mount("tmpfs", made["path"], "tmpfs", MS_NOSUID | MS_NODEV | links, made["options"])
    for made, tree, _ in clones:
        attach(tree, made["path"])
    for made in plan["directories"]:
        os.mkdir(made["path"], made["mode"])
        if made["owner"] is not None:
            os.chown(made["path"], *made["owner"])
    for made in plan["files"]:
        write(made["path"], bytes.fromhex(made["content"]))
        os.chmod(made["path"], 0o644)
    for made in plan["links"]:
        os.symlink(made["target"], made["path"])
    if plan["fills"]:
        if user is None:
            fill(plan["fills"], owners=not plan["user_namespace"])
        else:
            fill_as(user, plan["fills"])
    report = {made["name"]: why for made, _, why in clones}
    report.update({made["name"]: make_overlay(made, user=user) for made in plan["overlays"]})
    for made in plan.get("views", ()):
        attach(clone(choose(made["of"], report)[0]), made["path"])
    for made in plan.get("nested", ()):
        nest(made, report)
    handles = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in (plan["run"], ".")]
    os.chdir("/")
    return report, handles


def fill(plan: Sequence[Mapping[str, Any]], *, owners: bool) -> None:
    """Copy what a saved layer has into the file systems of this sandbox, or only what a directory of it itself is."""
    trees = beside("trees")  # Most sandboxes have no use for it.
    for made in plan:
        source = made["source"]
        if isinstance(source, str):
            source = os.open(source, trees.DIRECTORY)
        else:  # A descriptor that gives no right to read.
            source = os.open(".", trees.DIRECTORY, dir_fd=source)
        target = os.open(made["path"], trees.DIRECTORY)
        copy = trees.Copy(
            source, target, most_bytes=made["most_bytes"], most_entries=made["most_entries"], owners=owners
        )
        try:
            copy.top() if made["only_top"] else copy.run()
        except trees.Refused:
            raise Refused(f"copy saved files to {made['path']}", errno.EFBIG) from None
        except OSError as error:
            raise Refused(f"copy saved files to {made['path']}", error.errno or 0) from None
        os.close(source)
        os.close(target)


def beside(name: str) -> Any:
    """A module that lies beside this file, in its package or not."""
    return __import__(f"{__package__}.{name}" if __package__ else name, fromlist=[name])


def fill_as(user: tuple[int, int], plan: Sequence[Mapping[str, Any]]) -> None:
    """`fill` by a process that is that user and nothing more."""
    beside("trees")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "1 copy saved files"
        try:
            os.setgroups([])
            os.setresgid(user[1], user[1], user[1])
            os.setresuid(user[0], user[0], user[0])
            libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
            fill(plan, owners=False)
            said = ""
        except Refused as error:
            said = f"{error.errno} {error.step}"
        finally:
            os.write(writing, said.encode()[:1000])
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 1000).decode(errors="replace")
    os.close(reading)
    os.waitpid(child, 0)
    if said:
        number, _, step = said.partition(" ")
        raise Refused(step, int(number))


def open_clone(plan: Mapping[str, Any]) -> tuple[int, str]:
    """The tree `source`, its owner's files as those of somebody else, as a descriptor of a mount that is nowhere yet.

    With it comes why its owner is as on the host instead, else nothing. A `tree` in the plan is such a descriptor.
    """
    if "tree" in plan:
        return plan["tree"], ""
    recursive = AT_RECURSIVE if plan["recursive"] else 0
    tree = call(
        f"open {plan['source']}",
        libc.syscall(
            SYS_OPEN_TREE, AT_FDCWD, os.fsencode(plan["source"]), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursive
        ),
    )
    if plan["swap"] is None:
        return tree, ""
    try:
        attributes = MountAttr(MOUNT_ATTR_IDMAP, 0, 0, namespace_that_swaps(*plan["swap"]))
        size = ctypes.sizeof(attributes)
        call(
            "idmapped mount",
            libc.syscall(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH | recursive, ctypes.byref(attributes), size),
        )
    except Refused as error:
        return tree, str(error)
    return tree, ""


def attach(tree: int, path: str, *, there: bool = False) -> None:
    """Put a tree at `path`, which is made, if it is not there, as what it is: a directory or a file."""
    if there:
        pass
    elif os.path.isdir(f"/proc/self/fd/{tree}"):
        os.mkdir(path)
    else:
        write(path, b"")
    call(
        f"attach {path}",
        libc.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(path), MOVE_MOUNT_F_EMPTY_PATH),
    )
    os.close(tree)


def make_overlay(plan: Mapping[str, Any], *, user: tuple[int, int] | None = None) -> str:
    """Put a writable layer over the tree `lower`; returns why that cannot be, else nothing.

    Paths are relative to the base: options cannot hold every character that a path can.

    An overlay uses what lies below it with the rights of who mounted it. With a `user` those are the user's: a layer of
    the user's own could otherwise open directories that are closed to them.
    """
    options = f"lowerdir={plan['lower']},upperdir={plan['upper']},workdir={plan['work']}{plan['options']}"
    try:
        os.mkdir(plan["path"])
        if user is None:
            mount("overlay", plan["path"], "overlay", MS_NOSUID | MS_NODEV, options)
            return ""
        attach(overlay_of(user, plan["path"], options), plan["path"], there=True)
    except Refused as error:
        return str(error)
    return ""


def overlay_of(user: tuple[int, int], path: str, options: str) -> int:
    """An overlay, nowhere yet, that uses what lies below it with the rights of that user alone.

    Who mounts it is root of a user namespace that has no other user: only in one can a process have the few more rights
    on the user's own files that an overlay needs. The kernel refuses trees in which other file systems are mounted
    there: an overlay would show what those cover.
    """
    ours, theirs = _socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            call("make a user namespace", libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
            answer(theirs, '"made": true')
            receive(theirs, 1)
            os.setgroups([])
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            mount("overlay", path, "overlay", MS_NOSUID | MS_NODEV, options)
            answer(theirs, '"errno": 0', [clone(path)])
        except Refused as error:
            answer(theirs, f'"errno": {error.errno}')
        except OSError as error:
            answer(theirs, f'"errno": {error.errno or 0}')
        finally:
            os._exit(0)
    theirs.close()
    try:
        if b"made" in ours.recv(100):
            for name, number in (("uid_map", user[0]), ("gid_map", user[1])):
                write(f"/proc/{child}/{name}", f"0 {number} 1".encode())
            ours.send(b".")
        said, ancillary, _, _ = ours.recvmsg(100, _socket.CMSG_SPACE(4))
    finally:
        ours.close()
        os.waitpid(child, 0)
    for _, _, rights in ancillary:
        return int.from_bytes(rights[:4], sys.byteorder)
    raise Refused(f"mount overlay on {path}", int(b"0" + said.partition(b": ")[2].rstrip(b"}\n")))


def clone(path: str) -> int:
    """A mount, nowhere yet, of the tree at `path` with all that is mounted in it."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE
    return call(f"open {path}", libc.syscall(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags))


def nest(plan: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Put a tree, or a symbolic link, at a place inside another tree.

    That other tree may be changed by its owner meanwhile, so no link in it is followed, and nothing is made in it
    unless it is a file system of the sandbox's own.
    """
    inside = os.open(plan["inside"], os.O_PATH | os.O_DIRECTORY)
    step = f"find {plan['path']}"
    try:
        if "link" in plan:
            parent, name = os.path.split(plan["path"])
            over = make_beneath(inside, parent) if parent else os.dup(inside)
            if name not in os.listdir(over_folder := os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=over)):
                os.symlink(plan["link"], name, dir_fd=over)  # Else a saved layer has it.
            os.close(over_folder)
            os.close(over)
            return
        source = choose(plan["source"], report)[0]
        try:
            over = open_beneath(inside, plan["path"])
        except FileNotFoundError:
            if not plan["make"]:
                raise
            over = make_beneath(inside, plan["path"], whole=os.path.isdir(source))
        tree = clone(source)
        flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
        call(f"attach {plan['path']}", libc.syscall(SYS_MOVE_MOUNT, tree, b"", over, b"", flags))
        os.close(tree)
        os.close(over)
    except OSError as error:
        raise Refused(step, error.errno or 0) from None
    finally:
        os.close(inside)


def open_beneath(directory: int, path: str) -> int:
    """A descriptor of `path` below `directory`, no part of which may be a link."""
    how = OpenHow(
        os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    )
    fd = libc.syscall(SYS_OPENAT2, directory, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(fd)


def make_beneath(directory: int, path: str, *, whole: bool = True) -> int:
    """As `open_beneath`; what of the path is missing is made."""
    here = os.dup(directory)
    parts = path.split("/")
    for number, part in enumerate(parts):
        try:
            if number == len(parts) - 1 and not whole:
                os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=here))
            else:
                os.mkdir(part, 0o755, dir_fd=here)
        except FileExistsError:
            pass
        below = open_beneath(here, part)
        os.close(here)
        here = below
    return here


_namespaces: dict[tuple[int, int, int, int], int] = {}


def namespace_that_swaps(uid: int, other_uid: int, gid: int, other_gid: int) -> int:
    """A descriptor of a user namespace that maps `uid` to `other_uid` and the other way round, all else to itself."""
    key = (uid, other_uid, gid, other_gid)
    if key in _namespaces:
        return _namespaces[key]
    made_read, made_write = os.pipe()
    done_read, done_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(made_read)
        os.close(done_write)
        os.write(made_write, b"." if libc.unshare(CLONE_NEWUSER) == 0 else b"!")
        os.read(done_read, 1)
        os._exit(0)
    os.close(made_write)
    os.close(done_read)
    try:
        if os.read(made_read, 1) != b".":
            raise Refused("make a user namespace for the mapping", 1)
        write(f"/proc/{child}/uid_map", swapping(uid, other_uid).encode())
        write(f"/proc/{child}/gid_map", swapping(gid, other_gid).encode())
        _namespaces[key] = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    finally:
        os.close(done_write)
        os.close(made_read)
        os.waitpid(child, 0)
    return _namespaces[key]


def swapping(one: int, other: int) -> str:
    """An id map that exchanges two ids."""
    low, high = sorted((one, other))
    rows = [(0, 0, low), (low, high, 1), (low + 1, low + 1, high - low - 1), (high, low, 1)]
    rows.append((high + 1, high + 1, ID_MAX - high - 1))
    if low == high:
        rows = [(0, 0, ID_MAX)]
    return "\n".join(f"{inside} {outside} {count}" for inside, outside, count in rows if count > 0)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount a file system, or change how mounts propagate."""
    call(
        f"mount {kind or 'private'} on {target}",
        libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()),
    )


def write(path: str, content: bytes) -> None:
    """Write a small file."""
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        raise Refused(f"write {path}", error.errno or 0) from None
