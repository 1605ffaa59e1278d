"""The `bubblewrap` backend.

How a sandbox starts: `plan` decides everything, `stage` (a process of its own) makes private mounts and becomes
bubblewrap, which makes the namespaces and the root, drops every privilege and becomes the guest's init.
"""

from warmcell.sandbox.backends.bubblewrap.driver import BubblewrapBackend

__all__ = ["BubblewrapBackend"]
