"""A helper for who is not root but may use an engine of containers: a small privileged container of that engine's.

Nothing of its image is used, which has nothing: what runs in it is the host's own Python with this package, as the
keeper itself is. It serves its keeper alone and ends with it.
"""

import asyncio
import contextlib
import logging
import os
import select
import shutil
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from warmcell.sandbox.backends.docker import DockerBackend, empty
from warmcell.sandbox.backends.docker.labels import PREFIX, ours
from warmcell.sandbox.backends.docker.orphans import remember
from warmcell.sandbox.backends.processes import keeper_mark, start_time
from warmcell.sandbox.backends.threads import ENGINE
from warmcell.sandbox.errors import BackendUnavailableError, TransportError, WarmcellError
from warmcell.sandbox.helper.capabilities import NEEDED
from warmcell.sandbox.helper.program import layout
from warmcell.sandbox.helper.start import agent_command
from warmcell.sandbox.helper.system import IMAGES
from warmcell.sandbox.models import SandboxId
from warmcell.sandbox.paths import Paths
from warmcell.sandbox.snapshots.criu import CLOSE_TIMEOUT_S, Helper, connected, hello, helper_environment, listening

log = logging.getLogger(__name__)

IMAGES_VARIABLE = "WARMCELL_HELPER_IMAGES"
"""Where images are, if not where a machine's helper has them."""
HOST = "/host"
"""Where the container has the machine's files, before what runs in it leaves all else behind."""
START_TIMEOUT_S = 60.0
TRY_AGAIN_S = 30.0
"""An engine that refuses is not asked at each kernel's start."""
LOG_BYTES = "1m"
IN_ADMIN = "CHECKPOINT_RESTORE"
"""A part of SYS_ADMIN, by a name that engines of Docker 20.10 refuse."""
PROGRAM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin"
_INSTALL = "Let root run `warmcell helper install`, once for the machine: it needs no engine."


class FirstOf:
    """Implements `Helper`: the machine's, where it has one that can save memory, else an agent of the keeper's own."""

    def __init__(self, machine: Helper | None, agent: Helper) -> None:
        """Configure it.

        Args:
            machine: The machine's helper; None: it is not to be used.
            agent: What is used, and started for it, where that does not answer.
        """
        self._machine, self._agent = machine, agent
        self._ready, self._asked_at = False, -TRY_AGAIN_S

    async def connect(self) -> socket.socket:
        """See `Helper`."""
        if self._machine is not None and await self._is_ready(self._machine):
            with contextlib.suppress(BackendUnavailableError):
                return await self._machine.connect()
        return await self._agent.connect()

    async def _is_ready(self, machine: Helper) -> bool:
        """Whether that one has said so once; one that answers without a CRIU of use is asked again after a while.

        Raises:
            WarmcellError: It is there, and too busy to say it: an agent would only add to that.
        """
        if not self._ready and time.monotonic() - self._asked_at > TRY_AGAIN_S:
            try:
                self._ready = bool((await hello(machine))["ready"])
            except BackendUnavailableError:
                return False
            self._asked_at = time.monotonic()
        return self._ready

    async def close(self) -> None:
        """See `Helper`."""
        await self._agent.close()


