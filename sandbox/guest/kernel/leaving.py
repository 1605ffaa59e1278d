"""The end of a kernel: what its user is owed, without taking the interpreter and its libraries apart.

Finalising an interpreter touches every object in it, and after a fork that copies its page first; then the libraries
destroy what they have, torch for a quarter of a second. All of it is memory that is about to go anyway.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import sys
import threading
import weakref
from typing import Any, NoReturn

WRITERS = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom, io.BufferedRWPair)


def disown_imports() -> None:
    """In the template: what its imports would tidy up at exit is not for a kernel to tidy up.

    Those of torch alone take a tenth of a second. Functions registered with `atexit` stay: they flush and say things.
    """
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def leave(shell: Any) -> NoReturn:
    """End the process as an interpreter ends, for all that others can see of it.

    Threads are waited for, exit functions run, variables go (and with them what their objects do at their end), and
    what was written to open files is in them.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    # IPython has dropped the variables by now; what a last result or error refers to is still there.
    shell.last_execution_result = sys.last_value = sys.last_traceback = None
    gc.collect()
    for one in (*gc.get_objects(), sys.stdout, sys.stderr):
        if type(one) in WRITERS:
            with contextlib.suppress(Exception):
                one.flush()
    ctypes.CDLL(None).fflush(None)
    os._exit(0)
