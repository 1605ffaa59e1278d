"""The contract's checks of a layer, as if this kernel were one that cannot hold it in memory."""

import sys

from warmcell.sandbox.backends.bubblewrap import plan
from warmcell.sandbox.testing.contract.__main__ import main

plan.needs_layer_on_disk = lambda: True

if __name__ == "__main__":
    sys.exit(main(["bubblewrap", "--only", sys.argv[1]]))
