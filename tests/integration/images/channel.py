"""A channel of conda's with a few packages: this machine's own Python, and tiny ones made here."""

import asyncio
import hashlib
import io
import json
import os
import sys
import sysconfig
import tarfile
from collections.abc import Mapping, Sequence
from importlib.metadata import distribution
from importlib.metadata import version as version_of
from pathlib import Path

from packaging.requirements import Requirement
from rattler.index import index_fs

PREFIX = "/opt/placeholder_of_the_environments_prefix"
"""In files of packages: replaced by where the environment is."""
SEEN = "seen-by-a-script"
"""What the script of a package saw as it was linked."""
LINKED = f'#!/bin/sh\n{{ env; cat /proc/*/environ; }} > "$PREFIX/{SEEN}" 2>/dev/null || true\n'.encode()
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
_LEFT_OUT = {"__pycache__", "EXTERNALLY-MANAGED", "idlelib", "lib2to3", "test", "tkinter"}


def make_channel(directory: Path) -> Path:
    """Make it. `greeting` comes in two versions, of which `wchello` needs the older one; `pip` and
    `ipykernel` are this test's.
    """
    library = Path(sysconfig.get_path("stdlib"))
    program = Path(sys.executable).resolve().read_bytes()
    own = {f"bin/{name}": program for name in ("python", f"python{OWN}")}
    own |= {f"lib/python{OWN}/{name}": content for name, content in _tree(library).items()}
    # Debian's Python looks for packages elsewhere than conda's own does.
    site = "lib/python3/dist-packages" if "dist-packages" in sysconfig.get_path("purelib", "deb_system") else ""
    _package(directory, "python", sys.version.split()[0], own, more={"python_site_packages_path": site} if site else {})
    for version in ("1.0", "2.0"):
        greet = f"#!/bin/sh\necho hello {version} from {PREFIX}\n".encode()
        _package(directory, "greeting", version, {"bin/greet": greet, "bin/.greeting-post-link.sh": LINKED})
    for name in ("pip", "ipykernel"):
        _package(directory, name, version_of(name), _installed(name), ["python"], noarch=True)
    _package(
        directory, "wchello", "1.0", {"site-packages/wchello.py": b"n = 42\n"}, ["python", "greeting <2"], noarch=True
    )
    asyncio.run(index_fs(directory))
    return directory


def _installed(name: str) -> Mapping[str, bytes]:
    """What is installed here of that name, with all that it needs: its packages are one of the channel's."""
    found, seen, todo = dict[str, bytes](), set[str](), [name]
    while todo:
        if (each := todo.pop()) in seen:
            continue
        seen.add(each)
        made = distribution(each)
        for file in made.files or ():
            if ".." not in file.parts and not _LEFT_OUT & set(file.parts):
                found[f"site-packages/{file}"] = Path(made.locate_file(file)).read_bytes()
        for needed in map(Requirement, made.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed.name)
    return found


def _tree(top: Path) -> Mapping[str, bytes]:
    found = {}
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("config-")]
        for name in names:
            path = Path(folder, name)
            if name not in _LEFT_OUT and path.is_file():
                found[str(path.relative_to(top))] = path.read_bytes()
    return found


def _package(
    channel: Path,
    name: str,
    version: str,
    files: Mapping[str, bytes],
    depends: Sequence[str] = (),
    *,
    noarch: bool = False,
    more: Mapping[str, str] | None = None,
) -> None:
    """A package in conda's older form, as its documentation has it."""
    subdir = "noarch" if noarch else "linux-64"
    target = channel / subdir / f"{name}-{version}-0.tar.bz2"
    target.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "name": name,
        "version": version,
        "build": "0",
        "build_number": 0,
        "depends": list(depends),
        "subdir": subdir,
        **({"noarch": "python"} if noarch else {"arch": "x86_64", "platform": "linux"}),
        **(more or {}),
    }
    paths = []
    with tarfile.open(target, "w:bz2", compresslevel=1) as archive:
        for path, content in files.items():
            _add(archive, path, content)
            entry = {
                "_path": path,
                "path_type": "hardlink",
                "sha256": hashlib.sha256(content).hexdigest(),
                "size_in_bytes": len(content),
            }
            if PREFIX.encode() in content:
                entry |= {"prefix_placeholder": PREFIX, "file_mode": "text"}
            paths.append(entry)
        _add(archive, "info/index.json", json.dumps(about).encode())
        _add(archive, "info/paths.json", json.dumps({"paths": paths, "paths_version": 1}).encode())
        _add(archive, "info/files", "".join(f"{path}\n" for path in files).encode())


def _add(archive: tarfile.TarFile, path: str, content: bytes) -> None:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(content), 0o755 if path.startswith("bin/") else 0o644
    archive.addfile(entry, io.BytesIO(content))
