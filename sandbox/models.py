"""The nouns of the engine: what is asked for and what is told, as frozen data.

Everything here is plain data without behaviour beyond validation. It is what `SandboxService`, the
backends and the keeper's REST exchange, in the form that `wire` gives it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NewType

from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.wire import Secret, Wire

SandboxId = NewType("SandboxId", str)
"""Twelve lower-case letters and digits; unique on the machine."""

SnapshotId = NewType("SnapshotId", str)
"""Twelve lower-case letters and digits; names the manifest, the writable layer and the engine's image."""

Network = Literal["none", "host"]
WorkspaceMode = Literal["rw", "ro", "cow", "none"]
"""cow: what the sandbox changes is its own, goes into snapshots and ends with it; the folder stays as it is."""
HomeMode = Literal["private", "persistent"]
StartedFrom = Literal["template", "cold", "snapshot"]
SnapshotKind = Literal["named", "suspended", "outlived", "template", "fork"]
"""outlived: a suspended kernel went on from it, so it is what the kernel was before."""

MIB = 2**20
GIB = 2**30

LAST_LINES = 10
"""Of what a failed process has said, in the error that tells of it; all of it is in the result."""

DEFAULT_PRELOAD = ("numpy", "pandas", "matplotlib", "torch")
"""Imported in advance where they are installed; what is not installed is no failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressProxy(Wire):
    """A SOCKS5 proxy of somebody's, through which all goes that leaves a sandbox."""

    address: str
    """Host and port: "proxy.example.com:1080"."""
    username: str = ""
    password: Secret | None = None
    tls: bool = False
    """Whether it is spoken to with TLS."""
    server_name: str = ""
    """The name that its certificate must be for. Empty: that of its address."""
    certificates: str = ""
    """Authorities in PEM that its certificate may be of, instead of the host's usual ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPolicy(Wire):
    """What a sandbox without a network of its own reaches nevertheless, through a proxy on the host."""

    allow: tuple[str, ...] = ()
    """Hosts: "pypi.org", "*.example.com" (what is below it), "git.example.com:22", "203.0.113.0/24", "*" (all).

    Without a port 80 and 443 are meant."""
    deny: tuple[str, ...] = ()
    """Written likewise, of any port where none is named. It goes before `allow`."""
    headers: Mapping[str, Mapping[str, Secret]] = field(default_factory=dict)
    """Host to headers that the proxy adds to https requests to it. Such a host is allowed by that."""
    packages: bool = False
    """Whether it reaches the operator's package index, which pip and uv then use."""
    max_bytes: int | None = None
    """Most that may go in both directions together. None: no cap."""
    name_servers: tuple[str, ...] = ()
    """Addresses of servers that the proxy asks for names instead of the host's; port 53."""
    through: EgressProxy | None = None
    """What the proxy connects through. None: it connects by itself."""
    authority: str = ""
    """Names the certificate authority of its proxy, which its copies have too. Given by the keeper."""