class AgentHelper:
    """Implements `Helper`. Nothing is started before somebody connects."""

    def __init__(self, paths: Paths, containers: DockerBackend, *, quiet: bool = False) -> None:
        """Configure it.

        Args:
            paths: The keeper's directories.
            containers: Whose engine is used, and which runtime.
            quiet: It logs nothing; else to our standard error.
        """
        self._paths, self._containers, self._quiet = paths, containers, quiet
        self._process = -1
        """A pidfd of the agent."""
        self._lifeline = -1
        self._starting: asyncio.Task[None] | None = None
        """Goes on whoever gives up waiting for it: on a busy engine the next one finds what the first had begun."""
        self._refused: tuple[float, BackendUnavailableError] | None = None
        self._name = f"{PREFIX}agent-{keeper_mark()}"

    async def connect(self) -> socket.socket:
        """See `Helper`."""
        if self._starting is None and (self._lifeline < 0 or _ended(self._process)):
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._started)
        if self._starting is not None:
            await asyncio.shield(self._starting)
        try:
            return await connected(self._paths.helper_socket)
        except OSError as error:
            raise TransportError(
                f"The snapshot agent does not answer ({error.strerror})", hint="Try again: another one is started."
            ) from error

    async def close(self) -> None:
        """Let it finish what it does, and wait for its end."""
        if self._starting is not None:
            await asyncio.wait({self._starting})
        self._cut()
        if self._process < 0:
            return
        await ENGINE.run(_first_of, [self._process], CLOSE_TIMEOUT_S)
        await self._forget()
        self._paths.helper_socket.unlink(missing_ok=True)

    def _started(self, task: "asyncio.Task[None]") -> None:
        self._starting = None
        if not task.cancelled():
            task.exception()  # Taken note of, where nobody waits for it any more.

    async def _start(self) -> None:
        """Raises BackendUnavailableError: It cannot be had here."""
        if self._refused is not None and time.monotonic() < self._refused[0]:
            raise self._refused[1]
        self._cut()
        if self._process >= 0:
            log.warning("the snapshot agent has ended; another one is started")
            await self._forget()
        try:
            with contextlib.ExitStack() as undo:
                opened = undo.enter_context(listening(self._paths.helper_socket))
                reading, self._lifeline = os.pipe2(os.O_CLOEXEC)
                undo.callback(os.close, reading)
                ready, told = os.pipe2(os.O_CLOEXEC)
                undo.callback(os.close, ready)
                undo.callback(os.close, told)
                null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
                undo.callback(os.close, null)
                fds = (opened.fileno(), reading, told, null if self._quiet else sys.stderr.fileno())
                await ENGINE.run(self._bring_up, fds, ready)
        except BaseException as error:
            self._cut()
            if not isinstance(error, WarmcellError | OSError):
                raise
            why, hint = (error.message, error.hint) if isinstance(error, WarmcellError) else (str(error), "")
            refusal = BackendUnavailableError(
                f"The memory of an ordinary user's containers needs a helper. The machine's does not run, and no agent "
                f"can be started: {why}",
                hint=f"{_INSTALL} {hint}".rstrip(),
            )
            self._refused = time.monotonic() + TRY_AGAIN_S, refusal
            raise refusal from error
        self._refused = None

    def _bring_up(self, fds: Sequence[int], ready: int) -> None:
        """Have the engine start it, and wait until it has taken what it needs of this process. Blocks."""
        engine = self._containers.engine
        info = engine.info(fresh=True)
        if info.rootless:
            raise BackendUnavailableError(
                "root in this engine's containers is another user on the host (rootless, userns-remap)",
                hint="Use the system's engine: c.Warmcell.docker_host.",
            )
        runtime = self._containers.checked_runtime(info)
        remember(self._paths, engine.address)
        engine.remove(self._name)
        engine.create(self._name, self._config(empty.image(engine), fds, runtime))
        process = -1
        try:
            engine.start(self._name)
            found = engine.look(self._name)
            if found is not None and found.running and found.pid > 0:
                with contextlib.suppress(ProcessLookupError):
                    process = os.pidfd_open(found.pid)
            heard = b""
            if process >= 0 and ready in _first_of([ready, process], START_TIMEOUT_S):
                heard = os.read(ready, 1)
            if not heard:
                said = engine.said(self._name).strip() or "it says nothing"
                raise BackendUnavailableError(
                    f"it ended as it began: {said}",
                    hint=f"Root must be able to read {sys.prefix}, and engine and keeper must have the same process "
                    "numbers.",
                )
        except BaseException:
            if process >= 0:
                os.close(process)
            with contextlib.suppress(WarmcellError):
                engine.remove(self._name)
            raise
        self._process = process

    def _config(self, image: str, fds: Sequence[int], runtime: str) -> Mapping[str, Any]:
        """What the engine is asked for."""
        base = os.environ.get(IMAGES_VARIABLE) or IMAGES
        pid = os.getpid()
        began = start_time(pid)
        assert began is not None
        arguments = agent_command(sys.executable, keeper=(pid, began), fds=fds, uid=os.getuid(), base=base)
        env = {**helper_environment(), "NVIDIA_VISIBLE_DEVICES": "void"}
        return {
            "Image": image,
            "Entrypoint": _on_host(),
            "Cmd": arguments,
            "User": "0:0",
            "Env": [f"{name}={value}" for name, value in env.items()],
            "Labels": dict(ours(SandboxId(""))),
            "WorkingDir": "/",
            "Healthcheck": {"Test": ["NONE"]},
            "HostConfig": {
                "CapDrop": ["ALL"],
                "CapAdd": _capabilities(self._containers.engine.address),
                "SecurityOpt": ["no-new-privileges", "seccomp=unconfined", "apparmor=unconfined", "label=disable"],
                "PidMode": "host",
                "UsernsMode": "host",
                "NetworkMode": "none",
                "IpcMode": "private",
                "CgroupnsMode": "host",
                "Binds": [f"/:{HOST}"],
                "ReadonlyRootfs": True,
                "RestartPolicy": {"Name": "no"},
                "Init": False,
                "LogConfig": {"Type": "json-file", "Config": {"max-size": LOG_BYTES, "max-file": "1"}},
                **({"Runtime": runtime} if runtime else {}),
            },
        }

    def _cut(self) -> None:
        """Tell it to end."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    async def _forget(self) -> None:
        """Have its container removed; what an engine that is away keeps of it is an orphan's."""
        os.close(self._process)
        self._process = -1
        try:
            await ENGINE.run(self._containers.engine.remove, self._name)
        except WarmcellError as error:
            log.warning("the container %s is left: %s", self._name, error)


