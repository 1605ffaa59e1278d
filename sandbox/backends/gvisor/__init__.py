"""The `gvisor` backend: a kernel of the sandbox's own, for code that nobody trusts. Needs root and runsc.

How a sandbox starts: `bundle` decides everything, the stage (a process of its own) makes private mounts and becomes
`runsc run`, whose sandbox process is the kernel that the guest's init is the first process of. Nothing outlives it:
runsc dies with the keeper's thread that started it, and its sandbox with runsc.
"""

from warmcell.sandbox.backends.gvisor.binary import CommandError, find
from warmcell.sandbox.backends.gvisor.driver import GvisorBackend, shape_of
from warmcell.sandbox.backends.gvisor.instance import GvisorInstance, no_images

__all__ = ["CommandError", "GvisorBackend", "GvisorInstance", "find", "no_images", "shape_of"]
