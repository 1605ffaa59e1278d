"""Folders from which modules are imported that were not there when the interpreter started, and are there now."""

from __future__ import annotations

import os
import site
import sys


def complete() -> None:
    """Add to `sys.path` what a start in this sandbox would have found, after what is there already."""
    known = set(sys.path)
    folders = [*site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    for folder in folders:
        if folder not in known and os.path.isdir(folder):
            known.add(folder)
            sys.path.append(folder)
        for line in _lines(folder):
            path = os.path.join(folder, line)
            if path not in known and os.path.isdir(path):
                known.add(path)
                sys.path.append(path)


def _lines(folder: str) -> list[str]:
    """What the `.pth` files of that folder name; those lines are left out that are code, which has run already."""
    found: list[str] = []
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".pth") and not name.startswith("."))
    except OSError:
        return []
    for name in names:
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                lines = file.read().splitlines()
        except (OSError, ValueError):
            continue
        found += [line.strip() for line in lines if line.strip() and not line.startswith(("#", "import ", "import\t"))]
    return found
