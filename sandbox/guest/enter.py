"""Run one module of the guest tree with the environment's own Python: `PYTHON enter.py MODULE ARGUMENT...`."""

import os
import sys


def register() -> None:
    """Make the guest tree importable as `warmcell_guest`, leaving `sys.path` as a kernel has it."""
    directory = os.path.dirname(os.path.abspath(__file__))
    if sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(directory):
        del sys.path[0]
    package = type(sys)("warmcell_guest")
    package.__path__ = [directory]
    package.__file__ = os.path.join(directory, "__init__.py")
    sys.modules["warmcell_guest"] = package


if __name__ == "__main__":
    register()
    name = sys.argv[1]
    __import__(f"warmcell_guest.{name}", fromlist=["main"]).main(sys.argv[2:])
