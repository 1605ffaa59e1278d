"""`c.Warmcell`: what the operator configures, in `jupyter_warmcell_config.py` of any Jupyter config directory.

The keeper and the server extension read the same file, so it holds for every server, notebook and
script of the user. Bounds are the keeper's: a kernelspec or a notebook asks within them.
"""

import difflib
import os
from collections.abc import Sequence
from typing import Any

from traitlets import Bool, CFloat, Dict, Enum, Float, Integer, List, TraitError, Unicode
from traitlets.config import Configurable
from traitlets.config.loader import Config

from warmcell.sandbox.bounds import Bounds
from warmcell.sandbox.choosing import AUTO, USUAL
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.models import GIB

CONFIG_FILE = "jupyter_warmcell_config"


class Warmcell(Configurable):
    """Settings of one user's keeper and of the Jupyter servers beside it."""

    backend = Unicode(
        "auto",
        help="Backend of sandboxes that name none. `auto`: bubblewrap, docker for images that only an engine of "
        "containers has, gvisor for agents where it serves. `process` isolates nothing: everything says so.",
    ).tag(config=True)
    docker_host = Unicode(
        help="Socket of the engine of containers, as in `unix:///run/user/1000/docker.sock`. Empty: what DOCKER_HOST "
        "says, else the usual one. Whoever may use a system's engine has root's rights; sandboxes have not."
    ).tag(config=True)
    docker_image = Unicode(
        help="Image of containers whose kernelspec or notebook names none. Empty: they must name one."
    ).tag(config=True)
    docker_runtime = Unicode(
        help="What the engine of containers calls the runtime to use: `runc`, `nvidia`. Empty: its default."
    ).tag(config=True)
    networks = List(
        Unicode(), ["none", "host"], help="Networks that may be asked for: `none`, `host` (the machine's own)."
    ).tag(config=True)
    egress_allowed = List(
        Unicode(),
        None,
        allow_none=True,
        help="Hosts that sandboxes without a network may be let reach through the keeper's proxy, at most: `pypi.org`, "
        "`*.example.com`, `example.com:8443`, `*`. Private addresses they never reach. None: all where `networks` has "
        "`host`, else none.",
    ).tag(config=True)
    egress_principals = List(
        Unicode(), help="The same for sandboxes of those who have tokens. Empty: theirs reach nothing."
    ).tag(config=True)
    principal_images = List(
        Unicode(),
        help="Images of the engine of containers that those who have tokens, and code in notebooks, may ask for, "
        "besides those of `warmcell images build` and `docker_image`: `python:3.12-slim`, "
        "`registry.example.com/team/*`, `*`.",
    ).tag(config=True)
    egress_index_hosts = List(
        Unicode(),
        help="Hosts from which the package index of `index_url` serves files, besides its own: "
        '["files.example.com"]. They are reached where a policy has `packages`.',
    ).tag(config=True)
    egress_private_index = Bool(
        False, help="Whether sandboxes reach the index, and `egress_index_hosts`, also at private addresses."
    ).tag(config=True)
    e2b_internet = Bool(
        False,
        help="Whether sandboxes of E2B's clients reach all of `egress_allowed` or `egress_principals` where they do "
        "not say what, as these clients assume. False: they then reach nothing.",
    ).tag(config=True)
    e2b_public_ports = Bool(
        False,
        help="Whether E2B's clients may open the web ports of a sandbox to everybody who has its address, by "
        "`allow_public_traffic`. False: each request to them shows a token.",
    ).tag(config=True)
    port_domain = Unicode(
        help="Domain of which every name is this server: web ports of sandboxes then have origins of their own, "
        "`https://8000-<sandbox>.<domain>/`. Best one that nothing else is below. Empty: a path of the server."
    ).tag(config=True)
    stalled_after = Float(
        120.0,
        min=1.0,
        help="Seconds after which an upload to a sandbox, or a download, is given up if nothing of it moves.",
    ).tag(config=True)
    workspace_modes = List(
        Unicode(), ["rw", "ro", "cow", "none"], help="How the notebook's folder may be given to a sandbox."
    ).tag(config=True)
    mounts = List(
        Unicode(), help="Host folders below which kernelspecs and notebooks may mount. Empty: no extra mounts."
    ).tag(config=True)
    max_memory = Float(
        None, allow_none=True, help="Most memory of one sandbox in GiB, and its cap if it asks for none. None: no cap."
    ).tag(config=True)
    max_cpus = CFloat(
        None, allow_none=True, help="Most CPU cores of one sandbox, and its cap if it asks for none. None: no cap."
    ).tag(config=True)
    max_sandboxes = Integer(64, min=1, help="Most sandboxes at a time.").tag(config=True)
    prepared = Integer(
        1,
        min=0,
        help="Sandboxes kept prepared at least for each template in use; more where demand is. 0: none, also not for "
        "kernels that are suspended.",
    ).tag(config=True)
    prepared_memory = Float(4.0, help="Most memory of all prepared sandboxes together, in GiB.").tag(config=True)
    snapshots = Enum(
        ["auto", "none"],
        "auto",
        help="Whether kernels' memory is saved where this machine can. `none`: never, as if it could not.",
    ).tag(config=True)
    helper = Enum(
        ["auto", "none"],
        "auto",
        help="Whether an ordinary user's sandboxes are made by the machine's helper where one runs, which is what "
        "their memory snapshots need. `none`: never.",
    ).tag(config=True)
    docker_agent = Enum(
        ["auto", "none"],
        "auto",
        help="Whether, where the machine has no helper, the memory of an ordinary user's containers is saved by a "
        "small privileged container that the keeper starts in the same engine once it is needed. `none`: never.",
    ).tag(config=True)
    suspend_after = Float(
        3600.0,
        min=0.0,
        help="Seconds of idleness after which a kernel is suspended: memory on disk, GPU given back. 0: never.",
    ).tag(config=True)
    suspend_below = Float(
        0.05,
        min=0.0,
        help="Memory that is kept free: where less is left, prepared sandboxes go, then idle kernels are suspended. A "
        "fraction of the machine's where under 1, else GiB. 0: never.",
    ).tag(config=True)
    suspend_below_after = Float(
        60.0,
        min=0.0,
        help="Seconds of idleness before which a kernel is not suspended, however short memory is.",
    ).tag(config=True)
    populate = Bool(
        False,
        help="Read all memory of a restored kernel from disk at once, in the background, for kernels that need all of "
        "it soon. False: when they first use it.",
    ).tag(config=True)
    compress_after = Float(
        7.0,
        allow_none=True,
        min=0.0,
        help="Days after its last use at which a snapshot's files are compressed. None: never.",
    ).tag(config=True)
    compress_memory = Bool(
        False,
        help="Whether their memory is compressed with their files, in the background. What is restored is expanded "
        "first, one to two seconds for each GB.",
    ).tag(config=True)
    snapshot_quota = Float(
        None, allow_none=True, help="Most disk space of all snapshots together, in GiB. None: no cap."
    ).tag(config=True)
    snapshot_ttl = Float(
        None, allow_none=True, help="Days after its last use at which a snapshot goes. None: never by age."
    ).tag(config=True)
    frozen_ttl = Float(
        7.0,
        allow_none=True,
        min=0.0,
        help="Days after which an agent's sandbox goes that stands still in memory, since it could not be saved, and "
        "that nobody has used. `snapshot_ttl` holds for it too, where that is shorter. None: no bound of its own.",
    ).tag(config=True)
    import_snapshots = Bool(
        False, help="Whether snapshots from elsewhere may be brought in: their files come from whoever made them."
    ).tag(config=True)
    docker_python_image = Unicode(
        "python:{version}-slim",
        help="Image with which `Image.python(...)` begins where an engine of containers builds it; `{version}` in it "
        "is the version of Python.",
    ).tag(config=True)
    index_url = Unicode(
        help="Where the packages of images come from. It may hold a password: it is part of no image. Empty: what "
        "PIP_INDEX_URL says where the keeper is started, else PyPI."
    ).tag(config=True)
    index_certificate = Unicode(
        help="File of certificates (PEM) that the index is checked against as images are built. Empty: what PIP_CERT "
        "says, else the system's."
    ).tag(config=True)
    conda_channel_alias = Unicode(
        help="Where channels of conda's are that have a name, as in `conda-forge`: a mirror, say. It may hold a "
        "password: it is part of no image. Empty: what CONDA_CHANNEL_ALIAS says, else https://conda.anaconda.org."
    ).tag(config=True)
    build_network = Enum(
        ["host", "none"], "host", help="What may be reached as images are built: all that the machine can, or nothing."
    ).tag(config=True)
    build_with_uv = Bool(
        True, help="Environments are made by uv where it is installed. False: by venv and pip always."
    ).tag(config=True)
    image_quota = Float(
        None,
        allow_none=True,
        min=0.0,
        help="Most disk space of all images together, in GiB; those that were used longest ago go. None: no cap.",
    ).tag(config=True)
    package_cache = Float(
        20.0,
        allow_none=True,
        min=0.0,
        help="Most disk space, in GiB, of the packages that builds of images share: where it is more, all of it goes "
        "when they are done. None: no cap.",
    ).tag(config=True)
    remote = Dict(
        help='What `%%remote` has where its line does not say it: {"gpu": "A100", "timeout": "2h"}. A notebook has its '
        "own in its metadata, `warmcell.remote`."
    ).tag(config=True)
    remote_values = Float(
        1.0, min=0.0, help="Most memory of the variables that one `%%remote` cell sends, in GiB."
    ).tag(config=True)
    remote_idle_s = Float(
        3600.0,
        min=0.0,
        help="Seconds after its last cell at which the sandbox that a notebook keeps for `%%remote` is removed, with "
        "its variables, and its GPUs are given back. 0: not before its notebook ends.",
    ).tag(config=True)
    simulated_gpus = List(
        Dict(),
        help="GPUs to pretend, marked as simulated wherever they show: "
        '[{"name": "A100-SXM4-80GB", "memory": "80GiB", "count": 2}]. Empty: the machine\'s own.',
    ).tag(config=True)
    gpu_wait = Float(
        None,
        allow_none=True,
        min=0.0,
        help="Seconds for which a start, or a cell that wakes its kernel, waits in the queue for a GPU. 0: none waits. "
        "None: until there is one.",
    ).tag(config=True)
    gpu_yield_after = Float(
        60.0,
        min=0.0,
        help="Seconds of idleness after which a kernel is parked or suspended if somebody waits for its GPU. It gets "
        "one back before it goes on. 0: never for that reason.",
    ).tag(config=True)
    park_after = Float(
        300.0,
        min=0.0,
        help="Seconds of idleness after which a kernel is parked: its GPU is given back, what it has there waits in "
        "the host's memory, and its next cell takes a GPU again. 0: never, also not if somebody waits for one.",
    ).tag(config=True)
    wake_on_typing = Bool(
        True,
        help="A parked kernel goes on as soon as somebody types in a code cell of its notebook, or clicks into one, or "
        "comes back to the notebook after two minutes and presses anything there, so that the cell need not wait for "
        "what was on the GPU. Only on a GPU that is free and that nobody waits for, and not where somebody gave the "
        "GPU back by hand.",
    ).tag(config=True)
    park_memory = Float(
        0.25,
        min=0.0,
        help="Most of the host's memory that parked kernels' GPU memory may take together; those parked longest are "
        "suspended for others. A fraction of the machine's where under 1, else GiB.",
    ).tag(config=True)
    park_with_torch = Bool(
        False,
        help="Where the driver cannot park a kernel (MIG, managed memory, MPS, an old driver), its torch moves the "
        "tensors itself. The context, some hundred MiB, stays on the GPU while others have it.",
    ).tag(config=True)
    gpu_shares = Integer(
        1,
        min=1,
        max=16,
        help="Most shares that one GPU may be cut into: with 2 or more, `A100/2` asks for a half. Their memory is told "
        "to the framework and watched, not enforced. 1: GPUs are not shared.",
    ).tag(config=True)
    gpu_quotas = Dict(
        help="Most GPUs at a time for each owner of sandboxes (`notebook`, `remote`, `fork`, `client`; `*`: each other "
        'one), as in `{"client": 1}`; whoever asks for more waits. Empty: no quotas.'
    ).tag(config=True)
    keeper_idle_s = Float(
        10.0, min=0.0, help="Seconds that the keeper stays when nothing runs and nobody is connected."
    ).tag(config=True)
    keep_kernels = Bool(
        True,
        help="A server that stops, or culls, suspends kernels instead of shutting them down. The next one has them.",
    ).tag(config=True)
    sandboxed_only = Bool(
        False, help="Only Warmcell kernels, and no terminals, in Jupyter servers with this extension."
    ).tag(config=True)

    @property
    def remote_values_bytes(self) -> int:
        """`remote_values` in bytes."""
        return int(self.remote_values * GIB)

    @property
    def egress_bounds(self) -> tuple[str, ...]:
        """Hosts that may be asked for: who may have the machine's network may have any."""
        if self.egress_allowed is not None:
            return tuple(self.egress_allowed)
        return ("*",) if "host" in self.networks else ()

    @property
    def usual_backend(self) -> str:
        """What notebooks get that name neither backend nor image."""
        return USUAL if self.backend == AUTO else self.backend

    def bounds(self) -> Bounds:
        """The operator's caps as the engine takes them."""
        return Bounds.from_names(
            networks=self.networks,
            workspace_modes=self.workspace_modes,
            backends=[name for name in dict.fromkeys(["bubblewrap", "docker", "gvisor", self.backend]) if name != AUTO],
            mounts=self.mounts,
            max_memory_bytes=None if self.max_memory is None else int(self.max_memory * GIB),
            max_cpus=self.max_cpus,
            max_sandboxes=self.max_sandboxes,
        )