USUAL_UMASK = 0o022
"""As in a container: what is made can be read by all, and written by its owner alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits(Wire):
    """Caps of one sandbox. None means no cap of ours."""

    memory_bytes: int | None = None
    pids: int | None = 4096
    cpus: float | None = None
    layer_bytes: int = 4 * GIB
    """Size of the private writable layer, of /tmp and of the private home, each."""
    shm_bytes: int = 1 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount(Wire):
    """A host path seen inside at `target` (same path when empty)."""

    source: str
    target: str = ""
    mode: Literal["ro", "rw"] = "ro"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace(Wire):
    """The notebook's folder; it appears inside under its own host path."""

    path: str
    mode: WorkspaceMode = "rw"


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec(Wire):
    """What somebody wants. Checked against the operator's bounds before anything is made."""

    python: str
    """Absolute path of the interpreter whose environment is the image (bubblewrap, process).

    With `image` it is a path in that image; empty: the one that the image says, or brings."""
    image: str | None = None
    """Name or digest of an image that was built here, or what an engine of containers calls one. None: `python`'s
    environment."""
    backend: str = "auto"
    workspace: Workspace | None = None
    network: Network = "none"
    """Also given as an object, or as a list of hosts to allow, which is "none" and `egress`."""
    egress: NetworkPolicy | None = None
    """What it reaches although its network is "none"."""
    mounts: tuple[Mount, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    home: HomeMode = "private"
    user: str = ""
    """What the guest's user is called, and by that its home in /home. Empty: as on the host, or "warmcell". Whose files
    it may write is not changed by it. Without isolation the user is the host's."""
    limits: Limits = Limits()
    gpu: str | tuple[str, ...] | None = None
    """A request as in "A100", "H100:2", "24GiB", "any"; several are fallbacks in order. None: CPU."""
    template: str = "default"
    preload: tuple[str, ...] = DEFAULT_PRELOAD
    """Modules imported in advance. Empty: no template, every start is cold."""
    warmup: str = ""
    """A line of Python, or `module:function`, that is run once in a template after its imports, before it is saved."""
    umask: int | None = None
    """Mode bits that what is made in it lacks at first. None: for notebooks those of who started the keeper, else 022;
    in any case those by which others could write, where the keeper's own are among them."""

    @property
    def files_umask(self) -> int:
        """`umask`, or the usual one where nobody has said."""
        return USUAL_UMASK if self.umask is None else self.umask

    @classmethod
    def normalized(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """With what the network says it may reach as `egress`."""
        reached = data.get("network")
        if not isinstance(reached, (Mapping, list, tuple)):
            return data
        return {**data, "network": "none", "egress": reached if isinstance(reached, Mapping) else {"allow": reached}}

    def shape(self, gpus: Sequence["GpuDevice"] = ()) -> tuple[object, ...]:
        """What is fixed once a sandbox exists; a sandbox serves any spec of equal shape.

        Environment variables are given to each kernel, and what it reaches is the keeper's to say, so they are not
        part of it. Of the GPUs that are leased for it only the device nodes are: a simulated one has none.
        """
        return (
            self.backend,
            self.image,
            self.python,
            self.workspace,
            self.network,
            self.mounts,
            self.home,
            self.user,
            self.limits,
            self.template,
            self.preload,
            self.warmup,
            self.files_umask,
            tuple(node for gpu in gpus for node in gpu.device_nodes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDevice(Wire):
    """One GPU (or MIG instance) of the machine."""

    uuid: str
    index: int
    name: str
    memory_total_bytes: int
    memory_used_bytes: int | None = None
    utilization_pct: float | None = None
    driver_version: str | None = None
    simulated: bool = False
    device_nodes: tuple[str, ...] = ()
    """Host paths under /dev that a sandbox needs for this device alone."""
    mig: bool = False
    """Whether it is an instance of a GPU that is divided in hardware (MIG); `index` is that GPU's."""
    parts: int = 1
    """Of a sandbox's device: it has one of so many shares of it; 1: all of it."""
    near: Mapping[str, int] = field(default_factory=dict, compare=False)
    """UUIDs of devices to which it has a path, to how long that is: 0 NVLink, then PCIe: 10 (one switch) to 50."""
    pretended_bytes: int = 0
    """Of a simulated device: what each sandbox that has it is said to take of its memory."""
    pretended_pct: float | None = None
    """Of a simulated device: for how much of the time it is said to compute while somebody has it."""


ParkedBy = Literal["driver", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked(Wire):
    """What a sandbox had on GPUs and has in the host's memory now; others may have the GPUs."""

    gpus: tuple[GpuDevice, ...]
    """Those that it had."""
    since: float
    """Unix time, in seconds."""
    vram_bytes: int = 0
    """What went to the host's memory."""
    bound: bool = True
    """It goes on only where it was, or on a device of that kind. False: nothing of it has used a GPU."""
    by: ParkedBy = "driver"
    """Who moved it. What torch moved goes on on the very device: the rest of what the process has there stays."""
    stays_bytes: int = 0
    """What stays on the GPUs: the context, and what is not torch's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePlace(Wire):
    """Where somebody stands who waits for a GPU."""

    request: str
    place: int
    """1: the next one."""
    length: int
    """How many wait for what this one could have, this one included."""
    since: float
    """Unix time, in seconds."""
    estimate_s: float | None = None
    """About how long it will take, from how long leases have lasted so far. None: not known."""
    why: str = ""
    """Who has what it waits for."""

    def __str__(self) -> str:
        about = "" if self.estimate_s is None else f", about {max(1, round(self.estimate_s / 60))} min"
        return f"place {self.place} of {self.length} in the queue for {self.request}{about}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase(Wire):
    """What a start is busy with: queue, lease, sandbox, guest, template, kernel."""

    name: str
    since: float
    """Unix time at which it began, in seconds."""
    detail: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo(Wire):
    """Wire form of a `WarmcellError`."""

    code: str
    message: str
    hint: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitStatus(Wire):
    """One limit and whether the machine holds it."""

    value: float | None
    enforced: bool
    why: str = ""
    """Why it is not enforced, with the cure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateStatus(Wire):
    """The fork server of one sandbox: what it has imported and what failed."""

    name: str
    state: Literal["none", "importing", "ready", "failed"]
    importing: str = ""
    since: float = 0.0
    """Unix time at which the import of `importing` began, in seconds."""
    seconds: float = 0.0
    imported: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    """Module to its import error. A module that is not installed is not listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms(Wire):
    """For how long a sandbox that code has asked for (the SDK, REST) is kept, and what becomes of it then."""

    timeout_s: float | None = 300.0
    """Of running, from its start, its last resume or the last time this was set. None: no end."""
    on_timeout: Literal["suspend", "kill"] = "suspend"
    auto_resume: bool = True
    """Whether use wakes it."""
    keeps_memory: bool = True
    """Whether it is suspended with its memory when its time is over. Else with its files alone."""
    tags: Mapping[str, str] = field(default_factory=dict)
    port_host: str = ""
    """What its web ports see as the host of requests; `${PORT}` is the port's number. Empty: `localhost:${PORT}`."""
    tls_ports: tuple[int, ...] = ()
    """Web ports of its own that are spoken to with TLS, whatever certificate they show."""
    ends_at: float | None = None
    """Unix time, in seconds, at which its time is over. None: it does not run, or has no end."""
    frozen: bool = False
    """Its time was over and its memory cannot be saved here, so it is stopped in memory, until it is used."""
    cold: bool = False
    """It sleeps with its files alone, and its kernel begins anew. Of a snapshot: so does whatever is made from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxInfo(Wire):
    """What is told about a sandbox, the same in Python, REST and the page."""

    id: SandboxId
    state: State
    backend: str
    isolated: bool
    """False for the `process` backend, which whoever shows it marks as unsafe."""
    backend_why: str = ""
    """Why that backend, as in "it was chosen, since …". Empty: it was asked for."""
    owner: str
    """Who asked for it: "notebook", "remote", "pool", "client"."""
    principal: str | None = None
    """Whose it is, of those who have tokens. None: the keeper's own user's."""
    terms: Terms | None = None
    """None: it ends with whoever asked for it, or when that says so."""
    parent: SandboxId | None = None
    """The sandbox from which it was asked for (`%%remote`)."""
    kernel_id: str | None = None
    notebook: str | None = None
    python: str = ""
    image: str | None = None
    """As it was asked for."""
    workspace: Workspace | None = None
    workspace_note: str = ""
    """Why the workspace is not as asked for (for example read-only), else empty."""
    network: Network = "none"
    egress: NetworkPolicy | None = None
    """What it reaches although its network is "none". Headers have their names alone."""
    gpu: str | tuple[str, ...] | None = None
    gpus: tuple[GpuDevice, ...] = ()
    limits: Mapping[str, LimitStatus] = field(default_factory=dict)
    template: TemplateStatus | None = None
    started_from: StartedFrom | None = None
    started_ms: float | None = None
    """From the request for the kernel to its first answer."""
    generation: int = 0
    """How many kernels have been started in it."""
    phase: Phase | None = None
    parked: Parked | None = None
    """It runs, its GPUs are given back, and what it had in their memory waits in the host's for its next cell."""
    gpu_note: str = ""
    """What is wrong with its GPU: it is lost, or it uses more memory than its share has. Else empty."""
    queue: QueuePlace | None = None
    """Where it stands in the queue for a GPU, while it waits there: to start, or to go on."""
    created_at: float = 0.0
    error: ErrorInfo | None = None
    """Why it failed, or why its kernel ended by itself."""
    previous_error: ErrorInfo | None = None
    """Why the kernel before this one ended by itself (killed for memory, for example)."""
    exit_code: int | None = None
    snapshot: SnapshotId | None = None
    """What it was last restored from, or is suspended as."""
    resumed_ms: float | None = None
    """From the request that woke it to its first answer."""
    not_saved: tuple[str, ...] = ()
    """Command lines of what ran besides its kernel when that was saved, and has not come back with it."""
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    """What the last start, restore or resume spent its time on: queue (for a GPU), create (the sandbox), start (a
    process) or restore (memory), ready (the first answer). pool: sandbox and kernel were waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotInfo(Wire):
    """What is told about a snapshot, the same in Python, REST and the page."""

    id: SnapshotId
    name: str = ""
    """As its user calls it; unique for its sandbox. Empty: nobody named it."""
    kind: SnapshotKind = "named"
    engine: str = "criu"
    sandbox_id: SandboxId | None = None
    principal: str | None = None
    """Whose it is, as the sandbox was."""
    kernel_id: str | None = None
    notebook: str | None = None
    parent: SnapshotId | None = None
    cell: int | None = None
    """Number of the last cell that its kernel had begun, as Jupyter counts them; None where nobody counts."""
    created_at: float = 0.0
    expires_at: float | None = None
    last_used_at: float = 0.0
    image_bytes: int = 0
    layer_bytes: int = 0
    memory_bytes: int = 0
    compressed: bool = False
    """Whether its files are, until it is used again."""
    image_compressed: bool = False
    """Whether its memory is, likewise; `image_bytes` is what it takes so."""
    not_saved: tuple[str, ...] = ()
    """Command lines of what ran besides its kernel then, as nobody's child or in a terminal, and is no part of it."""
    phases_ms: Mapping[str, float] = field(default_factory=dict)
    """What taking it spent its time on: settle (the kernel gets ready), memory and layer (it stands still), finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo(Wire):
    """What is told of an image that was built here."""

    digest: str
    """Of what it is made of, "sha256:…"; images of one declaration have the same."""
    names: tuple[str, ...] = ()
    builder: str = ""
    backends: tuple[str, ...] = ()
    """Whose sandboxes can have it."""
    reference: str = ""
    """What these backends call it."""
    python: str = ""
    """Path of its interpreter in sandboxes; empty: whatever it brings."""
    env: Mapping[str, str] = field(default_factory=dict)
    made_of: str = ""
    """Its declaration in a line."""
    size_bytes: int = 0
    created_at: float = 0.0
    last_used_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateInfo(Wire):
    """One template in use and the prepared sandboxes that wait for it."""

    name: str
    python: str
    preload: tuple[str, ...]
    status: TemplateStatus
    prepared: int
    prepared_bytes: int


class CommandError(Exception):
    """A process has failed; raised by `ExecResult.check`."""

    def __init__(self, result: "ExecResult") -> None:
        lines = (result.stderr.strip() or result.stdout.strip()).splitlines()[-LAST_LINES:]
        super().__init__("\n".join((f"The command ended with exit code {result.exit_code}", *lines)))
        self.result = result


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult(Wire):
    """A finished process. A non-zero exit is data, not an error."""

    stdout: str
    stderr: str
    exit_code: int
    """As a shell says it: 128 + n for death by signal n."""

    def check(self) -> "ExecResult":
        """Itself, if its exit code is 0.

        Raises:
            CommandError: It is another one.
        """
        if self.exit_code != 0:
            raise CommandError(self)
        return self
