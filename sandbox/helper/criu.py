"""One run of criu inside a sandbox: its options, its feature cache, and what its log means."""

from __future__ import annotations

import contextlib
import os
import re

from warmcell.sandbox.helper import linux
from warmcell.sandbox.helper.enter import Run
from warmcell.sandbox.helper.problems import HelperError, incompatible, no_room
from warmcell.sandbox.helper.program import ENVIRONMENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from warmcell.sandbox.helper.places import Place
    from warmcell.sandbox.helper.program import Program

DOOR = "/.warmcell"
"""Where the helper has a file system of its own inside each sandbox, which the guest cannot enter."""
CACHE = "criu.kdat"
"""What criu found out about this kernel, which it would find out anew at each run, in 50 to 100 ms."""
OPTIONS = (
    "--tcp-close",
    "--file-locks",
    "--link-remap",
    "--manage-cgroups=ignore",
    "--network-lock=skip",
    "--no-default-config",
    "--timeout=60",  # For stopping all threads; its own ten seconds are too few for a busy machine.
    "-v2",
)
GHOST_LIMIT_BYTES = 1 << 30
"""Largest file that is deleted but still open, and so goes into the image."""
ROOM_LEFT_BYTES = 1 << 20
"""A disk that has less left is full."""
DUMP_TIMEOUT_S, RESTORE_TIMEOUT_S = 600.0, 300.0

HARMLESS = "Can't setup RLIMIT_NOFILE for self"
"""criu would like more than it may have without CAP_SYS_RESOURCE, says so each time, and goes on."""

_NAMED = (
    # A pattern of criu's log, the code, and what it means; groups of the pattern fill the braces.
    (r"No space left on device|ENOSPC", "storage_full", ""),
    (r"File (\S+) has bad size (\d+) \(expect (\d+)\)", "snapshot_incompatible", "{0}|{2} bytes|{1} bytes"),
    (r"File (\S+) has bad (?:build-ID|mode \S+) .*", "snapshot_incompatible", "{0}|as it was|another version"),
    (r"Can't open (?:file )?(/?\S+)(?: on restore)?: No such file", "snapshot_incompatible", "{0}|there|missing"),
    (r"Can't open file (\S+)(?: on restore)?: Read-only", "snapshot_incompatible", "{0}|open for writing|read-only"),
    (r"Can't (?:link|open) (\S*link_remap\S*)", "snapshot_incompatible", "{0}|there|missing"),
    (r"[Pp]id (\d+).* (?:already exists|File exists)|Can't fork for (\d+): File exists", "conflict", ""),
)
_UNDUMPABLE = (
    (r"[Cc]onnected (?:TCP )?socket", "a network connection"),
    (
        r"[Uu]nix socket \S+ without peer|[Ee]xternal socket|Unix socket .* not found",
        "a socket whose other end is outside",
    ),
    (r"Can't dump (?:ghost|unlinked).*|ghost file .* (?:size|limit)", "a deleted file that is too large"),
    (r"io_uring", "an io_uring"),
    (r"Can't lookup mount=", "a file that belongs to no mount of the sandbox"),
    (r"[Cc]an't dump (\S+ \S+ \S+)", "{0}"),
    (r"[Uu]nsupported ([^\n]+)", "{0}"),
    (r"perf_event|userfaultfd|bpf", "an open perf event, userfaultfd or bpf object"),
    (r"Can't dump device|/dev/nvidia", "an open device"),
)