def _on_host() -> list[str]:
    """The first words of a command line that runs the rest of it with the machine's files as its root.

    chroot is the machine's own, and so is the loader that begins it: the image has neither.

    Raises:
        BackendUnavailableError: There is none.
    """
    found = shutil.which("chroot", path=f"{PROGRAM_PATH}:{os.environ.get('PATH', '')}")
    parts = None if found is None else layout(found)
    if parts is None:
        raise BackendUnavailableError("chroot is not installed", hint="It is a part of coreutils.")
    chroot, loader, libraries = parts
    program = f"{HOST}{os.path.realpath(chroot)}"
    if not loader:
        return [program, HOST]
    search = ":".join(f"{HOST}{os.path.realpath(path)}" for path in libraries)
    return [f"{HOST}{os.path.realpath(loader)}", "--library-path", search, program, HOST]


def _capabilities(address: str) -> list[str]:
    """What it needs, as far as the engine has it to give: one that is in a container itself may have less. Blocks."""
    had = -1
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as opened:
        opened.connect(address.removeprefix("unix://"))
        pid, _, _ = struct.unpack("3i", opened.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        said = Path(f"/proc/{pid}/status").read_text()
        had = int(said.partition("CapBnd:")[2].split()[0], 16)
    return [name for name, number in NEEDED.items() if had >> number & 1 and name != IN_ADMIN]


def _ended(process: int) -> bool:
    return bool(_first_of([process], 0.0))


def _first_of(fds: Sequence[int], timeout_s: float) -> set[int]:
    """Which can be read, or have hung up, once one can. Blocks. A keeper has more descriptors than select(2) takes."""
    waiting = select.poll()
    for fd in fds:
        waiting.register(fd, select.POLLIN)
    return {fd for fd, _ in waiting.poll(1e3 * timeout_s)}
