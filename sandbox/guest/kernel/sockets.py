"""Where a kernel's sockets are.

In the run directory, which the host shares, unless the sandbox has a place of its own for them in it: sockets that are
bound on the host cannot be saved by a kernel of the sandbox's own. There init stands in between.
"""

from __future__ import annotations

import os

OWN = ".own"


def at(prefix: str) -> str:
    """Where sockets that are asked for at `prefix` are bound."""
    directory, name = os.path.split(prefix)
    own = os.path.join(directory, OWN)
    return os.path.join(own, name) if os.path.isdir(own) else prefix
