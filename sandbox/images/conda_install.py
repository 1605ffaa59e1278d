"""Installs conda's packages into an environment, with py-rattler: solves, fetches and links them.

A program by itself, for Python 3.10 or newer: builds run it where the environment is to be, in a sandbox or in a stage
of a container's image. It imports nothing of ours. Arguments: a file of JSON with `channels` and `packages`, the
environment's directory, and one for what is fetched. `CONDA_CHANNEL_ALIAS` is where channels without an address are;
what is installed has nothing of it, nor do scripts that packages run see it.
"""

import asyncio
import ctypes
import faulthandler
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, unquote

import rattler
from rattler.exceptions import SolverError

PUBLIC = "https://conda.anaconda.org"
DEFAULTS = ("https://repo.anaconda.com/pkgs/main", "https://repo.anaconda.com/pkgs/r")
"""What conda itself means by `defaults`."""
ALIAS = "CONDA_CHANNEL_ALIAS"
SECRET = (ALIAS, "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX")
"""Variables that may hold a password."""
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)
ATTEMPTS = 2
_PR_SET_DUMPABLE = 4
TLS = 'tls-root-certs = "{roots}"\n'


class Alias:
    """Where channels are that have a name. A password or a token may be in it, which nobody is told."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        scheme, _, rest = self.address.partition("://")
        user, _, place = rest.rpartition("@")
        found = re.fullmatch(r"([^/]*)(?:/t/([^/]+))?(.*)", place, re.DOTALL)
        assert found is not None  # It matches anything.
        host, token, path = found.groups()
        name, _, password = user.partition(":")
        # A name may be short, and so a part of any word; one without a password is a token.
        self._secrets = sorted(_forms(password or name) | _forms(token or ""), key=len, reverse=True)
        names = "|".join(map(re.escape, _forms(name)))
        self._names = re.compile(rf"(?<=//)(?:{names})(?=[:@])") if names else None
        # py-rattler writes stars in their places.
        before, after = re.escape(f"{scheme}://"), re.escape(path)
        between = r"(?:/t/[^/\s\"]+)?" if token else ""
        self._ours = re.compile(rf"{before}(?:[^\s\"]*@)?{re.escape(host)}{between}{after}")

    def hide(self, text: str) -> str:
        """What can be told."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text if self._names is None else self._names.sub("***", text)

    def forget(self, text: str) -> str:
        """The same of the public place: with nothing of this one."""
        return text if self.address == PUBLIC else self._ours.sub(PUBLIC, text)


def _forms(text: str) -> set[str]:
    """How it may be written in an address."""
    return {text, quote(text), quote(text, safe=""), unquote(text)} - {""}


def places(channels: Sequence[str], alias: str) -> list[str]:
    """Addresses of channels that may be names."""
    found: list[str] = []
    for channel in channels:
        if channel == "defaults":
            found += DEFAULTS
        else:
            found.append(channel if "://" in channel else f"{alias}/{channel}")
    return found


def placed(package: str, alias: str) -> str:
    """A package that names its channel ("conda-forge::numpy"), by the channel's address."""
    channel, separator, rest = package.rpartition("::")
    return f"{places([channel], alias)[0]}::{rest}" if separator and channel != "defaults" else rest


async def install(asked: dict[str, list[str]], target: Path, cache: Path, alias: Alias) -> None:
    """Do all of it.

    Raises:
        RuntimeError: Of py-rattler, with its reason.
    """
    roots = "system" if os.environ.get("SSL_CERT_FILE") else "webpki"
    client = rattler.Client.from_config(rattler.Config.from_toml(TLS.format(roots=roots)))
    gateway = rattler.Gateway(cache_dir=cache / "repodata", client=client)
    packages = [placed(package, alias.address) for package in asked["packages"]]
    overrides = rattler.VirtualPackageOverrides.from_env()
    records = await rattler.solve(
        [rattler.Channel(place) for place in places(asked["channels"], alias.address)],
        packages,
        gateway=gateway,
        virtual_packages=rattler.VirtualPackage.detect(overrides),
    )
    for record in records:
        print(f"{record.name.normalized} {record.version} {record.build}", flush=True)
    print(f"linking {len(records)} packages", flush=True)
    await rattler.install(
        records,
        target,
        cache_dir=cache / "packages",
        client=client,
        show_progress=False,
        execute_link_scripts=True,
    )
    for file in (target / "conda-meta").iterdir():
        if file.is_file():
            file.write_text(alias.forget(file.read_text()))


def hide_secrets() -> None:
    """Scripts that packages run as they are linked see no password: neither in their environment nor in this one's."""
    for name in SECRET:
        os.environ.pop(name, None)
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # `/proc/PID/environ` keeps what a process began with.


def told(alias: Alias) -> int:
    """The exit code: 1 where packages cannot be had, with the reason on standard error and no secret of the alias."""
    asked, target, cache = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), Path(sys.argv[3])
    try:
        asyncio.run(install(asked, target, cache, alias))
    except SolverError as error:
        print(f"These packages cannot be had together: {alias.hide(str(error))}", file=sys.stderr)
    except Exception as error:
        print(f"{type(error).__name__}: {alias.hide(str(error))}", file=sys.stderr)
    else:
        return 0
    return 1


def end(code: int) -> NoReturn:
    """Without taking the interpreter apart.

    py-rattler's threads may still wait for it, and crash in one that is going (PyO3/pyo3-async-runtimes#40).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def survive(work: Callable[[], int]) -> int:
    """The exit code of work that is done in a child, and begun anew once where it crashes.

    py-rattler was seen to crash in builds; what it has linked by then is linked again.
    """
    for crashes in range(ATTEMPTS):
        child = os.fork()
        if child == 0:
            faulthandler.enable()
            end(work())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code >= 0:
            return code
        again = -code in CRASHES and crashes + 1 < ATTEMPTS
        print(
            f"{signal.Signals(-code).name} ended py-rattler{'; once more' if again else ''}",
            file=sys.stderr,
            flush=True,
        )
        if not again:
            break
    return 128 - code


def main() -> int:
    """Nobody sees a secret: neither what packages run, nor whoever looks at this process or its child."""
    alias = Alias(os.environ.get(ALIAS, PUBLIC))
    hide_secrets()
    return survive(partial(told, alias))


if __name__ == "__main__":
    sys.exit(main())
