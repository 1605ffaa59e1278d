"""How a container says whose it is, so that none is left without an owner."""

import os
from collections.abc import Mapping
from pathlib import Path

from warmcell.sandbox.backends.processes import keeper_mark, start_time
from warmcell.sandbox.models import SandboxId

SANDBOX = "warmcell.sandbox"
KEEPER = "warmcell.keeper"
OWNER = "warmcell.owner"
"""uid of whose keeper made it: other users' processes may be hidden, so their containers are left alone."""
IMAGE = "warmcell.image"
"""Of the one image that comes from nobody's declaration: what it is called."""
PREFIX = "warmcell-"


def ours(sandbox_id: SandboxId) -> Mapping[str, str]:
    """Labels of a container that this process makes; without an id one that is no sandbox."""
    return {SANDBOX: sandbox_id, KEEPER: f"{keeper_mark()}.{boot()}", OWNER: str(os.getuid())}


def container_name(sandbox_id: SandboxId) -> str:
    """What the engine calls it."""
    return f"{PREFIX}{sandbox_id}"


def is_orphan(labels: Mapping[str, str]) -> bool:
    """Whether its keeper, one of this user's, has ended."""
    if labels.get(OWNER) != str(os.getuid()):
        return False
    pid, _, rest = labels.get(KEEPER, "").partition(".")
    began, _, booted = rest.partition(".")
    if not (pid.isdigit() and began.isdigit()):
        return False
    return booted != boot() or start_time(int(pid)) != int(began)


def boot() -> str:
    """Names the time since the machine was last started, which containers outlive."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
