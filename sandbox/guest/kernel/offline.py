"""pip in a sandbox without network: one error that says the cure, and local packages install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

CURE = (
    "This sandbox has no network, so pip cannot fetch packages. Choose Network: Open in the notebook's Warmcell menu "
    "and restart, or install a wheel or a folder that lies in the workspace."
)
PIP = re.compile(r"\bpip[\d.]*\s+(?:-\S+\s+)*(?:install|download|wheel)\b")
COMPLAINTS = re.compile(
    r"Could not find a version that satisfies|No matching distribution found|Retrying \(Retry"
    r"|error checking the latest version|Failed to establish a new connection|Temporary failure in name resolution"
    r"|Could not fetch URL|No route to host|Network is unreachable"
)
COLOUR_ONLY = re.compile(r"(\x1b\[[\d;]*m)+\s*")
VARIABLES = {
    "PIP_RETRIES": "0",
    "PIP_DEFAULT_TIMEOUT": "5",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    # What a folder needs to be built cannot be fetched either, so it is taken from the environment.
    "PIP_NO_BUILD_ISOLATION": "0",
}


def has_network() -> bool:
    """Whether this network namespace leads anywhere but to itself."""
    for path, device in (("/proc/net/route", 0), ("/proc/net/ipv6_route", -1)):
        try:
            with open(path) as table:
                names = {line.split()[device] for line in table if line.strip()}
        except OSError:
            continue
        if names - {"Iface", "lo"}:
            return True
    return False


def install() -> None:
    """Let `%pip install` and `!pip install` say what is missing, where there is no network."""
    from ipykernel import zmqshell

    if not has_network():
        run: Callable[[str], int] = vars(zmqshell)["system"]
        vars(zmqshell)["system"] = lambda command: _system(command, run)


def _system(command: str, run: Callable[[str], int]) -> int:
    reaches = os.environ.get("HTTPS_PROXY")  # Given, or taken away, after the template that it came from began.
    return _pip(command) if PIP.search(command) and not reaches else run(command)


def _pip(command: str) -> int:
    """Run pip, show what it prints but its complaints about the network, and raise one error instead of those.

    Raises:
        UsageError: It failed for want of a network.
    """
    from IPython.core.error import UsageError

    complained = False
    with subprocess.Popen(
        [os.environ.get("SHELL", "/bin/sh"), "-c", command],
        env={**VARIABLES, **os.environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if COMPLAINTS.search(line):
                    complained = True
                elif not COLOUR_ONLY.fullmatch(line):
                    sys.stdout.write(line)
        except KeyboardInterrupt:
            process.terminate()
    code = process.returncode
    if code and complained:
        raise UsageError(CURE)
    return code
