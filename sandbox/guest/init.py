"""The first process of a sandbox: `PYTHON -I -S init.py --run DIR --guest DIR --python PYTHON`.

Kept to a few lines because the main script is compiled anew at each start; the rest comes from
compiled files where the host has written them.
"""

import sys


def main() -> None:
    """Register the guest tree as a package and supervise until asked to end."""
    directory = __file__.rpartition("/")[0]
    package = type(sys)("warmcell_guest")
    package.__path__ = [directory or "."]
    sys.modules["warmcell_guest"] = package
    supervisor = __import__("warmcell_guest.supervisor.server", fromlist=["main"])
    sys.exit(supervisor.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
