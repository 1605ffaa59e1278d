"""Which criu is run, and how: opened on the host, executed by descriptor inside a sandbox, loading nothing from there.

criu is a dynamic program and newer than most systems, so it has libraries, often even a libc, of its own. Its loader is
run from a sealed copy in memory in which the name of the one file that it would take from the sandbox is gone:
`/etc/ld.so.preload` names libraries that every program loads first.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import stat
import subprocess

from warmcell.sandbox.helper.problems import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VARIABLE = "WARMCELL_CRIU"
IMPORTS_VARIABLE = "WARMCELL_HELPER_IMPORTS"
"""Set to 1 by the operator: users other than root may bring in images that this helper did not write."""
PLAIN_VARIABLE = "WARMCELL_PLAIN_IMAGES"
"""If set, images stay as criu wrote them; for measurements."""
OLDEST = (4, 2)
PREFIXES = ("/opt/warmcell/criu",)
"""Where `warmcell criu` installs unless it is told otherwise."""
SYSTEM = ("/usr/local/sbin/criu", "/usr/local/bin/criu", "/usr/sbin/criu", "/usr/bin/criu")
CURE = "As root run `warmcell criu`, which puts CRIU 4.2 or newer beside the system's, or install one by hand."
ENVIRONMENT = {"LC_ALL": "C", "PATH": "/nowhere"}
_PRELOAD = b"/etc/ld.so.preload\0"
_NOTHING = b"/proc/nothing/here\0"


class Program:
    """A criu that was found and answers."""

    def __init__(self, path: str, loader: str, libraries: Sequence[str], version: str) -> None:
        self.path = path
        self.loader = loader
        """Empty where the program needs none."""
        self.libraries = list(libraries)
        self.version = version
        self._fds: tuple[int, list[int], int] | None = None

    def command(self) -> tuple[int, list[str], list[int]]:
        """What to execute: a descriptor, the first words of its arguments, and the descriptors that it needs."""
        if self._fds is None:
            program = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            folders = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in self.libraries]
            self._fds = program, folders, _sealed_loader(self.loader) if self.loader else -1
        program, folders, loader = self._fds
        if not self.loader:
            return program, ["criu"], [program]
        search = ":".join(f"/proc/self/fd/{fd}" for fd in folders)
        words = ["criu", "--inhibit-cache", "--library-path", search, "--argv0", "criu", f"/proc/self/fd/{program}"]
        return loader, words, [loader, program, *folders]


def find(environment: Mapping[str, str], *, owners: Sequence[int] = (0,)) -> Program:
    """The criu of this machine; WARMCELL_CRIU, if set, is the only one looked at.

    Args:
        environment: Where that, and PATH, are looked up.
        owners: Whose files it may be, besides this process's user.

    Raises:
        HelperError: There is none, or it is too old, or somebody else could change it.
    """
    named = environment.get(VARIABLE)
    reasons: list[str] = []
    for place in [named] if named else [*PREFIXES, *_on_path(environment), *SYSTEM]:
        found_at = layout(place)
        if found_at is None:
            if named:
                reasons.append(f"{place} is not there")
            continue
        try:
            found = _tried(*found_at, owners=owners)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reasons.append(f"{place}: {error}")
            continue
        if tuple(map(int, found.version.split(".")[:2])) >= OLDEST:
            return found
        reasons.append(f"{place} is CRIU {found.version}, too old")
    why = "; ".join(dict.fromkeys(reasons)) or "none is installed"
    raise HelperError(
        "backend_unavailable", f"No CRIU of this machine can be used: {why}", hint=CURE, details={"required": "criu"}
    )


def _on_path(environment: Mapping[str, str]) -> list[str]:
    folders = [folder for folder in environment.get("PATH", "").split(":") if folder.startswith("/")]
    return [f"{folder}/criu" for folder in folders]


def layout(place: str) -> tuple[str, str, list[str]] | None:
    """Program, loader (empty: none) and libraries of a prefix, or of a program of the system; None if there is none."""
    if os.path.isdir(place):
        program, loader, libraries = f"{place}/sbin/criu", f"{place}/lib/ld.so", f"{place}/lib"
        return (program, loader, [libraries]) if os.path.isfile(program) else None
    if not os.path.isfile(place):
        return None
    place = os.path.realpath(place)
    prefix = os.path.dirname(os.path.dirname(place))
    if os.path.isfile(f"{prefix}/lib/ld.so"):
        return place, f"{prefix}/lib/ld.so", [f"{prefix}/lib"]
    with open(place, "rb") as file:
        head = file.read(4096)
    interpreter = re.search(rb"(/[\x21-\x7e]*/ld[\x21-\x7e]*\.so[\x21-\x7e]*)\0", head)
    if interpreter is None:
        return place, "", []
    loader = os.path.realpath(interpreter.group(1).decode())
    listed = subprocess.run([loader, "--list", place], capture_output=True, text=True, timeout=10, check=False)
    found = re.findall(r"=> (/\S+)", listed.stdout)
    return place, loader, list(dict.fromkeys(os.path.dirname(path) for path in found))


def _tried(program: str, loader: str, libraries: list[str], *, owners: Sequence[int]) -> Program:
    for path in [program, *libraries, *([loader] if loader else [])]:
        _check_owner(os.path.realpath(path), (*owners, os.getuid()))
    argv = [loader, "--library-path", ":".join(libraries), program] if loader else [program]
    said = subprocess.run([*argv, "--version"], capture_output=True, text=True, timeout=10, check=False)
    version = re.search(r"Version: (\d+\.\d+(?:\.\d+)?)", said.stdout)
    if version is None:
        raise ValueError((said.stderr or said.stdout).strip() or f"exit code {said.returncode}")
    return Program(program, loader, libraries, version.group(1))


def _check_owner(path: str, owners: Sequence[int]) -> None:
    """What root runs, only root may be able to change, or who has root's rights anyway."""
    found = os.stat(path)
    if found.st_uid not in owners or stat.S_IMODE(found.st_mode) & 0o022:
        raise ValueError(f"{path} could be changed by others than root")


def _sealed_loader(path: str) -> int:
    with open(path, "rb") as file:
        content = file.read()
    if content.count(_PRELOAD) != 1 or len(_PRELOAD) != len(_NOTHING):
        raise HelperError(
            "backend_unavailable",
            f"The loader {path} is not one that is known: it would load what a sandbox names",
            hint=CURE,
        )
    made = os.memfd_create("criu", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(content.replace(_PRELOAD, _NOTHING))
    while view:
        view = view[os.write(made, view) :]
    fcntl.fcntl(
        made, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    )
    return made


def release() -> str:
    """Of Linux, as in "6.18.5"."""
    return os.uname().release


@functools.cache
def flags() -> list[str]:
    """What the processors of this machine can do."""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                return sorted(line.partition(":")[2].split())
    return []


def boot_id() -> str:
    """Of the running system; another one after each start of the machine."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
