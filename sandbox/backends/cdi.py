"""What this machine's CDI specifications say that a sandbox needs for a device, besides the nodes that NVML tells of.

The Container Device Interface is how drivers tell container engines of nodes, libraries and variables. NVIDIA's toolkit
writes such a specification for its GPUs. What is of no use to a sandbox is left out: hooks other than the one that
makes links, groups, and sockets of the host.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from warmcell.sandbox.models import GpuDevice

log = logging.getLogger(__name__)

DIRECTORIES = (Path("/var/run/cdi"), Path("/etc/cdi"))
"""Where specifications lie; those of the first one are made for the driver that runs, and go before the others."""

KIND = "nvidia.com/gpu"
LINKS_HOOK = "create-symlinks"


@dataclass(frozen=True, slots=True)
class Shown:
    """Something of the host's, and where it is to be in a sandbox."""

    host: str
    guest: str


@dataclass(frozen=True, slots=True)
class Edits:
    """What is to be in a sandbox."""

    nodes: tuple[Shown, ...] = ()
    files: tuple[Shown, ...] = ()
    """Files and directories, to be read."""
    links: Mapping[str, str] | None = None
    """Place → where it leads."""
    env: Mapping[str, str] | None = None


def edits(gpus: Sequence[GpuDevice]) -> Edits:
    """What these devices need by the specifications; nothing of one that no specification knows. Blocks.

    A specification that cannot be read is left out, as container engines do, and the log says why.
    """
    wanted = [gpu for gpu in gpus if not gpu.simulated and gpu.device_nodes]
    found: list[Mapping[str, Any]] = []
    specifications = list(_specifications()) if wanted else []
    for gpu in wanted:
        for spec in specifications:
            device = _device(spec, gpu)
            if device is not None:
                found += [part for part in (_edits(spec), _edits(device)) if part not in found]
                break
    return Edits(
        nodes=tuple(
            Shown(str(one.get("hostPath") or one["path"]), _plain(one["path"])) for one in _of(found, "deviceNodes")
        ),
        files=tuple(Shown(str(one["hostPath"]), _plain(one["containerPath"])) for one in _of(found, "mounts")),
        links=dict(link for hook in _of(found, "hooks") for link in _links(hook.get("args") or [])),
        env=dict(str(one).split("=", 1) for part in found for one in part.get("env") or [] if "=" in one[1:]),
    )


def _specifications() -> Iterator[Mapping[str, Any]]:
    for directory in DIRECTORIES:
        for path in sorted(directory.glob("*")):
            if path.suffix in (".json", ".yaml", ".yml"):
                try:
                    spec = _read(path)
                    if spec.get("kind") == KIND:
                        _check(spec)
                        yield spec
                except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                    log.warning("CDI specification %s is left out: %s", path, str(error) or type(error).__name__)


def _read(path: Path) -> Mapping[str, Any]:
    text = path.read_text()
    if path.suffix == ".json":
        read = json.loads(text)
    else:
        import yaml  # The helper, which plans sandboxes too, has the standard library alone, and no GPUs.

        try:
            read = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"it is no YAML: {error}") from error
    if not isinstance(read, dict):
        raise ValueError("it is no mapping")
    return read


def _check(spec: Mapping[str, Any]) -> None:
    """Whether it has the form of one: what is used of it is read once here."""
    for part in (spec, *spec["devices"]):
        edits = _edits(part)
        texts: list[Any] = []
        for name, keys in (("deviceNodes", ["path"]), ("mounts", ["hostPath", "containerPath"]), ("hooks", ["path"])):
            for one in _of([edits], name):
                paths = [one[key] for key in keys] + [one.get("hostPath") or "/"]
                if not all(isinstance(path, str) and path.startswith("/") and ".." not in path for path in paths):
                    raise ValueError(f"{name} has a path that is not absolute: {paths}")
                texts += paths
        for one in (edits, *_of([edits], "hooks")):
            for name in ("env", "args"):
                if not isinstance(one.get(name) or [], list):
                    raise ValueError(f"its {name} is no list")
                texts += one.get(name) or []
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise ValueError("it has something else where text belongs")


def _edits(part: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = part.get("containerEdits") or {}
    return found


def _of(found: Collection[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [one for part in found for one in part.get(name) or []]


def _device(spec: Mapping[str, Any], gpu: GpuDevice) -> Mapping[str, Any] | None:
    """What it says of this one, by its UUID or its number; a number that means another device by now is none."""
    names = (gpu.uuid,) if gpu.mig else (gpu.uuid, str(gpu.index))
    for name in names:
        for device in spec["devices"]:
            nodes = {one["path"] for one in _of([_edits(device)], "deviceNodes")}
            if str(device.get("name")) == name and nodes.issuperset(gpu.device_nodes[:1]):
                found: Mapping[str, Any] = device
                return found
    return None


def _links(args: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """The links that a hook would make: `--link TARGET::PLACE`."""
    words = [str(word) for word in args]
    if LINKS_HOOK in words:
        for flag, said in pairwise(words):
            target, _, place = said.partition("::")
            if flag == "--link" and place.startswith("/") and ".." not in place and target:
                yield _plain(place), target


def _plain(place: str) -> str:
    """An absolute path by its usual name, without what means nothing in it."""
    return os.path.normpath("/" + place.lstrip("/"))
