"""What a log of CRIU means: an error with a code and a cure, naming what is in the way."""

import os
from pathlib import Path

import pytest

from warmcell.sandbox.helper import criu


def explained(directory: Path, verb: str, log: str, *, code: int = 1) -> dict[str, object]:
    """The error for a run with this log."""
    (directory / f"{verb}.log").write_text(log)
    fd = os.open(directory, os.O_RDONLY)
    try:
        return criu.explain(fd, verb, code).to_json()
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("verb", "line", "code", "names"),
    [
        ("dump", "Error (criu/image.c:1): Can't write: No space left on device", "storage_full", "room"),
        ("dump", "Error (criu/sk-unix.c:9): unix: Unix socket 0x1 not found", "unsupported", "socket"),
        ("dump", "Error (criu/sk-inet.c:2): inet: Connected TCP socket, consider using", "unsupported", "network"),
        ("dump", "Error (criu/files.c:3): Can't dump file 7 of type", "unsupported", "file 7 of"),
        ("dump", "Error (criu/cr-dump.c:4): Something that nobody foresaw", "snapshot_failed", "nobody foresaw"),
        (
            "restore",
            "Error (criu/files-reg.c:1): File home/me/data.csv has bad size 8 (expect 9)",
            "snapshot_incompatible",
            "/home/me/data.csv",
        ),
        (
            "restore",
            "Error (criu/files-reg.c:2): Can't open file tmp/x on restore: No such file or directory",
            "snapshot_incompatible",
            "/tmp/x",
        ),
        (
            "restore",
            "Error (criu/files-reg.c:2): Can't open file home/me/log on restore: Read-only file system",
            "snapshot_incompatible",
            "/home/me/log was open for writing and is read-only",
        ),
        ("restore", "Error (criu/cr-restore.c:5): Pid 1003 do not match, already exists", "conflict", "number"),
        ("restore", "Error (criu/mem.c:5): Broken", "snapshot_failed", "Broken"),
    ],
)
def test_what_the_log_says(tmp_path: Path, verb: str, line: str, code: str, names: str) -> None:
    """The code, and in the message what it is about; with a cure, and the log's own lines where that helps."""
    said = explained(tmp_path, verb, f"(00.001) Warn  (criu/x.c:1): no matter\n(00.002) {line}\n")
    assert said["code"] == code, said
    assert names in str(said["message"])
    assert said["hint"]


@pytest.mark.parametrize("log", ["", "(1) pie: 1001: Error (criu/pie/parasite.c:92): Can't splice pages (-32)\n"])
def test_that_it_was_killed_is_said(tmp_path: Path, log: str) -> None:
    """Also where what it has in the kernel still had something to say; but not where it failed by itself before."""
    assert explained(tmp_path, "dump", log, code=137)["message"] == "CRIU was killed by signal 9"
    failed = explained(tmp_path, "dump", f"(0) Error (criu/mem.c:5): Broken\n{log}", code=137)
    assert "Broken" in str(failed["message"])


def test_sizes_are_told(tmp_path: Path) -> None:
    """What was expected and what was found, not the other way round."""
    said = explained(tmp_path, "restore", "(1) Error (criu/f.c:1): File a has bad size 8 (expect 9)\n")
    details = said["details"]
    assert isinstance(details, dict)
    assert (details["expected"], details["found"]) == ("9 bytes", "8 bytes")


def test_what_does_no_harm_is_not_the_cause(tmp_path: Path) -> None:
    """criu says at every restore without CAP_SYS_RESOURCE that it cannot raise a limit; the cause comes after it."""
    log = "(1) Error (criu/util.c:1): rlimit: Can't setup RLIMIT_NOFILE for self: No\n(2) Error (criu/x.c:1): Cause\n"
    assert "Cause" in str(explained(tmp_path, "restore", log)["message"])
    assert "signal 9" in str(explained(tmp_path, "restore", log.splitlines()[0], code=137)["message"])


def test_a_kill_is_told_from_a_failure(tmp_path: Path) -> None:
    """Exit codes above 128 are signals."""
    assert "signal 9" in str(explained(tmp_path, "dump", "", code=137)["message"])


def test_a_log_that_is_missing(tmp_path: Path) -> None:
    """Still an error that says something, not one about the log."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        said = criu.explain(fd, "dump", 7).to_json()
    finally:
        os.close(fd)
    assert said["code"] == "snapshot_failed"
    assert "exit code 7" in str(said["message"])
