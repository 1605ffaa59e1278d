"""What an ordinary user's keeper wants to have made, as it is sent, and what of it is refused.

Whoever sends it may be anybody. So every value is checked for its kind and its bounds, every place in the sandbox for
not being one of the sandbox's own, and no name in it is ever looked up on the host: what is shown of the host comes as
descriptors that the sender has opened.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from warmcell.sandbox.backends.bubblewrap.rootfs import ROOT
from warmcell.sandbox.backends.identity import checked_name
from warmcell.sandbox.backends.layers import DEVICES_MAX
from warmcell.sandbox.backends.places import GUEST, IMAGES, RUN
from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.helper.problems import HelperError
from warmcell.sandbox.models import USUAL_UMASK, Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

ID = re.compile(r"[a-z0-9]{12}", re.ASCII)
NAME = re.compile(r"[a-z][a-z0-9-]{0,23}", re.ASCII)
PATH_MAX = 1024
LINK_MAX = 4000
TREES_MAX, LINKS_MAX, COVERED_MAX, SKELETON_MAX = 48, 64, 64, 64
ENTRIES_MAX = 1 << 32
DEVICE_MAX = (1 << 64) - 1
SIZE_MAX_BYTES = 1 << 44
OVERLAYS = ("layer", "changes")
PRIVATE = ("tmp", "shm", "home")
OWN = (ROOT, "etc", "run", "nothing", "environment", "changed", *OVERLAYS, *PRIVATE)
"""Names on the stage that no tree of the sender's may have."""
CLOSED = (
    *("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/usr", "/boot"),
    *("/etc", "/proc", "/sys", "/dev", GUEST, IMAGES, RUN, "/var/run", "/var/tmp"),
)
"""What lies in these is the machine's or the sandbox's own: programs there run before privileges are dropped."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A directory or file of the host, as a descriptor."""

    name: str
    fd: int
    target: str
    """Where it is shown; empty if it lies below an overlay only."""
    writable: bool


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """A writable layer over trees."""

    name: str
    lowers: tuple[str, ...]
    target: str
    size_bytes: int
    mode: int
    skeleton: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Fill:
    """A saved tree, as a descriptor, that is copied."""

    fd: int
    path: str
    only_top: bool
    most_bytes: int
    most_entries: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A sandbox that somebody asks for."""

    id: str
    named: str
    """Whose name it has as a host."""
    network: str
    limits: Limits
    python: str
    home: str
    private_home: bool
    user: str
    """What the guest's user is called; empty: as on the host."""
    umask: int
    devices: tuple[int, ...]
    """Numbers that the device of its shared memory must not have."""
    trees: tuple[Tree, ...]
    overlays: tuple[Overlay, ...]
    fills: tuple[Fill, ...]
    links: Mapping[str, str]
    covered: tuple[str, ...]
    skeleton: tuple[str, ...]
    """Directories to make in the private home."""
    mounts: int
    """Descriptor of the mount namespace that the others were opened in."""
    later: bool
    """Whether its init waits until somebody needs it."""


def wanted(request: Mapping[str, Any], fds: Sequence[int]) -> Wanted:
    """The request, checked.

    Raises:
        HelperError: Something in it is not as it must be.
    """
    try:
        return _Reader(fds).read(request)
    except InvalidRequestError as error:
        raise HelperError("invalid_request", str(error.message), hint=error.hint) from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise HelperError(
            "protocol",
            f"The sandbox that was asked for is not described as it must be: {error}",
            hint="Use the same version of Warmcell on both sides.",
        ) from error


