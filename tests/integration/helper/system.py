"""A machine's helper for a test, and questions to it as anybody."""

import asyncio
import contextlib
import ctypes
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import OrdinaryUser
from tests.lanes import TOP, bwrap
from tests.leaks import Places
from warmcell.sandbox.backends.bubblewrap.binary import OVERRIDE
from warmcell.sandbox.helper.capabilities import NEEDED
from warmcell.sandbox.helper.start import system_command
from warmcell.sandbox.snapshots.criu import SOCKET_VARIABLE, helper_environment

START_TIMEOUT_S = 60.0
NOTIFY = "NOTIFY_SOCKET"
MOST = 4
"""Sandboxes of one user."""
AS_IN_ITS_UNIT = (
    "setpriv",
    "--bounding-set",
    ",".join(["-all", *(f"+{name.lower()}" for name in NEEDED)]),
    "--no-new-privs",
)
"""A command that starts another one with the rights that the unit leaves the helper, and no others."""
SCRIPT = TOP / "tests" / "integration" / "helper" / "as_user.py"


class Told:
    """What stands in for a service manager."""

    def __init__(self, heard: socket.socket) -> None:
        self._heard = heard
        self.name = "@" + heard.getsockname()[1:].decode()

    def wait(self) -> None:
        """Until a helper says that it listens."""
        assert self._heard.recv(100) == b"READY=1"


@contextlib.contextmanager
def listening() -> Iterator[Told]:
    """Hear what a helper tells its service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(f"\0warmcell-test-{secrets.token_hex(8)}")
        heard.settimeout(START_TIMEOUT_S)
        yield Told(heard)


class SystemHelper:
    """The helper, run by root as a machine's would be, with a socket and images of the test's own."""

    def __init__(self, places: Places, *, most: int = MOST) -> None:
        places.root.chmod(0o711)
        self._most = most
        self.folder = places.root / "h"
        self.path = self.folder / "helper.sock"
        self.images = places.root / "images"
        self.log = places.root / "helper.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        argv = system_command(sys.executable, socket=str(self.path), images=str(self.images), most=self._most)
        with listening() as told, self.log.open("ab") as log:
            env = {**helper_environment(), OVERRIDE: str(bwrap()), NOTIFY: told.name}
            argv = [*AS_IN_ITS_UNIT, *argv]
            self._process = subprocess.Popen(argv, env=env, stderr=log, stdin=subprocess.DEVNULL, cwd="/", umask=0o077)
            try:
                told.wait()
            except TimeoutError:
                self.end()
                raise AssertionError(self.said()) from None

    def end(self, signum: int = signal.SIGTERM) -> int:
        """End it; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signum)
        return process.wait(60)

    def said(self) -> str:
        """Its log."""
        return self.log.read_text()

    async def ask(self, request: dict[str, Any], *fds: int, uid: int) -> dict[str, Any]:
        """What it answers to this uid."""
        said: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: said.append(self._ask(request, fds, uid)))
        thread.start()
        await asyncio.to_thread(thread.join, 30)
        return said[0]

    def _ask(self, request: dict[str, Any], fds: tuple[int, ...], uid: int) -> dict[str, Any]:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(60)
        # Credentials are those of the thread that connects; the C library would change those of all threads.
        _set_thread_uid(uid)
        connection.connect(str(self.path))
        _set_thread_uid(0)
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        with connection, ours, theirs:
            apart = request["op"] == "restore"  # Each clone is answered on a socket that comes with its request.
            sent = [*fds, theirs.fileno()] if apart else list(fds)
            with contextlib.suppress(BrokenPipeError):  # It has refused already.
                socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], sent)
            with (ours if apart else connection).makefile() as answers:
                answer: dict[str, Any] = json.loads(answers.readline())
                return answer


class User:
    """Somebody whose Python runs `as_user.py`."""

    def __init__(self, user: OrdinaryUser, helper: SystemHelper) -> None:
        self.uid = user.uid
        self.places = user.places
        self.home = user.home
        self._argv = user.argv
        self.env = {**user.env, SOCKET_VARIABLE: str(helper.path), "PYTHONPATH": str(TOP)}

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        """Start the script."""
        return await asyncio.create_subprocess_exec(
            *self._argv(sys.executable, str(SCRIPT), *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self.env,
            cwd="/",
        )

    async def run(self, *words: str, told: object = None, timeout: float = 90) -> list[Any]:
        """Run the script: the JSON lines that it prints."""
        process = await self.start(*words)
        stdout, _ = await asyncio.wait_for(process.communicate(json.dumps(told).encode()), timeout)
        assert process.returncode == 0, stdout.decode()
        return [json.loads(line) for line in stdout.splitlines()]

    def python(self, *words: str) -> list[str]:
        """The command line of this Python as that user."""
        return self._argv(sys.executable, *words)

    async def start_box(self, told: dict[str, Any]) -> "Held":
        """A sandbox that stays until it is ended."""
        process = await self.start("box")
        assert process.stdin is not None
        process.stdin.write(json.dumps(told).encode())
        process.stdin.write_eof()
        held = Held(process)
        held.about = await held.line()
        held.said = [await held.line() for _ in told.get("scripts", ())]
        return held

    def folder(self, name: str) -> Path:
        """A directory of the user's."""
        path = self.home / name
        path.mkdir(parents=True)
        os.chown(path, self.uid, self.uid)
        return path


class Held:
    """A sandbox, with the program that made it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.about: dict[str, Any] = {}
        self.said: list[dict[str, Any]] = []

    @property
    def pid(self) -> int:
        """Of its first process."""
        return int(self.about["pid"])

    async def line(self) -> Any:
        """What the program says next."""
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 60)
        assert line, "the program has ended"
        return json.loads(line)

    def kill(self) -> None:
        """Kill the program that made it."""
        self._process.kill()

    async def hang_up(self) -> None:
        """End the program, and wait until both are gone."""
        if self._process.returncode is None:
            self._process.kill()
        await self.gone()
        await self._process.communicate()

    async def gone(self) -> None:
        """Wait until no process of the sandbox is left."""
        for pid in self.about["processes"]:
            try:
                process = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                assert await asyncio.to_thread(lambda fd=process: select.select([fd], [], [], 20)[0]), f"{pid} is left"
            finally:
                os.close(process)


def _set_thread_uid(uid: int) -> None:
    setresuid = 117
    keep = ctypes.c_uint(0xFFFFFFFF)
    assert ctypes.CDLL(None).syscall(setresuid, keep, ctypes.c_uint(uid), keep) == 0
