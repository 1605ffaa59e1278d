"""The process of a context, in a fresh interpreter: `enter.py kernel.context_process DESCRIPTOR`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
from collections.abc import Sequence

from .context_channel import Channel

_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> None:
    """Run what the kernel sends to that descriptor, until it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = socket.socket(fileno=int(arguments[0]))
    end.set_inheritable(False)
    channel = Channel(end)
    # The kernel's end closes with it. Code that lets no other thread run would not see that.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        from .context_kernel import ContextKernel

        kernel = ContextKernel.made(channel)
    except BaseException as error:
        channel.send([b"failed", json.dumps(f"{type(error).__name__}: {error}").encode()])
        raise
    channel.send([b"ready"])
    kernel.serve()
    os._exit(0)
