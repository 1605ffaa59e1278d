"""Sandboxes as containers of an engine that speaks Docker's API, on this machine.

The engine starts and removes them; all talk with the guest goes through its run directory, as everywhere.
"""

from warmcell.sandbox.backends.docker.driver import DockerBackend

__all__ = ["DockerBackend"]
