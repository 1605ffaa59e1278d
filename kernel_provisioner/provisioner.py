"""Jupyter's way to a sandboxed kernel: each of its calls becomes one of the keeper's REST."""

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.manager import KernelManager
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import CFloat, Dict, Integer, List, Unicode, Union

from warmcell.kernel_provisioner.keeper_link import KeeperLink
from warmcell.kernel_provisioner.transport import settle
from warmcell.kernel_provisioner.wishes import Wishes, notebook_of, read_choice
from warmcell.sandbox.client.start import has_kernels
from warmcell.sandbox.errors import ConflictError, NotFoundError, QueueCancelledError, TransportError, WarmcellError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import Limits, SandboxInfo
from warmcell.sandbox.paths import Paths

START_TIMEOUT_S: Final = 300.0
"""For the whole of a start; the keeper's own deadlines for its parts are shorter and say more."""
POLL_TIMEOUT_S: Final = 20.0
SUSPEND_TIMEOUT_S: Final = 300.0
"""As many GB as a kernel has must reach the disk. The keeper goes on with it if that takes longer."""
WAIT_S: Final = 30.0
"""One long poll of `wait`."""
CLEANUP_PATIENCE_S: Final = 60.0
"""Whoever shuts a kernel down waits so long for a keeper that is just being replaced."""
RESTART_GRACE_S: Final = 0.3
SHUTDOWN_GRACE_S: Final = 1.0
"""How long a kernel has, once it was asked to shut down, before it is killed."""
TCP_ATTEMPTS: Final = 3
FRESH_S: Final = 0.5
"""So soon after its start a kernel is not asked for again: a websocket that opens right then need not wait for it."""
GONE: Final = 1
"""Exit code of a kernel that nobody knows any more."""


