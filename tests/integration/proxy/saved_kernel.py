"""A kernel as it runs in a sandbox, without the sandbox: `python saved_kernel.py CONNECTION_FILE`."""

import sys

from warmcell.sandbox.guest.kernel import application

if __name__ == "__main__":
    app = application.initialized(sys.argv[1])
    app.start()
