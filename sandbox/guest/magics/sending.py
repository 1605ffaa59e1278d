"""What the ranks of one sandbox are sent: each variable once, until it changes here."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import modules
from ..values import ALIGN_BYTES, CannotTravelError, Packed, TooLargeError, pack, unpack
from ..weights import Weight, in_words, size_of, weights

if TYPE_CHECKING:
    from .api import Api

INLINE_BYTES = 256 * 1024
"""A larger pickle is put where all ranks can map it."""

FILES_MAX = 64

HASHED_BEFORE_BYTES = 2**20
"""Larger buffers that a rank needs in any case are looked at while they are sent."""

HASHERS = 2

Progress = Callable[[int, int], None]
"""Told how many bytes of how many have gone."""


class Load(NamedTuple):
    """What one rank is told to load before a cell."""

    told: Mapping[str, Any] | None
    body: bytes
    tags: Mapping[str, str]
    """What the rank has once it has loaded it."""


class Store:
    """What is in the run directory of one sandbox, and what each of its ranks has loaded."""

    def __init__(self, api: Api, sandbox_id: str, limit: int) -> None:
        self.limit = limit
        """Bytes that may be sent at a time."""
        self.sent = 0
        """Bytes so far."""
        self.held: dict[int, dict[str, str]] = {}
        """Rank to the tags of what it has, by name."""
        self.theirs: dict[int, dict[str, object]] = {}
        """Rank to names that its cells may have assigned, each with what it was here then."""
        self._api = api
        self._id = sandbox_id
        self._places: dict[bytes, tuple[str, int, int]] = {}
        self._files: dict[int, int] = {}
        self._count = 0

    def put(self, pieces: list[tuple[bytes, memoryview]], progress: Progress) -> None:
        """Have these buffers in the sandbox, each by its digest."""
        new = {digest: view for digest, view in pieces if digest not in self._places}
        if not new:
            return
        self._count += 1
        name, at, places = f"values-{self._count}", 0, {}
        for digest, view in new.items():
            places[digest] = (name, at, view.nbytes)
            at += view.nbytes + -view.nbytes % ALIGN_BYTES
        self._make_room(at)
        for sent in self._api.put_values(self._id, self._count, _padded(new.values()), at):
            progress(sent, at)
        self.sent += at
        self._files[self._count] = at
        self._places.update(places)

    def place(self, digest: bytes) -> tuple[str, int, int]:
        """File, start and size of one that was put."""
        return self._places[digest]

    def name(self, key: bytes, digest: bytes) -> None:
        """What was put as `key`, before anybody knew, has this digest."""
        place = self._places.pop(key)
        self._places.setdefault(digest, place)

    def lose(self, rank: int) -> None:
        """The rank was started anew, or nobody knows what it has."""
        self.held.pop(rank, None)
        self.theirs.pop(rank, None)

    def missed(self, rank: int, names: Iterable[str]) -> None:
        """The rank has said that it does not have these; its modules are looked at again."""
        for known in (self.held.get(rank, {}), self.theirs.get(rank, {})):
            for name in ("", *names):
                known.pop(name, None)

    def is_theirs(self, rank: int, name: str, value: object) -> bool:
        """Whether the rank may have one of its own under that name, which has stayed the same here since."""
        known = self.theirs.get(rank, {})
        return name in known and known[name] is value

    def _make_room(self, size: int) -> None:
        """Remove the oldest files, so that those in use fit; what ranks have loaded of them they keep."""
        while self._files and (len(self._files) >= FILES_MAX or sum(self._files.values()) + size > self.limit):
            number = next(iter(self._files))
            del self._files[number]
            name = f"values-{number}"
            self._places = {digest: place for digest, place in self._places.items() if place[0] != name}
            self._api.delete_values(self._id, number)


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
        self._packs: dict[frozenset[str], Packed] = {}
        self._digests: dict[tuple[int, int], bytes] = {}
        self._modules = modules.give(os.getcwd(), imports)
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
        new = frozenset(
            name for name in others if name in self._always or name not in held or held[name] != self._tag(name)
        )
        there = {**own, **{name: self._tag(name) for name in others if name not in new}}
        needs_modules = bool(self._modules) and held.get("") != self._modules_tag
        if self._modules and not needs_modules:
            there[""] = self._modules_tag
        if not (new or there or extra or needs_modules):
            return Load(None, b"", {})
        told: dict[str, Any] = {"stream": None, "buffers": [], "held": there, "modules": {}}
        if needs_modules:
            told["modules"] = self._modules
        body = b""
        if new or extra:
            packed = self._pack(new, extra)
            inline = len(packed.stream) <= INLINE_BYTES
            stream = [] if inline else [memoryview(packed.stream)]
            told["buffers"] = self._put([*packed.buffers, *stream], kept=not extra)
            if inline:
                body = packed.stream
                self._store.sent += len(body)
            else:
                told["stream"] = told["buffers"].pop()
        told["tags"] = {name: self._tag(name) for name in new}
        if needs_modules:
            told["tags"][""] = self._modules_tag
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

    def _put(self, views: list[memoryview], *, kept: bool) -> list[tuple[str, int, int]]:
        """Have these in the sandbox; where each is. What is large and was not looked at yet is so as it is sent.

        Args:
            views: Buffers.
            kept: They stay where they are for as long as this does.
        """
        pieces: list[tuple[bytes, memoryview]] = []
        hashing: dict[tuple[int, int], concurrent.futures.Future[bytes]] = {}
        with concurrent.futures.ThreadPoolExecutor(HASHERS) as pool:
            for view in views:
                key = _address(view) if kept and view.nbytes >= HASHED_BEFORE_BYTES else None
                if key is None or key in self._digests:
                    pieces.append((self._digest(view) if kept else _digest(view), view))
                    continue
                if key not in hashing:
                    hashing[key] = pool.submit(_digest, view)
                pieces.append((repr(key).encode(), view))
            self._store.put(pieces, self._progress)
        places = [self._store.place(one) for one, _ in pieces]
        for key, digest in hashing.items():
            self._digests[key] = digest.result()
            self._store.name(repr(key).encode(), self._digests[key])
        return places

    def _tag(self, name: str) -> str:
        """What tells this value from what it was, or will be."""
        if name not in self._tags:
            packed = self._alone(name, self._values)
            mark = hashlib.sha256(packed.stream)
            for view in packed.buffers:
                mark.update(self._digest(view))
            self._tags[name] = mark.hexdigest()[:32]
        return self._tags[name]

    def _digest(self, view: memoryview) -> bytes:
        """Of its content; looked at once, although a variable is packed alone and with others.

        Only for buffers of packs that are kept: another buffer may come to lie where one was.
        """
        key = _address(view)
        if key is None:
            return _digest(view)
        if key not in self._digests:
            self._digests[key] = _digest(view)
        return self._digests[key]


def _digest(view: memoryview) -> bytes:
    return hashlib.sha256(view).digest()


def _address(view: memoryview) -> tuple[int, int] | None:
    """Where a buffer lies, where that can be known: arrays can come of numpy only."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    array = numpy.frombuffer(view, dtype="u1")
    return int(array.__array_interface__["data"][0]), int(array.nbytes)


def _padded(views: Iterable[memoryview]) -> Iterator[bytes | memoryview]:
    for view in views:
        yield view
        yield bytes(-view.nbytes % ALIGN_BYTES)


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
