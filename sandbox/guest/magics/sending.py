"""What the ranks of one sandbox are sent: each variable once, until it changes here."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .. import modules
from ..values import CannotTravelError, Packed, TooLargeError, pack, unpack
from ..weights import Weight, in_words, size_of, weights
from .store import Marks, Piece, Progress, Store, address

FOLDER = "."
"""What the folder is called among what a rank has, where all else are names of variables."""

INLINE_BYTES = 256 * 1024
"""A larger pickle is put where all ranks can map it."""


class Load(NamedTuple):
    """What one rank is told to load before a cell."""

    told: Mapping[str, Any] | None
    body: bytes
    tags: Mapping[str, str]
    """What the rank has once it has loaded it."""


class Version(NamedTuple):
    """One value as it was sent under a tag."""

    stream: bytes
    """Digest of its pickle."""
    pieces: tuple[Piece, ...]
    """Its buffers."""


class Parcel:
    """The variables of one fan-out."""

    def __init__(
        self,
        store: Store,
        values: Mapping[str, Any],
        always: Iterable[str],
        progress: Progress,
        *,
        ranks: int = 1,
        imports: Iterable[str] = (),
    ) -> None:
        """Look at the values; nothing is sent yet.

        Args:
            store: Of the ranks that are to have them.
            values: By name.
            always: Those that are sent also where a rank has them.
            progress: Told as they are sent.
            ranks: How many there are.
            imports: Dotted names of what the cell imports.

        Raises:
            CannotTravelError: One cannot be sent, or all are too much.
        """
        self._store = store
        self._values = dict(values)
        self._always = frozenset(always)
        self._progress = progress
        self._tags: dict[str, str] = {}
        self._others: set[str] = set()
        """Tags of what values were, and are no more."""
        self._packs: dict[frozenset[str], Packed] = {}
        self._put: dict[tuple[int, int], Piece] = {}
        """Where buffers lie here, of packs that are kept, to where they are there."""
        self._folder = os.getcwd()
        self._modules = modules.give(self._folder, imports)
        self._modules_tag = modules.digest(self._modules)
        wanted = {
            name: value
            for name, value in self._values.items()
            if name in self._always or not all(store.is_theirs(rank, name, value) for rank in range(ranks))
        }
        total, together = 0, False
        for name in wanted:
            total += self._alone(name, wanted).size
            if total > store.limit and not together:  # What several share goes once.
                self._pack(frozenset(wanted), {})
                together = True

    def load(self, rank: int, extra: Mapping[str, Any] | Packed) -> Load:
        """Have in the sandbox what this rank needs, and say what it is to load; `extra` is for this cell alone.

        Raises:
            CannotTravelError: Something cannot be sent.
            KeeperError: The values do not fit, or the sandbox is gone.
        """
        held = self._store.held.get(rank, {})
        own = {
            name: ""
            for name, value in self._values.items()
            if name not in self._always and self._store.is_theirs(rank, name, value)
        }
        others = [name for name in self._values if name not in own]
        needs_modules = bool(self._modules) and held.get("") != self._modules_tag
        old = self._old_modules(rank) if needs_modules else []
        new = frozenset(
            name
            for name in others
            if name in self._always or not self._has(held, name) or (old and self._uses(name, old))
        )
        there = {**own, **{name: held[name] for name in others if name not in new}}
        if self._modules and not needs_modules:
            there[""] = self._modules_tag
        is_elsewhere = held.get(FOLDER) != self._folder
        if not (new or there or extra or needs_modules or is_elsewhere):
            return Load(None, b"", {})
        told: dict[str, Any] = {"stream": None, "buffers": [], "held": there, "modules": {}}
        if needs_modules:
            told["modules"] = self._modules
        if is_elsewhere:
            told["folder"] = self._folder
        body = b""
        if new or extra:
            if new and extra:  # What stays is put where it stays, once for all.
                self._pieces(self._pack(new, {}).buffers, kept=True)
            packed = self._pack(new, extra)
            inline = len(packed.stream) <= INLINE_BYTES
            stream = [] if inline else [memoryview(packed.stream)]
            pieces = self._pieces([*packed.buffers, *stream], kept=not extra)
            told["buffers"] = [piece.place for piece in pieces]
            if inline:
                body = packed.stream
                self._store.sent += len(body)
            else:
                told["stream"] = told["buffers"].pop()
        told["tags"] = {name: self._new_tag(name) for name in new}
        if needs_modules:
            told["tags"][""] = self._modules_tag
        if is_elsewhere:
            told["tags"][FOLDER] = self._folder
        return Load(told, body, told["tags"])

    def copied(self, extra: Mapping[str, Any] | Packed) -> Packed:
        """The same for `load`, as it is now, whatever becomes of it here.

        Raises:
            CannotTravelError: Something in it cannot be sent.
        """
        packed = self._pack(frozenset(), extra)
        return Packed(packed.stream, [memoryview(bytes(view)) for view in packed.buffers])

    def loaded(self, rank: int, load: Load) -> None:
        """The rank has it."""
        self._store.held.setdefault(rank, {}).update(load.tags)
        for name in load.tags:
            self._store.theirs.get(rank, {}).pop(name, None)
        if "" in load.tags:
            self._store.modules.setdefault(rank, {}).update(self._marks)

    def _pack(self, names: frozenset[str], extra: Mapping[str, Any] | Packed) -> Packed:
        if isinstance(extra, Packed):
            if not names:
                return extra
            extra = unpack(extra.stream, extra.buffers)
        if not extra and names in self._packs:
            return self._packs[names]
        chosen = {**{name: self._values[name] for name in sorted(names)}, **extra}
        try:
            packed = pack(chosen, limit=self._store.limit, there=True)
        except TooLargeError:
            raise _too_large(chosen, self._sizes(), self._store.limit) from None
        if not extra:
            self._packs[names] = packed
        return packed

    def _alone(self, name: str, others: Mapping[str, Any]) -> Packed:
        """One of them, looked at by itself; where it is too large, the error names the others too."""
        key = frozenset((name,))
        if key not in self._packs:
            try:
                self._packs[key] = pack({name: self._values[name]}, limit=self._store.limit, there=True)
            except TooLargeError:
                raise _too_large(others, self._sizes(), self._store.limit) from None
        return self._packs[key]

    def _sizes(self) -> dict[str, int]:
        """Of those that were looked at alone."""
        return {name: packed.size for (name, *more), packed in self._packs.items() if not more}

    def _pieces(self, views: Sequence[memoryview], *, kept: bool) -> list[Piece]:
        """Have these in the sandbox; where each is.

        Args:
            views: Buffers.
            kept: They stay where they are for as long as this does.
        """
        keys = [address(view) for view in views]
        found = [None if key is None else self._put.get(key) for key in keys]
        pieces = self._store.put(views, found, self._progress)
        if kept:
            self._put.update({key: piece for key, piece in zip(keys, pieces) if key is not None})
        return pieces

    def _has(self, held: Mapping[str, str], name: str) -> bool:
        """Whether a rank that has these has what this value is now."""
        tag = held.get(name)
        if tag is None or tag in self._others:
            return False
        if self._tags.get(name) == tag:
            return True
        version, packed = self._store.versions.get(tag), self._alone(name, self._values)
        if (
            version is None
            or version.stream != _digest(packed.stream)
            or len(version.pieces) != len(packed.buffers)
            or not all(self._store.same(Marks(view), piece) for view, piece in zip(packed.buffers, version.pieces))
        ):
            self._others.add(tag)
            return False
        self._tags[name] = tag
        keys = [address(view) for view in packed.buffers]
        self._put.update({key: piece for key, piece in zip(keys, version.pieces) if key is not None})
        return True

    @functools.cached_property
    def _marks(self) -> dict[str, str]:
        """The notebook's own modules as they are here, for whoever is given them."""
        return {name: modules.digest({name: given}) for name, given in self._modules.items()}

    def _old_modules(self, rank: int) -> list[str]:
        """Those that the rank has otherwise than they are here, and is about to load again with those that use them.

        Objects that it has of all others stay: its cells may have made something of them.
        """
        there = self._store.modules.get(rank, {})
        return modules.with_users(
            {name for name, mark in self._marks.items() if there.get(name, mark) != mark}, self._modules
        )

    def _uses(self, name: str, old: Iterable[str]) -> bool:
        """Whether a value may be of a class of these modules: pickles have their names as short texts."""
        stream = self._alone(name, self._values).stream
        return any(b"\x8c%c%b" % (len(one), one) in stream for one in map(str.encode, old) if len(one) < 256)

    def _new_tag(self, name: str) -> str:
        """What tells this value, which was put there, from what it was, or will be."""
        if name not in self._tags:
            packed = self._alone(name, self._values)
            self._tags[name] = secrets.token_hex(16)
            pieces = tuple(self._pieces(packed.buffers, kept=True))
            self._store.versions[self._tags[name]] = Version(_digest(packed.stream), pieces)
        return self._tags[name]


def _digest(stream: bytes) -> bytes:
    return hashlib.sha256(stream).digest()


def _too_large(values: Mapping[str, Any], known: Mapping[str, int], limit: int) -> CannotTravelError:
    """The error that names the sizes.

    Args:
        values: All variables.
        known: Sizes of those that were looked at.
        limit: What may be sent.
    """
    found = [*(Weight(name, size) for name, size in known.items())]
    found += weights({name: value for name, value in values.items() if name not in known}, limit)
    found.sort(key=lambda one: -limit if one.size_bytes is None else -one.size_bytes)
    return CannotTravelError(
        f"The variables of this cell are more than the {size_of(limit)} that may be sent: {in_words(found)}",
        "Read large data in the remote cell, from the folder that both see, or raise c.Warmcell.remote_values.",
    )
