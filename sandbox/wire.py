"""How frozen data becomes JSON and is read again: the one wire form of all that the engine tells and is told.

Whoever reads is told the place of what is wrong, as in "SandboxSpec.limits.pids must be int, not str".
"""

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NewType, Self

from warmcell.sandbox.errors import InvalidRequestError


class Wire:
    """JSON form of a dataclass: field names stay, nested dataclasses nest, enums become their value."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """This object as JSON-ready builtins."""
        encoded = _encode(self)
        assert isinstance(encoded, dict)
        return encoded

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the wire form.

        Raises:
            InvalidRequestError: A name is unknown, a required one is missing or a value is of the wrong type.
        """
        decoded = _decode(cls, data, cls.__name__)
        assert isinstance(decoded, cls)
        return decoded

    @classmethod
    def normalized(cls, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same object with short forms, where some may be given, written out."""
        return data


class Secret(str):
    """Text that nothing of ours writes down or sends on: in JSON and in logs it is `HIDDEN`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(HIDDEN)


HIDDEN = "***"
"""Stands for a secret that was there. What was read with it knows the secret no more."""


def _encode(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(v) for v in value]
    return HIDDEN if isinstance(value, Secret) else value


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Read `value` as `kind`; `where` names the place in an error."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, NewType):
        return _decode(kind.__supertype__, value, where)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, value, where)
    if origin is Literal:
        if value in args:
            return value
        raise InvalidRequestError(
            f"{where}: {value!r} is not one of {', '.join(map(repr, args))}", hint="Use one of the listed values."
        )
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _mismatch(where, "a list", value)
        return tuple(_decode(args[0], item, f"{where}[{n}]") for n, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _mismatch(where, "an object", value)
        return {str(k): _decode(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    if kind is Any:
        return value
    if kind is Secret:
        return Secret(_decode(str, value, where))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise InvalidRequestError(f"{where} is too large for a number", hint="Give a smaller one.") from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _mismatch(where, kind.__name__, value)
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise _mismatch(where, "an object", value)
    if issubclass(kind, Wire):
        value = kind.normalized(value)
    kinds, needed = _fields(kind)
    unknown = sorted(value.keys() - kinds.keys())
    if unknown:
        raise InvalidRequestError(
            f"{where} has no field {unknown[0]!r}", hint=f"Known fields: {', '.join(sorted(kinds))}."
        )
    missing = [name for name in needed if name not in value]
    if missing:
        raise InvalidRequestError(f"{where} lacks {missing[0]!r}", hint=f"Give {', '.join(missing)}.")
    return kind(**{name: _decode(kinds[name], item, f"{where}.{name}") for name, item in value.items()})


@functools.cache
def _fields(kind: Any) -> tuple[Mapping[str, Any], Sequence[str]]:
    """The type of each field, and those that have no default. Looked up once: each start reads some of them."""
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    return {f.name: hints[f.name] for f in fields}, needed


def _decode_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in args:
        return None
    failure: InvalidRequestError | None = None
    for kind in args:
        if kind is types.NoneType:
            continue
        try:
            return _decode(kind, value, where)
        except InvalidRequestError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _mismatch(where: str, expected: str, value: Any) -> InvalidRequestError:
    return InvalidRequestError(
        f"{where} must be {expected}, not {type(value).__name__}", hint=f"Give {expected} for {where}."
    )
