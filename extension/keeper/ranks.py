"""What the ranks of one cell are told, as torchrun tells its processes, so that code for it runs unchanged."""

import os
import socket
from dataclasses import dataclass

from warmcell.sandbox.live import LiveSandbox

RANKS_MAX = 32
"""Kernels of one cell."""

MASTER_PORT = 29500
"""As torchrun has it. In a network of its own a sandbox has all ports for itself."""


@dataclass(frozen=True, slots=True)
class Rank:
    """Which kernel of a cell, of how many."""

    number: int = 0
    of: int = 1


def environment(box: LiveSandbox, rank: Rank, *, port: int | None) -> dict[str, str]:
    """Variables for one rank.

    Args:
        box: Where it is.
        rank: Which.
        port: Where the ranks meet; None: they do not, as each is in a network of its own. Then what asks for the place
            fails at once, rather than waiting for others that cannot come.
    """
    told = {
        "RANK": str(rank.number),
        "WORLD_SIZE": str(rank.of),
        # With GPUs each rank sees its own only, and so its first; without, they are counted as torchrun does.
        "LOCAL_RANK": "0" if box.gpus else str(rank.number),
        "LOCAL_WORLD_SIZE": str(rank.of),
        "GROUP_RANK": "0",  # All are on one machine, and do the same.
        "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": str(rank.number),
        "ROLE_WORLD_SIZE": str(rank.of),
        "NCCL_HOSTID": box.info.id,
    }
    if port is not None:
        told.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        if box.spec.network == "none":  # There is no other interface, and the host's name leads nowhere.
            told.update({"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"})
    if rank.of > 1:
        told["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // rank.of))
    return told


def free_port() -> int:
    """A port of the host's that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
