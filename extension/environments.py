"""The Python environments that Warmcell kernelspecs start, looked at without running anything of them."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warmcell.sandbox.wire import Wire

PROVISIONER = "warmcell"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelspecReport(Wire):
    """One Warmcell kernelspec and whether its environment is there."""

    name: str
    display_name: str
    directory: str
    python: str
    """Its interpreter, or "image" with the name of one."""
    ok: bool
    why: str = ""
    hint: str = ""


def kernelspecs() -> tuple[KernelspecReport, ...]:
    """All kernelspecs of this user whose kernels Warmcell starts, by name. Blocks."""
    from jupyter_client.kernelspec import KernelSpecManager

    found = []
    for name, entry in sorted(KernelSpecManager().get_all_specs().items()):
        spec = entry["spec"]
        provisioner = spec.get("metadata", {}).get("kernel_provisioner", {})
        if isinstance(provisioner, dict) and provisioner.get("provisioner_name") == PROVISIONER:
            found.append(_report(name, spec, entry["resource_dir"], provisioner))
    return tuple(found)


def _report(name: str, spec: dict[str, Any], directory: str, provisioner: dict[str, Any]) -> KernelspecReport:
    config = provisioner.get("config")
    config = config if isinstance(config, dict) else {}
    python = str(config.get("python") or sys.executable)
    why, hint = _problem(name, python) if not config.get("image") else ("", "")
    return KernelspecReport(
        name=name,
        display_name=str(spec.get("display_name", name)),
        directory=directory,
        python=python if not config.get("image") else f"image {config['image']}",
        ok=not why,
        why=why,
        hint=hint,
    )


def _problem(name: str, python: str) -> tuple[str, str]:
    """What a start would fail with, and the cure; empty if nothing is seen."""
    if not (os.path.isabs(python) and os.path.isfile(python) and os.access(python, os.X_OK)):
        return (
            f"its interpreter {python} is not there",
            f"Make that environment again, or `warmcell kernelspec remove {name}`.",
        )
    if not any((directory / "ipykernel").is_dir() for directory in _site_packages(Path(python))):
        return (f"{python} has no ipykernel", f"{python} -m pip install ipykernel")
    return "", ""


def _site_packages(python: Path) -> Iterator[Path]:
    """Where an interpreter's packages may lie: its own tree, and what a virtual environment is made from."""
    trees = [python.parent.parent]
    settings = python.parent.parent / "pyvenv.cfg"
    if settings.is_file():
        for line in settings.read_text(errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition("="))
            if key == "home":
                trees.append(Path(value).parent)
    else:
        trees += [python.resolve().parent.parent, Path("/usr/local")]
    for tree in trees:
        for pattern in ("lib*/python3*/site-packages", "lib*/python3*/dist-packages"):
            yield from tree.glob(pattern)
