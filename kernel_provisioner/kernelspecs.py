"""Kernelspecs: how Jupyter learns that a Python environment's kernels are to run in sandboxes."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel

from warmcell.kernel_provisioner.wishes import Wishes, parse_size
from warmcell.sandbox.errors import InvalidRequestError, NotFoundError
from warmcell.sandbox.wire import Wire

PROVISIONER: Final = "warmcell"
SHIPPED: Final = "warmcell"
"""The kernelspec that comes with the package; its kernels run in the environment that Jupyter runs in."""

OLDEST_PYTHON: Final = (3, 9)
_ASK_TIMEOUT_S: Final = 60.0
_NAME: Final = re.compile(r"[a-z0-9._-]+")
_ASK: Final = """
import json, sys
found = {"version": sys.version_info[:3], "prefix": sys.prefix, "missing": ""}
try:
    import ipykernel
except ImportError as error:
    found["missing"] = str(error)
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed(Wire):
    """A kernelspec that was written."""

    name: str
    display_name: str
    directory: str
    python: str
    """Empty: the image's."""


def install(
    python: str,
    *,
    name: str | None = None,
    display_name: str | None = None,
    user: bool = False,
    prefix: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Installed:
    """Write a kernelspec whose kernels run in sandboxes with the environment of `python`. Blocks.

    Args:
        python: Its interpreter. The environment needs ipykernel and nothing of ours. Empty with an `image` in `config`:
            that image's, which is not looked at.
        name: Name of the kernelspec; made from the environment's folder if None.
        display_name: What the launcher shows; made from the version and the folder if None.
        user: For this user alone; the default if `prefix` is None too.
        prefix: Write below this folder's share/jupyter/kernels instead.
        config: What its kernels start with, as the traits of `WarmcellProvisioner`.

    Raises:
        InvalidRequestError: `python` cannot run kernels, or something else of this cannot be.
    """
    if user and prefix is not None:
        raise InvalidRequestError("A kernelspec is for this user or below a prefix", hint="Give one of the two.")
    image = (config or {}).get("image")
    if image and not python:
        environment = str(image).rpartition("/")[2]
        shown = f"{environment} (Warmcell)"
    else:
        python = os.path.abspath(os.path.expanduser(python))
        found = _ask(python)
        environment = _environment(Path(found["prefix"]))
        shown = f"Python {'.'.join(map(str, found['version'][:2]))} ({environment}, Warmcell)"
    name = name if name is not None else f"{SHIPPED}-{re.sub(r'[^a-z0-9_]+', '-', environment.lower()).strip('-')}"
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{name!r} cannot be the name of a kernelspec",
            hint="Use lower-case letters, digits, dot, dash, underscore.",
        )
    display_name = display_name or shown
    wanted = {**(config or {}), **({"python": python} if python else {})}
    parse_size(Wishes.from_json(wanted).memory)
    with tempfile.TemporaryDirectory() as made:
        _write(Path(made), spec(display_name, wanted))
        try:
            directory = KernelSpecManager().install_kernel_spec(made, name, user=prefix is None, prefix=prefix)
        except OSError as error:
            raise InvalidRequestError(
                f"The kernelspec cannot be written: {error}", hint="Give a folder that you may write, or --user."
            ) from error
    return Installed(name=name, display_name=display_name, directory=directory, python=python)


def remove(name: str) -> Path:
    """Remove a kernelspec of ours; the folder that was removed. Blocks.

    Raises:
        NotFoundError: There is none of that name.
        InvalidRequestError: It is not one of ours, or may not be removed.
    """
    manager = KernelSpecManager(ensure_native_kernel=False)
    try:
        found = manager.get_kernel_spec(name)
    except NoSuchKernel as error:
        raise NotFoundError(
            f"There is no kernelspec {name!r}", hint="`warmcell kernelspec list` shows those of Warmcell."
        ) from error
    if not is_ours(found):
        raise InvalidRequestError(
            f"The kernelspec {name!r} is none of Warmcell's", hint="`jupyter kernelspec remove` removes any."
        )
    try:
        return Path(manager.remove_kernel_spec(name))
    except OSError as error:
        raise InvalidRequestError(
            f"The kernelspec {name!r} cannot be removed: {error}", hint=f"Whoever owns {found.resource_dir} can."
        ) from error


def is_ours(found: KernelSpec) -> bool:
    """Whether kernels of this kernelspec are started by our provisioner."""
    provisioner: Any = found.metadata.get("kernel_provisioner")
    return isinstance(provisioner, dict) and provisioner.get("provisioner_name") == PROVISIONER


def spec(display_name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of kernel.json. Its argv is for clients that ignore provisioners; it makes a sandbox too."""
    launcher = [sys.executable, "-m", "warmcell.kernel_provisioner.launch", "-f", "{connection_file}"]
    return {
        "argv": [*launcher, "--config", json.dumps(dict(config))],
        "display_name": display_name,
        "language": "python",
        "interrupt_mode": "message",
        "metadata": {
            "debugger": True,
            "kernel_provisioner": {"provisioner_name": PROVISIONER, "config": dict(config)},
        },
    }


def _environment(prefix: Path) -> str:
    """What people call the environment: its folder's name, or its project's where that says nothing."""
    return prefix.parent.name if prefix.name in (".venv", "venv", ".env", "env") else prefix.name


def _write(directory: Path, content: Mapping[str, Any]) -> None:
    (directory / "kernel.json").write_text(json.dumps(content, indent=1) + "\n")
    for logo in _shipped_logos():
        shutil.copy(logo, directory)


def _shipped_logos() -> list[Path]:
    """Those of the kernelspec that comes with the package, wherever it was installed."""
    beside = Path(__file__).parent / "kernelspec"
    try:
        place = beside if beside.is_dir() else Path(KernelSpecManager().get_kernel_spec(SHIPPED).resource_dir)
    except NoSuchKernel:
        return []
    return sorted(place.glob("logo-*"))


def _ask(python: str) -> dict[str, Any]:
    """What the interpreter says of itself.

    Raises:
        InvalidRequestError: It is none, is too old, or has no ipykernel.
    """
    try:
        # Isolated, as in a sandbox, where neither the user's site-packages nor PYTHONPATH are.
        said = subprocess.run(
            [python, "-I", "-c", _ASK],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_ASK_TIMEOUT_S,
            check=True,
        ).stdout
        found = json.loads(said)
        version = tuple(found["version"])
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
        raise InvalidRequestError(
            f"{python} is no Python interpreter that runs ({type(error).__name__})",
            hint="Give the path of one, such as /opt/envs/train/bin/python.",
        ) from error
    if version < OLDEST_PYTHON:
        raise InvalidRequestError(
            f"{python} is Python {'.'.join(map(str, version))}, and kernels need 3.9 or newer",
            hint="Make the environment with a newer Python.",
        )
    if found["missing"]:
        raise InvalidRequestError(
            f"The environment of {python} has no ipykernel ({found['missing']})",
            hint=f"Install it: {python} -m pip install ipykernel",
        )
    return dict(found)
