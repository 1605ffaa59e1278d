"""`python -m warmcell.extension.cli`: the command line where its script is not on PATH."""

import sys

from warmcell.extension.cli import main

if __name__ == "__main__":
    sys.exit(main())