class _Reader:
    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = fds

    def read(self, said: Mapping[str, Any]) -> Wanted:
        trees = _list(said, "trees", TREES_MAX, self._tree)
        names = [tree.name for tree in trees]
        if len({*names}) != len(names) or {*names} & {*OWN}:
            raise ValueError("names of trees are not each a different one")
        overlays = _list(said, "overlays", len(OVERLAYS), lambda one: self._overlay(one, names))
        if len({one.name for one in overlays}) != len(overlays):
            raise ValueError("two overlays have one name")
        private_home = _is(said["private_home"], bool)
        home = target(said["home"])
        places = [*(tree.target for tree in trees if tree.target), *(one.target for one in overlays)]
        if private_home:
            places.append(home)
        if len({*places}) != len(places):
            raise ValueError("two trees have one place")
        fills = _list(said, "fills", 8, self._fill)
        parts = {"tmp", "shm", *(f"{one.name}/upper" for one in overlays), *(["home"] if private_home else [])}
        if not {one.path for one in fills} <= parts:
            raise ValueError("what is copied has no place")
        links = {target(place): _text(to, LINK_MAX) for place, to in _is(said["links"], dict).items()}
        if len(links) > LINKS_MAX:
            raise ValueError("there are too many links")
        covered = _list(said, "covered", COVERED_MAX, target)
        for place in [*places, *covered, *links]:
            if any(place == link or place.startswith(f"{link}/") for link in links if link != place):
                raise ValueError(f"{place} lies behind a link")
        if {*links} & {*places}:
            raise ValueError("a link and a tree have one place")
        return Wanted(
            id=_matching(said["id"], ID),
            named=_matching(said.get("named", said["id"]), ID),
            network=_one_of(said["network"], ("none", "host")),
            limits=_limits(_is(said["limits"], dict)),
            python=_path(said["python"]),
            home=home,
            private_home=private_home,
            user=_user(said.get("user", "")),
            umask=_number(said.get("umask", USUAL_UMASK), 0o777),
            devices=_list({"devices": [], **said}, "devices", DEVICES_MAX, lambda one: _number(one, DEVICE_MAX)),
            trees=trees,
            overlays=overlays,
            fills=fills,
            links=links,
            covered=covered,
            skeleton=_list(said, "skeleton", SKELETON_MAX, _below),
            mounts=self._fd(said["mounts"]),
            later=_is(said.get("later", False), bool),
        )

    def _fd(self, index: object) -> int:
        number = _number(index, len(self._fds) - 1)
        return self._fds[number]

    def _tree(self, said: Any) -> Tree:
        place = said["target"]
        return Tree(
            name=_matching(said["name"], NAME),
            fd=self._fd(said["fd"]),
            # The guest's own programs are the one tree of the sender's at a place of the sandbox's own.
            target=place if place in ("", GUEST) else target(place),
            writable=_is(said["writable"], bool),
        )

    def _overlay(self, said: Any, names: Sequence[str]) -> Overlay:
        lowers = tuple(_one_of(name, names) for name in _is(said["lowers"], list)[:4])
        if not lowers:
            raise ValueError("an overlay lies over nothing")
        return Overlay(
            name=_one_of(said["name"], OVERLAYS),
            lowers=lowers,
            target=target(said["target"]),
            size_bytes=_number(said["size_bytes"], SIZE_MAX_BYTES),
            mode=_number(said["mode"], 0o7777) & 0o3777,
            skeleton=_list(said, "skeleton", SKELETON_MAX, _below),
        )

    def _fill(self, said: Any) -> Fill:
        return Fill(
            fd=self._fd(said["fd"]),
            path=_text(said["path"], 100),
            only_top=_is(said["only_top"], bool),
            most_bytes=_number(said["most_bytes"], SIZE_MAX_BYTES),
            most_entries=_number(said["most_entries"], ENTRIES_MAX),
        )


def target(place: object) -> str:
    """A place in the sandbox where something of the sender's may be.

    Raises:
        ValueError: It is none.
        InvalidRequestError: It is one of the sandbox's own.
    """
    path = _path(place)
    if path in ("/", "/tmp", "/var", "/home", "/run"):
        raise InvalidRequestError(
            f"{path} cannot be shown whole: a sandbox has its own", hint="Choose a directory in it."
        )
    for own in CLOSED:
        if path == own or path.startswith(f"{own}/") or own.startswith(f"{path}/"):
            raise InvalidRequestError(
                f"{path} is a place that the helper makes itself",
                hint="Choose another place, outside of /usr and /etc.",
            )
    return path


def _user(name: object) -> str:
    text: str = _is(name, str)
    return checked_name(text) if text else ""


def _limits(said: Mapping[str, Any]) -> Limits:
    cpus = said["cpus"]
    if cpus is not None and not (isinstance(cpus, (int, float)) and 0 < cpus <= 65536):
        raise ValueError("cpus is no number of processors")
    memory = said["memory_bytes"]
    pids = said["pids"]
    return Limits(
        memory_bytes=None if memory is None else _number(memory, SIZE_MAX_BYTES),
        pids=None if pids is None else max(1, _number(pids, 1 << 22)),
        cpus=cpus,
        layer_bytes=_number(said["layer_bytes"], SIZE_MAX_BYTES),
        shm_bytes=_number(said["shm_bytes"], SIZE_MAX_BYTES),
    )


def _list(said: Mapping[str, Any], name: str, most: int, read: Callable[[Any], Any]) -> tuple[Any, ...]:
    found = _is(said[name], list)
    if len(found) > most:
        raise ValueError(f"there are too many {name}")
    return tuple(read(one) for one in found)


def _is(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _text(value: object, most: int) -> str:
    text: str = _is(value, str)
    if not text or len(os.fsencode(text)) > most or "\0" in text:
        raise ValueError("a text is empty or too long")
    return text


def _number(value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no number up to {most}")
    return value


def _matching(value: object, pattern: re.Pattern[str]) -> str:
    text: str = _is(value, str)
    if pattern.fullmatch(text) is None:
        raise ValueError(f"{text[:40]!r} is no name")
    return text


def _one_of(value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{str(value)[:40]!r} is none of {', '.join(choices)}")
    return str(value)


def _path(value: object) -> str:
    text = _text(value, PATH_MAX)
    if not text.startswith("/") or text.startswith("//") or os.path.normpath(text) != text:
        raise ValueError(f"{text[:80]!r} is no absolute path in its plain form")
    return text


def _below(value: object) -> str:
    """A relative path that stays below where it begins."""
    text = _text(value, PATH_MAX)
    if text.startswith("/") or os.path.normpath(text) != text or text.split("/")[0] in ("..", "."):
        raise ValueError(f"{text[:80]!r} is no path below")
    return text
