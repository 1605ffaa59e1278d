"""The helper of a machine: one for all its users, on a socket that each may connect to."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat

from warmcell.sandbox.helper import linux
from warmcell.sandbox.helper.maker import SANDBOXES_MAX, Maker
from warmcell.sandbox.helper.operations import Helper
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.helper.server import serve

SOCKET = "/run/warmcell-helper/helper.sock"
IMAGES = "/var/lib/warmcell"
PRIVATE = "private"
BACKLOG = 128


def run(*, path: str = SOCKET, images: str = IMAGES, most: int = SANDBOXES_MAX, lifeline: int | None = None) -> None:
    """Serve until SIGTERM comes.

    Args:
        path: Of its socket; what else it needs while it runs is beside it.
        images: Directory of all users' images.
        most: Sandboxes of one user at a time.
        lifeline: A descriptor whose other end closes when nobody needs it any more.

    Raises:
        HelperError: It cannot serve here.
    """
    if os.getuid() != 0:
        raise HelperError("backend_unavailable", "The helper needs root", hint="Run it with sudo, or as a service.")
    os.umask(0o077)
    os.chdir("/")
    linux.name_process("warmcell-helper")
    folder = os.path.dirname(path)
    os.makedirs(folder, 0o755, exist_ok=True)
    _check_own(folder)
    os.chmod(folder, 0o755)  # noqa: S103  # Users connect to what is in it.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(path)
        os.chmod(path, 0o666)  # noqa: S103  # Who may do what is decided by who connects.
        listening.listen(BACKLOG)
        try:
            maker = Maker(f"{folder}/{PRIVATE}", most=most)
            helper = Helper(images, os.environ, maker=maker)
            serve(listening, helper, lifeline=lifeline, told=lambda: tell_manager("READY=1"))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def tell_manager(word: str) -> None:
    """Tell the service manager that has started it, if one has."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.sendto(word.encode(), f"\0{address[1:]}" if address.startswith("@") else address)


def _check_own(folder: str) -> None:
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or stat.S_IMODE(found.st_mode) & 0o022:
        raise HelperError(
            "backend_unavailable", f"{folder} is not a directory of root's alone", hint=f"Remove {folder}."
        )


def main(arguments: list[str]) -> None:
    """As a program: `system.main([SOCKET, IMAGES, MOST])`, all optional."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = dict(zip(("path", "images", "most"), arguments, strict=False))
    most = int(given.pop("most", SANDBOXES_MAX))
    run(path=given.get("path", SOCKET), images=given.get("images", IMAGES), most=most)
