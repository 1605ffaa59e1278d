"""Whether snapshots work on this machine: a small process is saved and restored, once for each boot and criu."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import tempfile

from warmcell.sandbox.helper import criu, enter, linux, places
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.program import boot_id, release

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from warmcell.sandbox.helper.places import Place
    from warmcell.sandbox.helper.program import Program

NOTHING, KNOWN = ".nothing", ".known.json"
SUBJECT_PID = 1001
START_TIMEOUT_S = 60.0


def nothing(base: str) -> int:
    """A descriptor of a directory that is empty."""
    os.makedirs(f"{base}/{NOTHING}", 0o700, exist_ok=True)
    return os.open(f"{base}/{NOTHING}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def check(program: Program, base: str) -> None:
    """Try it, or know already how a try ended.

    Raises:
        HelperError: It does not work here.
    """
    known = _known(program, base)
    if known.get("problem"):
        raise HelperError("backend_unavailable", known["problem"], hint=known["hint"])


def cache(program: Program, base: str) -> bytes:
    """What criu found out about this kernel, for later runs; empty where it could not say."""
    return bytes.fromhex(str(_known(program, base).get("cache", "")))


def _known(program: Program, base: str) -> dict[str, Any]:
    key = [boot_id(), release(), program.version, program.path]
    path = f"{base}/{KNOWN}"
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        said = json.load(file)
        if isinstance(said, dict) and said.get("key") == key:
            return said
    os.makedirs(base, 0o700, exist_ok=True)
    said = {"key": key, **_tried(program, base)}
    with tempfile.NamedTemporaryFile("w", dir=base, prefix=".new-known-", delete=False) as made:
        json.dump(said, made)
    os.rename(made.name, path)
    return said


def _tried(program: Program, base: str) -> dict[str, Any]:
    try:
        with tempfile.TemporaryDirectory(dir=base, prefix=".try-") as directory:
            return {"cache": _saved_and_restored(program, base, directory).hex()}
    except HelperError as error:
        return {"problem": error.message, "hint": error.hint}
    except OSError as error:
        hint = "Snapshots need root with all its capabilities, SYS_RESOURCE excepted; containers withhold them."
        return {"problem": f"The first try of a snapshot failed: {error}", "hint": hint}


def _saved_and_restored(program: Program, base: str, directory: str) -> bytes:
    images = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    empty = nothing(base)
    try:
        with _Small() as source:
            words = ["-t", str(source.start_subject())]
            _run(program, source.place, "dump", words, images, empty)
        with _Small() as target:
            _run(program, target.place, "restore", ["--restore-detached"], images, empty)
            target.place.find(SUBJECT_PID)
            return target.read_cache()
    finally:
        os.close(images)
        os.close(empty)


def _run(program: Program, place: Place, verb: str, words: list[str], images: int, empty: int) -> None:
    running = criu.start(program, place, verb, words, images=images, work=images, nothing=empty)
    running.go()
    code = running.wait(timeout_s=30)
    if code != 0:
        raise criu.explain(images, verb, code)


class _Small:
    """Namespaces with nothing in them but a first process, which does nothing."""

    def __init__(self) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        self._outer = os.fork()
        if self._outer == 0:
            try:
                linux.die_with_parent()
                linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
                first = os.fork()
                if first == 0:
                    _be_first(writing)
                os.write(writing, f"{first}\n".encode())
                os.close(writing)
                os.waitpid(first, 0)
            finally:
                os._exit(1)
        os.close(writing)
        said = _heard(reading)
        os.close(reading)
        if b"up" not in said:
            self._end()
            raise HelperError(
                "backend_unavailable",
                "This root may not make namespaces",
                hint="Run it outside of the container, or give that CAP_SYS_ADMIN.",
            )
        self._first = int(next(line for line in said.splitlines() if line.isdigit()))
        pidfd = os.pidfd_open(self._first)
        self.place = places.identify(pidfd, 0)
        os.close(pidfd)

    def start_subject(self) -> int:
        """A process that waits for nothing; its number in there."""
        last = os.open("/proc/sys/kernel/ns_last_pid", os.O_WRONLY | os.O_CLOEXEC)

        def work() -> int:
            os.pwrite(last, str(SUBJECT_PID - 1).encode(), 0)
            reading, writing = os.pipe2(os.O_CLOEXEC)
            child = os.fork()
            if child == 0:
                os.setsid()
                os.chdir("/")
                null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
                for number in (0, 1, 2):
                    os.dup2(null, number)
                linux.close_but([writing])
                os.execve("/bin/sleep", ["sleep", "infinity"], {})
            os.close(writing)
            os.read(reading, 1)  # Closed by the exec.
            return child

        try:
            found = enter.do(self.place, work, namespaces=("mnt", "pid"))
            if found != SUBJECT_PID:
                raise HelperError("backend_unavailable", "Process numbers cannot be chosen here", hint="Run as root.")
            return SUBJECT_PID
        finally:
            os.close(last)

    def read_cache(self) -> bytes:
        """What criu has left for its next run."""

        def work() -> str:
            with contextlib.suppress(OSError), open(f"/run/{criu.CACHE}", "rb") as file:
                return file.read().hex()
            return ""

        return bytes.fromhex(enter.do(self.place, work))

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._outer, signal.SIGKILL)
        os.waitpid(self._outer, 0)

    def __enter__(self) -> _Small:
        return self

    def __exit__(self, *ended: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._first, signal.SIGKILL)
        self._end()


def _be_first(writing: int) -> None:
    try:
        linux.die_with_parent()
        linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
        linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV)
        linux.mount("run", "/run", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0755,size=1m")
        linux.mount("tmp", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=0700,size=1m")
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        os.write(writing, b"up\n")
        os.close(writing)
        while True:
            signal.pause()
    finally:
        os._exit(1)


def _heard(fd: int) -> bytes:
    waiting = select.poll()
    waiting.register(fd, select.POLLIN | select.POLLHUP)
    said = b""
    while waiting.poll(1e3 * START_TIMEOUT_S):
        data = os.read(fd, 4096)
        if not data:
            break
        said += data
    return said