class WarmcellProvisioner(KernelProvisionerBase):
    """Starts, watches and ends one kernel in a sandbox of the user's keeper.

    The sandbox, and so its lease on GPUs, is kept over restarts and released in `cleanup(restart=False)` alone:
    jupyter_client's `kill` and `terminate` do not say truthfully whether a restart follows.
    """

    backend = Unicode(
        "auto",
        help="What isolates: bubblewrap, docker, gvisor, or process (no isolation). auto: as configured, which is "
        "bubblewrap, and docker for images that an engine of containers has.",
    ).tag(config=True)
    python = Unicode(
        "",
        help="Interpreter of the kernel's environment, an absolute path. Empty: the image's, without one the one that "
        "runs Jupyter.",
    ).tag(config=True)
    image = Unicode(
        None,
        allow_none=True,
        help="Image whose files its kernels have, as `warmcell images ls` lists it, or of an engine of containers. "
        "None: the environment of `python`.",
    ).tag(config=True)
    preload = List(
        Unicode(),
        default_value=None,
        allow_none=True,
        help="Modules imported in advance. Empty: every start is cold. None: numpy, pandas, matplotlib and torch, "
        "where they are installed.",
    ).tag(config=True)
    template = Unicode("default", help="Name of the template that the preload list makes.").tag(config=True)
    warmup = Unicode(
        "",
        help="A line of Python, or module:function, that is run once in the template after its imports. Kernels begin "
        "with what it has loaded, where the template is kept as a snapshot.",
    ).tag(config=True)
    network = Union(
        [Unicode(), List(Unicode()), Dict()],
        default_value="none",
        help="none, host (the machine's own), hosts that are reached through the keeper's proxy, or a whole policy.",
    ).tag(config=True)
    workspace = Unicode("rw", help="How the notebook's folder is given to the kernel: rw, ro or none.").tag(config=True)
    home = Unicode("private", help="Home directory: private (gone with the sandbox), or persistent on disk.").tag(
        config=True
    )
    memory = Union(
        [Unicode(), Integer()],
        default_value=None,
        allow_none=True,
        help='Memory cap, as "8GiB" or in bytes. None: none.',
    ).tag(config=True)
    cpus = CFloat(None, allow_none=True, help="CPU cores, for example 1.5. None: no cap.").tag(config=True)
    pids = Integer(Limits().pids, allow_none=True, help="Most processes and threads. None: no cap.").tag(config=True)
    gpu = Union(
        [Unicode(), List(Unicode())],
        default_value=None,
        allow_none=True,
        help='GPUs: "A100", "H100:2", "24GiB", "any", or a list of fallbacks. None: CPU.',
    ).tag(config=True)
    mounts = List(
        Union([Unicode(), Dict()]),
        help='More host folders: "/data" or "/data:ro" (read-only), "/data:/mnt/data:rw". The operator allows which.',
    ).tag(config=True)
    env = Union(
        [List(Unicode()), Dict()],
        default_value=[],
        help="Names of variables that the kernel gets from the environment of whoever starts it, or an object of "
        "names and values. Nothing else of that environment reaches it but language and time zone.",
    ).tag(config=True)
    remote = Dict(
        help='What `%%remote` has where its line does not say it: {"gpu": "A100", "n": 4}.',
    ).tag(config=True)

    server: ClassVar[str | None] = None
    """Root folder of the Jupyter server that this process is; set by its extension. Its kernels outlive a crash."""
    ending: ClassVar[bool] = False
    """Set by the extension when the server ends: from then on no keeper is started."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The base class shares one dictionary among all instances.
        self.connection_info: KernelConnectionInfo = {}
        self.settings: Mapping[str, Any] | None = None
        """What the page chose for the next start; None: what the notebook's file says."""
        self.sandbox: SandboxInfo | None = None
        """As it was when the kernel was started."""
        self._keeper = KeeperLink(Paths.default())
        self._settled = False
        self._unknown = False
        """Whether the last poll could not tell how the kernel is."""
        self._running = False
        self._exit_code: int | None = None
        self._folder = ""
        self._epoch = 0
        """Counts starts and ends, so that an answer from before one is known as old."""
        self._fresh_until = 0.0
        """Before this time, of the monotonic clock, it is known to live."""

    # What Jupyter asks about.

    @property
    def has_process(self) -> bool:
        """Whether a kernel was started and its end was not yet taken note of."""
        return self._running

    async def poll(self) -> int | None:
        """None while the kernel runs, and where that cannot be known; else its exit code."""
        if not self._running:
            return self._exit_code or 0
        if time.monotonic() < self._fresh_until:
            return None
        epoch = self._epoch
        try:
            kernel = await self._keeper.ask(
                lambda it: it.get(self._path(), timeout=POLL_TIMEOUT_S),
                start=self._stays and not self.ending,
                patience_s=POLL_TIMEOUT_S,
            )
            code = self._exit_of(kernel)
        except NotFoundError as error:
            # A keeper that was killed takes its sandboxes along, and the next one does not know them.
            self.log.warning("Kernel %s is gone: %s", self.kernel_id, error)
            code = GONE
        except TransportError as error:
            # A keeper that was stopped has saved its kernels, and the next one takes them up as soon as it is there.
            if self._stays and await asyncio.to_thread(has_kernels, self._keeper.paths):
                if not self._unknown:
                    self.log.warning("The state of kernel %s is not known for now: %s", self.kernel_id, error)
                self._unknown = True
                return None
            self.log.warning("Kernel %s is gone: %s", self.kernel_id, error)
            code = GONE
        except WarmcellError as error:
            self.log.warning("The state of kernel %s is not known: %s", self.kernel_id, error)
            return None
        self._unknown = False
        if epoch != self._epoch:
            # Somebody ended or started it while we asked. To a restarter that is no death.
            return None
        self._exit_code = code
        return code

    async def wait(self) -> int | None:
        """Wait until it has ended."""
        path = f"{self._path()}?wait={WAIT_S:g}"
        while self._running and self._exit_code is None:
            try:
                answer = await self._keeper.ask(lambda it: it.get(path, timeout=WAIT_S + POLL_TIMEOUT_S))
                self._exit_code = self._exit_of(answer)
            except (NotFoundError, TransportError):
                self._exit_code = GONE
        self._running = False
        return self._exit_code

    def get_shutdown_wait_time(self, recommended: float = 5.0) -> float:
        """Short: `shutdown_requested` has ended the kernel before this time begins."""
        return min(recommended, SHUTDOWN_GRACE_S)

    def resolve_path(self, path: str) -> str | None:
        """The host's path of a file that the kernel names: its folder has the same path inside and outside."""
        if not self._folder or self.workspace == "none":
            return None
        found = (Path(self._folder) / Path(path)).resolve()
        inside = found.is_relative_to(Path(self._folder).resolve())
        return found.as_posix() if inside and found.exists() else None

    # Its end.

    async def send_signal(self, signum: int) -> None:
        """Signal the kernel's process group; SIGINT interrupts what runs."""
        if self._running and signum:
            self._fresh_until = 0.0
            await self._tell("signal", {"signum": int(signum)})

    async def terminate(self, restart: bool = False) -> None:
        """SIGTERM. The sandbox stays."""
        await self.send_signal(signal.SIGTERM)

    async def kill(self, restart: bool = False) -> None:
        """End the process at once. The sandbox stays."""
        if self._running:
            await self._end(grace_s=0.0)

    async def shutdown_requested(self, restart: bool = False) -> None:
        """Give the kernel, which was asked to leave, a moment to do so; returns when its process is gone."""
        if self._running:
            await self._end(grace_s=RESTART_GRACE_S if restart else SHUTDOWN_GRACE_S, restart=restart)

    async def cleanup(self, restart: bool = False) -> None:
        """Release the sandbox, unless a restart follows. Idempotent."""
        self._running = False
        self._epoch += 1
        if restart:
            return
        try:
            # A keeper that is not there may have saved this kernel, for the next one to remove.
            start = self._stays and await asyncio.to_thread(has_kernels, self._keeper.paths)
            await self._keeper.ask(lambda it: it.delete(self._path()), start=start, patience_s=CLEANUP_PATIENCE_S)
        except TransportError:
            pass  # Without a keeper there is no sandbox.
        except WarmcellError as error:
            self.log.warning("The sandbox of kernel %s could not be removed: %s", self.kernel_id, error)
        await self._keeper.close()

    # Its memory, and what is open on it: for the server's extension.

    async def suspend(self, *, even_busy: bool) -> None:
        """Save the kernel's memory and end its processes; one that is suspended stays so.

        Raises:
            ConflictError: It is busy, and that was not asked for.
            UnsupportedOperationError: Its memory cannot be saved, here or at all.
            WarmcellError: It was not saved, and runs on.
        """
        place = f"/sandboxes/{(await self._kernel())['sandbox_id']}/suspend"
        await self._keeper.ask(lambda it: it.post(place, {"busy": even_busy}, timeout=SUSPEND_TIMEOUT_S))

    async def is_suspended(self) -> bool:
        """Whether it is suspended, or about to be.

        Raises:
            WarmcellError: That cannot be known.
        """
        place = f"/sandboxes/{(await self._kernel())['sandbox_id']}"
        info = SandboxInfo.from_json(await self._keeper.ask(lambda it: it.get(place, timeout=POLL_TIMEOUT_S)))
        return info.state in (State.SUSPENDING, State.SUSPENDED)

    async def remember(self, sessions: Sequence[Mapping[str, str]], *, notebook: str | None) -> None:
        """Tell the keeper what a server has open on the kernel, for the server that comes after it.

        Args:
            sessions: `id`, `path`, `name` and `type` of each.
            notebook: The notebook's file as it is called now.

        Raises:
            WarmcellError: The keeper has not taken note of it.
        """
        body = {"sessions": [dict(one) for one in sessions], "notebook": notebook, "session_name": notebook}
        await self._keeper.ask(lambda it: it.post(f"{self._path()}/sessions", body))

    async def will_leave(self) -> None:
        """Say that this process is about to leave the kernel, so that its next server waits for that."""
        await self._tell("leave", {"soon": True}, timeout=POLL_TIMEOUT_S)

    async def leave(self) -> None:
        """This process has nothing to do with the kernel any more, which stays with the keeper."""
        self._running = False
        self._epoch += 1
        await self._tell("leave", {}, timeout=POLL_TIMEOUT_S)
        await self._keeper.close()

    async def _kernel(self) -> Mapping[str, Any]:
        kernel: Mapping[str, Any] = await self._keeper.ask(lambda it: it.get(self._path(), timeout=POLL_TIMEOUT_S))
        return kernel

    # Its start.

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Settle where clients connect, and write the connection file."""
        manager = self._manager
        arguments = kwargs.pop("extra_arguments", [])
        # Without an option among them they are the files that `jupyter run` runs itself.
        if any(argument.startswith("-") for argument in arguments):
            self.log.warning("Arguments for the kernel's program are ignored: %s", " ".join(arguments))
        if not self._settled:
            settle(manager, self.kernel_id, self._keeper.paths)
            self._settled = True
        self.kernel_spec.interrupt_mode = "message"
        session = kwargs.get("env", {}).get("JPY_SESSION_NAME", "")
        manager.write_connection_file(jupyter_session=session)
        self.connection_info = manager.get_connection_info()
        command = manager.format_kernel_cmd()
        return await super().pre_launch(cmd=command, **kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the kernel in its sandbox; returns once it has answered.

        Raises:
            WarmcellError: What stood in the way, with its cure.
        """
        self._folder = _folder(kwargs.get("cwd"))
        try:
            body = await self._request(kwargs.get("env") or os.environ)
            self.sandbox = SandboxInfo.from_json(await self._start(body))
        except BaseException:
            await self._keeper.close()  # Jupyter drops a provisioner that did not start, without another word.
            raise
        self._begin()
        self._fresh_until = time.monotonic() + FRESH_S
        return self.connection_info

    async def _start(self, body: dict[str, Any]) -> Any:
        # A GPU may be waited for as long as it takes; the keeper tells the page where it stands.
        timeout = None if body["spec"].get("gpu") else START_TIMEOUT_S
        for attempt in range(TCP_ATTEMPTS):
            body["connection"] = self._wire_connection()
            try:
                return await self._keeper.ask(lambda it: it.post("/kernels", body, timeout=timeout), start=True)
            except QueueCancelledError:
                raise
            except ConflictError:
                # Somebody took a port between Jupyter's choice and our binding it.
                if attempt == TCP_ATTEMPTS - 1 or not self._choose_other_ports():
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def attach(self, kernel: Mapping[str, Any]) -> None:
        """Take over a kernel that the keeper has: one of `GET /kernels`.

        Raises:
            WarmcellError: The keeper does not have it any more.
        """
        self.connection_info = kernel["connection"]
        self.kernel_spec.interrupt_mode = "message"
        self._settled = True
        self._folder = kernel["cwd"]
        await self._keeper.ask(lambda it: it.post(f"{self._path()}/adopt", {"server": self.server}))
        self._begin()

    def _begin(self) -> None:
        self._exit_code = None
        self._epoch += 1
        self._running = True

    @property
    def _stays(self) -> bool:
        """Whether the kernel may outlive this process, and its keeper."""
        return self.server is not None

    @property
    def _manager(self) -> KernelManager:
        assert isinstance(self.parent, KernelManager), "jupyter_client gives a provisioner its KernelManager"
        return self.parent

    def _path(self) -> str:
        return f"/kernels/{self.kernel_id}"

    async def _end(self, **how: float) -> None:
        """Have its process end. The keeper answers when it has; then nobody need ask for that again."""
        self._epoch += 1
        self._fresh_until = 0.0
        kernel = await self._tell("end", how)
        if kernel is not None and not kernel["alive"]:
            self._exit_code = self._exit_of(kernel)
            self._running = False

    async def _tell(self, verb: str, body: Mapping[str, Any], **how: float) -> Mapping[str, Any] | None:
        """A verb on the kernel, and what it is then; None where that failed.

        One that is gone needs it no more; after another failure Jupyter tries harder.
        """
        try:
            kernel: Mapping[str, Any] = await self._keeper.ask(
                lambda it: it.post(f"{self._path()}/{verb}", dict(body), **how)
            )
            return kernel
        except (NotFoundError, TransportError) as error:
            self.log.debug("Kernel %s was not there for %s: %s", self.kernel_id, verb, error)
        except WarmcellError as error:
            self.log.warning("Kernel %s, %s: %s", self.kernel_id, verb, error)
        return None

    def _exit_of(self, kernel: Mapping[str, Any]) -> int | None:
        """The exit code that the keeper tells; None while it runs."""
        if kernel["alive"]:
            return None
        return GONE if kernel["exit_code"] is None else int(kernel["exit_code"])

    async def _request(self, environ: Mapping[str, str]) -> dict[str, Any]:
        """Body of `POST /kernels`, its connection apart."""
        notebook = notebook_of(environ)
        wishes = Wishes.from_json({name: getattr(self, name) for name in Wishes.names()})
        choice = {} if notebook is None else await asyncio.to_thread(read_choice, notebook)
        if self.settings is not None:  # The page offers no defaults of remote cells: those stay as they are.
            stay = {name: choice[name] for name in ("remote",) if name in choice}
            wishes = wishes.chosen({**stay, **self.settings}, source="The notebook's choice")
        elif notebook is not None:
            wishes = wishes.chosen(choice, source=f"metadata.warmcell of {notebook}")
        own = {name: environ[name] for name in self.kernel_spec.env if name in environ}
        spec = wishes.spec(folder=self._folder, environ=environ)
        return {
            "kernel_id": self.kernel_id,
            "spec": {**spec.to_json(), "env": {**own, **spec.env}},
            "cwd": self._folder if spec.workspace is not None else "",
            "env": {"JPY_SESSION_NAME": environ["JPY_SESSION_NAME"]} if "JPY_SESSION_NAME" in environ else {},
            "notebook": notebook,
            "kernel_name": self._manager.kernel_name,
            "server": self.server,
            "persistent": self._stays,
        }

    def _wire_connection(self) -> dict[str, Any]:
        key: str | bytes = self.connection_info["key"]
        return {**self.connection_info, "key": key.decode() if isinstance(key, bytes) else key}

    def _choose_other_ports(self) -> bool:
        """Have the manager choose its TCP ports again; False if they were not its choice."""
        manager = self._manager
        if manager.transport != "tcp" or not manager._random_port_names:
            return False
        manager.cleanup_random_ports()
        manager.write_connection_file()
        self.connection_info = manager.get_connection_info()
        return True


def _folder(cwd: str | os.PathLike[str] | None) -> str:
    """The folder that a kernel is to start in: the caller's, if it does not say."""
    return os.path.abspath(cwd or os.curdir)
