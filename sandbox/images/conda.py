"""conda's environment.yml, as far as a Python index can stand for it: a Python, what pip installs, variables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images import files
from warmcell.sandbox.images.steps import PipInstall

_PYTHON = re.compile(r"python\s*={0,2}\s*(\d+\.\d+)(?:\.\*)?")
_KNOWN = ("name", "channels", "prefix", "dependencies", "variables")
_NAMED = 5
"""Packages that an error names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What such a file asks for."""

    python: str | None
    """None: it says none."""
    packages: PipInstall | None
    variables: Mapping[str, str]


def read(path: Path) -> Environment:
    """Read one. Blocks.

    Raises:
        InvalidRequestError: It cannot be read, or asks for what only conda's channels have.
    """
    try:
        told = yaml.safe_load(files.read_text(path))
    except yaml.YAMLError as error:
        raise InvalidRequestError(f"{path} is no YAML: {' '.join(str(error).split())}", hint="Mend it.") from error
    if not isinstance(told, Mapping) or not isinstance(told.get("dependencies"), list):
        raise InvalidRequestError(f"{path} lists no dependencies", hint="Name an environment.yml of conda's.")
    if unknown := [str(key) for key in told if key not in _KNOWN]:
        raise InvalidRequestError(
            f"{path} says {unknown[0]!r}, which cannot be part of an image", hint=f"It may have {', '.join(_KNOWN)}."
        )
    asked = told["dependencies"]
    listed = [line for each in asked if isinstance(each, Mapping) for line in _of_pip(each, path)]
    return Environment(
        python=_python([str(each).strip() for each in asked if not isinstance(each, Mapping)], path),
        packages=files.requirements_of(listed, path) if listed else None,
        variables=_variables(told.get("variables") or {}, path),
    )


def _python(packages: Sequence[str], path: Path) -> str | None:
    """The version of Python among what conda would install, which may be nothing but that, and pip."""
    found: str | None = None
    others: list[str] = []
    for package in packages:
        if match := _PYTHON.fullmatch(package):
            found = match[1]
        elif re.match(r"python\b(?!-)", package) and package != "python":
            raise InvalidRequestError(f"{path}: {package!r} is no version of Python for an image", hint="python=3.12")
        elif re.split(r"[\s=<>!~]", package)[0] not in ("python", "pip"):
            others.append(package)
    if others:
        named = ", ".join(others[:_NAMED]) + (f" and {len(others) - _NAMED} more" if len(others) > _NAMED else "")
        raise InvalidRequestError(
            f"{path} asks for packages of conda's: {named}",
            hint="Images get theirs from a Python index: list these below `pip:`. Or write a Dockerfile that begins "
            "with an image that has conda or micromamba.",
        )
    return found


def _of_pip(each: Mapping[Any, Any], path: Path) -> Sequence[str]:
    listed = each.get("pip")
    if set(each) != {"pip"} or not isinstance(listed, list):
        raise InvalidRequestError(f"The dependencies in {path} are more than names and a list `pip:`", hint="Mend it.")
    return [str(line) for line in listed]


def _variables(told: object, path: Path) -> Mapping[str, str]:
    if not isinstance(told, Mapping):
        raise InvalidRequestError(f"The variables in {path} are no names with values", hint="Mend it.")
    return {str(name): str(value) for name, value in told.items()}
