"""Which rights the tasks of an image would have. A restore runs as root and gives each what the image says.

    check(image, uid=100000, gid=100000, groups=(100000,))

For the helper: before every restore of an image, whoever wrote it. CRIU leaves a task whose group list is empty with
the groups that criu itself has, so criu must be started with none (`setgroups([])`).
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from warmcell.sandbox.helper.images import criu
from warmcell.sandbox.helper.images.errors import ImageError, corrupt
from warmcell.sandbox.helper.images.protobuf import all_repeated, fields, inner, numbers

_TASK, _THREAD = 3, 5
_CREDS, _SECCOMP_MODE, _SECCOMP_FILTER = 10, 11, 12
_UIDS = {1: "uid", 3: "euid", 5: "suid", 7: "fsuid"}
_GIDS = {2: "gid", 4: "egid", 6: "sgid", 8: "fsgid"}
_CAPABILITIES = {9: "inheritable", 10: "permitted", 11: "effective", 12: "bounding", 19: "ambient"}
_SECBITS, _GROUPS, _NO_NEW_PRIVS = 13, 14, 18
_MODE_FILTER = 2
_FILTERS, _FILTER_FLAGS, _TSYNC = 1, 3, 1
_DEAD, _ZOMBIE = 2, 6


def check(
    image: Path, *, uid: int, gid: int, groups: Collection[int], no_new_privs: bool = True, seccomp: bool = True
) -> None:
    """Refuse an image in which any task or thread has rights of its own.

    Args:
        image: The image's directory.
        uid: What all of a task's user ids must be, as the host sees them.
        gid: What all of its group ids must be.
        groups: The supplementary groups it may have; it need not have them.
        no_new_privs: Ask that it can gain no rights by running programs.
        seccomp: Ask for a seccomp filter.

    Raises:
        ImageError: `snapshot_corrupt`; the message names the task and what it has.
    """
    criu.check_inventory(image)
    synchronised = _filters(image) if seccomp else []
    covered: set[int] = set()  # processes whose first thread brings its filter to the others
    for pid, thread, core in _threads(image):
        who = f"task {pid}" if pid == thread else f"thread {thread} of task {pid}"
        rights = inner(core, _THREAD) or b""
        creds = inner(rights, _CREDS)
        if creds is None:
            raise corrupt(f"{who} of the image has no credentials")
        found, lists = numbers(creds), all_repeated(creds, (_GROUPS, *_CAPABILITIES))
        for names, expected in ((_UIDS, uid), (_GIDS, gid)):
            for number, name in names.items():
                if found.get(number) != expected:
                    raise _refused(who, f"{name} {found.get(number)} where {expected} belongs")
        foreign = set(lists[_GROUPS]) - {gid, *groups}
        if foreign:
            raise _refused(who, f"the groups {sorted(foreign)}")
        for number, name in _CAPABILITIES.items():
            if any(words := lists[number]):
                raise _refused(who, f"{name} capabilities {', '.join(f'{word:#x}' for word in words)}")
        if no_new_privs and found.get(_NO_NEW_PRIVS) != 1:
            raise _refused(who, "no no_new_privs")
        if not seccomp:
            continue
        state = numbers(rights)
        number = state.get(_SECCOMP_FILTER, len(synchronised))
        if state.get(_SECCOMP_MODE) == _MODE_FILTER and number < len(synchronised):
            if thread == pid and synchronised[number]:
                covered.add(pid)
        elif state.get(_SECCOMP_MODE) or pid not in covered:
            raise _refused(who, "no seccomp filter in force")


def _refused(who: str, has: str) -> ImageError:
    return corrupt(f"{who} of the image has {has}")


def _filters(image: Path) -> list[bool]:
    """The image's seccomp filters: for each, whether all threads of a process get it with the first one."""
    path = image / "seccomp.img"
    entries = criu.read(path) if path.exists() else []
    return [
        bool(numbers(field.value).get(_FILTER_FLAGS, 0) & _TSYNC)
        for entry in entries[:1]
        for field in fields(entry)
        if field.number == _FILTERS and isinstance(field.value, bytes)
    ]


def _threads(image: Path) -> Iterator[tuple[int, int, bytes]]:
    """Process id, thread id and core of all that a restore would start."""
    for task in criu.tasks(image):
        first = criu.only(image / f"core-{task.pid}.img")
        others = task.threads
        if numbers(inner(first, _TASK) or b"").get(1) in (_DEAD, _ZOMBIE):
            others = others[1:]  # Its first thread has no number: criu writes what its memory holds there by chance.
        else:
            yield task.pid, task.pid, first
        for thread in dict.fromkeys(others):
            if thread != task.pid:
                yield task.pid, thread, criu.only(image / f"core-{thread}.img")
