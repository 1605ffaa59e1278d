"""The /etc of a sandbox: written for it, with a few public parts of the host's."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from warmcell.sandbox.backends.identity import Identity
from warmcell.sandbox.backends.lately import lately
from warmcell.sandbox.models import Network, SandboxId

_SHOWN = (
    "alternatives",
    "ca-certificates",
    "fonts",
    "OpenCL/vendors",
    "pki/ca-trust",
    "pki/tls/certs",
    "ssl/certs",
    "vulkan/icd.d",
)
"""Directories of the host's /etc that hold nothing private and that libraries look into."""
_COPIED = (
    "ld.so.cache",
    "ld.so.conf",
    "mime.types",
    "protocols",
    "services",
    "ssl/openssl.cnf",
    "timezone",
    "os-release",
)
_COPIED_WITH_NETWORK = ("resolv.conf", "gai.conf")
_FILE_MAX_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Etc:
    """What to make below /etc; paths are relative to it."""

    files: Mapping[str, bytes]
    links: Mapping[str, str]
    shown: Mapping[str, Path]
    """Directories to bind from the host, read-only."""


def hostname(sandbox_id: SandboxId) -> str:
    """What a sandbox calls itself: its clones have other names."""
    return f"warmcell-{sandbox_id[:6]}"


def compose(identity: Identity, *, home: str, name: str, network: Network, host: Path = Path("/etc")) -> Etc:
    """The /etc for a guest. Blocks."""
    public = _public(host, network == "host")
    files = {**own(identity, home=home, name=name, network=network), **public.files}
    return Etc(files=files, links=public.links, shown=public.shown)


@lately
def _public(host: Path, with_network: bool) -> Etc:
    files: dict[str, bytes] = {}
    for file in (*_COPIED, *(_COPIED_WITH_NETWORK if with_network else ())):
        content = _content(host / file)
        if content is not None:
            files[file] = content
    shown = {each: path.resolve() for each in _SHOWN if (path := host / each).is_dir()}
    for programs in ("R", "java-*", "python3*"):
        shown.update({path.name: path.resolve() for path in sorted(host.glob(programs)) if path.is_dir()})
    links = {"mtab": "../proc/self/mounts"}
    zone = (host / "localtime").resolve()
    if zone.is_relative_to("/usr"):
        links["localtime"] = os.path.relpath(zone, "/etc")
    elif (content := _content(zone)) is not None:
        files["localtime"] = content
    return Etc(files=files, links=links, shown=shown)


def own(identity: Identity, *, home: str, name: str, network: Network) -> Mapping[str, bytes]:
    """What is written for each sandbox: who is there, how it is called, how pip installs."""
    user, uid, gid = identity.name, identity.uid, identity.gid
    pip = ["[global]", "disable-pip-version-check = true", "no-input = true", "break-system-packages = true"]
    if network == "none":
        pip.append("retries = 0")  # There is nobody to ask again.
    text = {
        "passwd": f"root:x:0:0:root:/nonexistent:/usr/sbin/nologin\n{user}:x:{uid}:{gid}:{user}:{home}:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        "group": f"root:x:0:\ntty:x:5:\n{user}:x:{gid}:\nnogroup:x:65534:\n",
        "hosts": f"127.0.0.1 localhost {name}\n::1 localhost ip6-localhost ip6-loopback\n",
        "hostname": f"{name}\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
        "host.conf": "multi on\n",
        "shells": "/bin/sh\n/bin/bash\n",
        "pip.conf": "\n".join(pip) + "\n",
    }
    return {name: content.encode() for name, content in text.items()}


def _content(path: Path) -> bytes | None:
    """A public file of the host, None where there is none or only its owner may read it."""
    try:
        found = path.stat()
        if not found.st_mode & 0o004 or found.st_size > _FILE_MAX_BYTES or not path.is_file():
            return None
        return path.read_bytes()
    except OSError:
        return None
