"""conda's environment.yml: a Python, packages of conda's and pip's, variables."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images import files, texts
from warmcell.sandbox.images.steps import PipInstall

_PYTHON = re.compile(r"python\s*={0,2}\s*(\d+\.\d+)(?:\.\*)?")
_PLAIN = re.compile(rf"{_PYTHON.pattern}|python|pip(?:[ =<>!~].*)?")
"""What a Python index can stand for."""
_KNOWN = ("name", "channels", "prefix", "dependencies", "variables")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What such a file asks for."""

    python: str | None
    """None: it says none, or packages of conda's do."""
    conda: Sequence[str]
    """All of conda's. Empty: a plain Python and what pip installs will do."""
    channels: Sequence[str]
    packages: PipInstall | None
    variables: Mapping[str, str]


def read(path: Path) -> Environment:
    """Read one. Blocks.

    Raises:
        InvalidRequestError: It cannot be read, or says what cannot be part of an image.
    """
    try:
        told = yaml.safe_load(files.read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # The second: dates and numbers that are none.
        raise InvalidRequestError(f"{path} is no YAML: {' '.join(str(error).split())}", hint="Mend it.") from error
    if not isinstance(told, Mapping) or not isinstance(told.get("dependencies"), list):
        raise InvalidRequestError(f"{path} lists no dependencies", hint="Name an environment.yml of conda's.")
    if unknown := [str(key) for key in told if key not in _KNOWN]:
        raise InvalidRequestError(
            f"{path} says {unknown[0]!r}, which cannot be part of an image", hint=f"It may have {', '.join(_KNOWN)}."
        )
    asked = told["dependencies"]
    listed = [line for each in asked if isinstance(each, Mapping) for line in _of_pip(each, path)]
    packages = [str(each).strip() for each in asked if not isinstance(each, Mapping)]
    plain = all(_PLAIN.fullmatch(package) for package in packages)
    return Environment(
        python=next((match[1] for match in map(_PYTHON.fullmatch, packages) if match), None) if plain else None,
        conda=() if plain else _each(packages, texts.conda_package, path),
        channels=_channels(told.get("channels"), path),
        packages=files.requirements_of(listed, path) if listed else None,
        variables=_variables(told.get("variables") or {}, path),
    )


def _channels(told: object, path: Path) -> Sequence[str]:
    if told is not None and not isinstance(told, list):
        raise InvalidRequestError(f"The channels in {path} are no list", hint="Mend the file.")
    return _each([str(each) for each in told or () if each != "nodefaults"], texts.conda_channel, path)


def _each(said: Sequence[str], check: Callable[[str], str], path: Path) -> Sequence[str]:
    try:
        return [check(each) for each in said]
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{path}: {error.message}", hint=error.hint) from error


def _of_pip(each: Mapping[Any, Any], path: Path) -> Sequence[str]:
    listed = each.get("pip")
    if set(each) != {"pip"} or not isinstance(listed, list):
        raise InvalidRequestError(f"The dependencies in {path} are more than names and a list `pip:`", hint="Mend it.")
    return [str(line) for line in listed]


def _variables(told: object, path: Path) -> Mapping[str, str]:
    if not isinstance(told, Mapping):
        raise InvalidRequestError(f"The variables in {path} are no names with values", hint="Mend it.")
    return {str(name): str(value) for name, value in told.items()}