SERVERS_OWN = ("e2b_internet", "e2b_public_ports", "keep_kernels", "sandboxed_only")
"""What only Jupyter servers read."""


OURS = Warmcell.__name__
MISSPELT = 0.85
"""How like ours a name is that is taken for it, from 0 to 1; WarmcellApp, which is Jupyter's, is less."""


def load() -> Config:
    """The configuration of all Jupyter config directories, the user's last and strongest.

    Raises:
        InvalidRequestError: One of the files cannot be read.
    """
    from jupyter_core.application import JupyterApp

    class Loader(JupyterApp):
        name = "jupyter-warmcell"
        config_file_name = CONFIG_FILE
        raise_config_file_errors = True

    loader = Loader()
    try:
        loader.load_config_file()
    except Exception as error:  # whatever a file that is a program may raise
        raise InvalidRequestError(
            f"{CONFIG_FILE}.py cannot be read: {type(error).__name__}: {error}",
            hint=f"Mend it; it is in one of {', '.join(loader.config_file_paths)}.",
        ) from error
    return loader.config


def settings() -> Warmcell:
    """The operator's settings, checked: bounds that are misspelt would be no bounds.

    Raises:
        InvalidRequestError: A file cannot be read, or names or values in it are not ours.
    """
    loaded = load()
    known = Warmcell.class_trait_names(config=True)
    for name in sorted(set(loaded) - {OURS}):  # Those of others are there too: Jupyter's own file is read before.
        if difflib.get_close_matches(name.lower(), [OURS.lower()], cutoff=MISSPELT):
            raise InvalidRequestError(f"c.{name} is nobody's", hint=f"Did you mean c.{OURS}?")
    for name in loaded.Warmcell:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InvalidRequestError(
                f"c.Warmcell.{name} is no setting",
                hint=f"Did you mean c.Warmcell.{near[0]}?" if near else f"Settings are {', '.join(sorted(known))}.",
            )
    try:
        return Warmcell(config=loaded)
    except TraitError as error:
        raise InvalidRequestError(f"The configuration is wrong: {error}", hint=f"Mend {CONFIG_FILE}.py.") from error


def unseen(server: Warmcell) -> Sequence[str]:
    """What a Jupyter server's own configuration says, and the keeper, which serves all of them, does not see.

    Raises:
        InvalidRequestError: The keeper's configuration cannot be read.
    """
    keepers = settings()
    names = sorted(set(Warmcell.class_trait_names(config=True)) - set(SERVERS_OWN))
    return [name for name in names if getattr(server, name) != getattr(keepers, name)]


def environment_summary() -> dict[str, Any]:
    """What of the environment decides where things lie, for `doctor`."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith("WARMCELL_")}