def start(
    program: Program,
    place: Place,
    verb: str,
    words: Sequence[str],
    *,
    images: int,
    work: int,
    nothing: int,
    user: tuple[int, int] | None = None,
    held: Sequence[int] = (),
    needs: Sequence[int] = (),
    last_pid: int = 0,
    prepare: Callable[[], None] = lambda: None,
) -> Run:
    """A criu that enters `place` and begins when it is told to.

    Args:
        program: Which.
        place: Where.
        verb: "dump" or "restore".
        words: Further arguments.
        images: Directory of the image.
        work: Directory for the log.
        nothing: An empty directory, where it finds no plugins.
        user: Whom to run it as where root lacks a capability that user does not need.
        held: Descriptors that are closed when it has ended.
        needs: Further descriptors that it is to have.
        last_pid: Numbers up to this one are for what is restored.
        prepare: What is done in there before.
    """
    executable, first, fds = program.command()
    arguments = [*first, verb, *OPTIONS, "-D", f"/proc/self/fd/{images}", "-W", f"/proc/self/fd/{work}"]
    arguments += ["-o", f"{verb}.log"]
    arguments += ["-L", f"/proc/self/fd/{nothing}", f"--ghost-limit={GHOST_LIMIT_BYTES}", *words]
    env = dict(ENVIRONMENT)
    if user is not None:
        arguments.append("--unprivileged")
        env["XDG_RUNTIME_DIR"] = DOOR
    command = executable, arguments, [*fds, images, work, nothing, *needs]
    joins = verb == "restore"
    return Run(place, command, env=env, user=user, held=held, join=joins, last_pid=last_pid, prepare=prepare)


def dump_user(uid: int, gid: int) -> tuple[int, int] | None:
    """Whom to dump as: root cannot read another user's limits without CAP_SYS_RESOURCE, that user can."""
    return None if uid == 0 or linux.has_capability(linux.CAP_SYS_RESOURCE) else (uid, gid)


def explain(work: int, verb: str, code: int) -> HelperError:
    """What the log of a run that failed says, as an error."""
    log = read_log(work, verb)
    errors = [line for line in log.splitlines() if "Error" in line and HARMLESS not in line]
    details: dict[str, object] = {"criu": errors[-6:], "exit_code": code}
    text = "\n".join(errors)
    if not errors and _is_full(work):
        return no_room("its disk")  # The log did not find room either.
    # What criu has in the kernel says that the pipe to it broke.
    if code > 128 and all("pie: " in line for line in errors):
        return HelperError(
            "snapshot_failed", f"CRIU was killed by signal {code - 128}", hint="Try again.", details=details
        )
    for pattern, kind, meaning in _NAMED:
        match = re.search(pattern, text)
        if match is None:
            continue
        if kind == "storage_full":
            return no_room("its disk")
        if kind == "conflict":
            return HelperError(
                "conflict",
                "A process of the sandbox has a number that the snapshot needs",
                hint="Restore into a sandbox in which nothing was started.",
                details=details,
            )
        if verb == "restore":
            what, expected, found = meaning.format(*match.groups()).split("|")
            problem = incompatible(_absolute(what), expected, found, hint="Put the file back as it was, or start anew.")
            problem.details.update(details)
            return problem
    if verb == "dump":
        for pattern, meaning in _UNDUMPABLE:
            match = re.search(pattern, text)
            if match is not None:
                what = meaning.format(*match.groups())
                return HelperError(
                    "unsupported",
                    f"The kernel holds what cannot be saved: {what}",
                    hint="Close it in the kernel and try again; `details` has what CRIU says.",
                    details=details,
                )
    last = re.sub(r"^\(\d+\.\d+\) *", "", errors[-1]) if errors else f"exit code {code}"
    first = re.sub(r"^\(\d+\.\d+\) *", "", errors[0]) if errors else last
    return HelperError(
        "snapshot_failed",
        f"CRIU could not {verb} the kernel: {first}",
        hint="`details` has the last lines of its log.",
        details=details,
    )


def read_log(work: int, verb: str) -> str:
    """The log of a run; empty if there is none."""
    with contextlib.suppress(OSError):
        fd = os.open(f"{verb}.log", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=work)
        with os.fdopen(fd, errors="replace") as file:
            return file.read(1 << 20)
    return ""


def _is_full(folder: int) -> bool:
    found = os.fstatvfs(folder)
    return found.f_bavail * found.f_frsize < ROOM_LEFT_BYTES or (found.f_files > 0 and found.f_favail == 0)


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"/{path}"
