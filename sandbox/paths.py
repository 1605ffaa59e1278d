"""Where things lie on the host: run directories, state, and the machine's GPU leases.

Nothing here is made at import. Paths of Unix sockets must stay below 107 bytes, so the runtime
directory is short and sandbox directories are one letter deep.
"""

import errno
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.errors import BackendUnavailableError, StorageFullError, WarmcellError

SOCKET_PATH_MAX = 107
"""Bytes of `sun_path` on Linux, less the closing zero."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What a disk that is full answers."""
LEAST_ROOM = 2**20
"""Bytes that a keeper needs in a directory to come up at all: its log, what it mounts into sandboxes."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Directories of one user (`runtime`, `state`) and of the machine (`leases`)."""

    runtime: Path
    """Sockets and run directories; gone after a reboot. 0700."""
    state: Path
    """Ledger, logs, persistent homes. 0700."""
    leases: Path
    """One lock file per GPU, shared by all users of the machine."""

    @classmethod
    def default(cls) -> "Paths":
        """From WARMCELL_RUNTIME_DIR, WARMCELL_STATE_DIR, WARMCELL_LEASE_DIR, else the XDG places.

        Raises:
            BackendUnavailableError: One of them is not absolute, so that each program would take it for another.
        """
        uid = os.getuid()
        return cls(
            runtime=_given("WARMCELL_RUNTIME_DIR") or _runtime_base(uid),
            state=_given("WARMCELL_STATE_DIR") or _state_base(),
            leases=_given("WARMCELL_LEASE_DIR") or Path("/run/lock/warmcell"),
        )

    @property
    def keeper_socket(self) -> Path:
        return self.runtime / "keeper.sock"

    @property
    def keeper_lock(self) -> Path:
        return self.runtime / "keeper.lock"

    @property
    def keeper_log(self) -> Path:
        return self.state / "keeper.log"

    @property
    def sandboxes(self) -> Path:
        """Run directories, one per sandbox, named by its id."""
        return self.runtime / "s"

    @property
    def usage(self) -> Path:
        """What sandboxes have used: a file of SQLite."""
        return self.state / "usage.sqlite"

    @property
    def ledger(self) -> Path:
        """Which kernels Jupyter servers have, for a keeper that comes after this one."""
        return self.state / "kernels.json"

    @property
    def principals(self) -> Path:
        """Who may use this user's sandboxes with a token, and the hashes of the tokens."""
        return self.state / "principals.json"

    @property
    def ticket_key(self) -> Path:
        """What URLs of files and ports are signed with."""
        return self.state / "ticket.key"

    @property
    def e2b_key(self) -> Path:
        """Of what the tokens of single sandboxes are made, for clients that speak E2B's wire."""
        return self.state / "e2b.key"

    @property
    def layers(self) -> Path:
        """Writable layers of sandboxes, where those cannot be in memory."""
        return self.state / "layers"

    @property
    def snapshots(self) -> Path:
        """Manifests and writable layers, one directory per snapshot."""
        return self.state / "snapshots"

    @property
    def images(self) -> Path:
        """Memory images of root's own keeper; those of ordinary users are the helper's."""
        return self.state / "images"

    @property
    def environments(self) -> Path:
        """Python environments that were built as images, one directory each, and what is known of all images."""
        return self.state / "environments"

    @property
    def helper_socket(self) -> Path:
        """Root's own helper, as long as its keeper runs."""
        return self.runtime / "helper.sock"

    @property
    def kernels(self) -> Path:
        """Sockets that Jupyter clients connect to, one directory per kernel."""
        return self.runtime / "k"

    def make(self) -> "Paths":
        """Create the user's directories, 0700.

        Raises:
            BackendUnavailableError: One of them belongs to somebody else, is a link, or the path is too long
                for a Unix socket.
        """
        for directory in (self.runtime, self.state, self.sandboxes, self.kernels):
            private_directory(directory)
        longest = len(os.fsencode(self.sandboxes / ("x" * 12) / "run" / "k9999-5"))
        if longest > SOCKET_PATH_MAX:
            raise BackendUnavailableError(
                f"The runtime directory {self.runtime} is too long for Unix sockets",
                hint="Set WARMCELL_RUNTIME_DIR to a directory with a short path, such as /run/user/1000/wc.",
            )
        return self


def private_directory(path: Path) -> Path:
    """Create `path` for its owner alone, or check that it is so.

    Raises:
        BackendUnavailableError: It cannot be made, is a link, or belongs to another user.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BackendUnavailableError(
            f"{path} cannot be made: {error.strerror}",
            hint="Free the path, or set WARMCELL_RUNTIME_DIR and WARMCELL_STATE_DIR to places where you may write.",
        ) from error
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise BackendUnavailableError(
            f"{path} is not a directory of this user", hint=f"Remove {path} or set WARMCELL_RUNTIME_DIR elsewhere."
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(0o700)
    return path


def try_to_write(paths: Paths) -> None:
    """Write to the user's directories as a keeper will, and leave nothing. Blocks.

    Raises:
        WarmcellError: One of them cannot be made or written.
    """
    for directory, variable in ((paths.runtime, "WARMCELL_RUNTIME_DIR"), (paths.state, "WARMCELL_STATE_DIR")):
        private_directory(directory)
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                file.write(bytes(LEAST_ROOM))
        except OSError as error:
            raise cannot_write(directory, variable, error) from error


def cannot_write(directory: Path, variable: str, error: OSError) -> WarmcellError:
    """What an error of writing to a directory means, which that variable can put elsewhere."""
    elsewhere = f"or set {variable} to a directory"
    if error.errno in FULL:
        return StorageFullError(
            f"There is no room in {directory}: {error.strerror}", hint=f"Free space there, {elsewhere} that has room."
        )
    return BackendUnavailableError(
        f"{directory} cannot be written: {error.strerror}", hint=f"Let this user write there, {elsewhere} where it may."
    )


def no_room(directory: Path) -> StorageFullError:
    """The file system of the runtime directory is full."""
    return StorageFullError(
        f"There is no room left for sandboxes in {directory}",
        hint="End other kernels, free space there, or set WARMCELL_RUNTIME_DIR to a larger file system.",
    )


def _given(variable: str) -> Path | None:
    given = os.environ.get(variable)
    if not given:
        return None
    if not os.path.isabs(given):
        raise BackendUnavailableError(
            f"{variable} is {given!r}, which is not an absolute path", hint=f"Begin {variable} with a slash."
        )
    return Path(given)


def _runtime_base(uid: int) -> Path:
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given and os.access(given, os.W_OK):
        return Path(given) / "warmcell"
    usual = Path(f"/run/user/{uid}")
    if os.access(usual, os.W_OK):
        return usual / "warmcell"
    return Path("/run/warmcell") if uid == 0 else Path(f"/tmp/warmcell-{uid}")


def _state_base() -> Path:
    given = os.environ.get("XDG_STATE_HOME")
    return (Path(given) if given else Path.home() / ".local" / "state") / "warmcell"
