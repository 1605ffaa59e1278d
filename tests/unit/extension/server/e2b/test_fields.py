"""Reading protobuf's JSON: every body is read or refused by name, and nothing is guessed."""

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.anything import LENGTHS, changed, give_anything
from warmcell.extension.server.e2b import control, shapes
from warmcell.extension.server.e2b.fields import Fields, read_object
from warmcell.sandbox.errors import InvalidRequestError

NAMES = ("templateID", "timeout", "metadata", "envVars", "autoPause", "autoResume", "network", "volumeMounts", "iam")
SOUND = {"templateID": "base", "timeout": 60, "metadata": {"a": "b"}, "envVars": {"A": "b"}, "autoPause": True}
SOUND |= {"network": {"allowOut": ["a.b"]}, "autoResume": {"enabled": True}}
BODIES = st.binary(max_size=200) | changed(SOUND, {"templateID": "base"}, names=NAMES).map(
    lambda body: json.dumps(body).encode()
)


def read(data: bytes) -> None:
    """A request for a sandbox, that can be sent on."""
    wanted = shapes.new_sandbox(read_object(data, max_bytes=2**16))
    assert wanted.template
    json.dumps([wanted.terms, dict(wanted.env)], ensure_ascii=False, allow_nan=False).encode()


@LENGTHS
def test_any_body_is_a_request_or_a_typed_error(examples: int) -> None:
    """Whatever comes for `create`."""
    give_anything(BODIES, read, examples=examples, sound=[json.dumps(SOUND).encode()], broken=[b"["])


@LENGTHS
def test_any_place_in_a_list_is_one_or_refused(examples: int) -> None:
    """Where a page begins, and since when: in a query there may be anything."""
    reads: dict[str, Callable[[str], object]] = {"nextToken": control._cursor, "startedAfter": control._time}
    cursor = st.tuples(st.floats(), st.text(max_size=9)).map(
        lambda both: f"{both[0]} {both[1]}".encode(errors="replace")
    )
    texts = st.one_of(
        st.text(max_size=30),
        st.one_of(cursor, st.binary(max_size=20)).map(lambda data: base64.urlsafe_b64encode(data).decode()),
        st.datetimes().map(lambda one: one.isoformat()),
        st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{0,12}(Z|[+-][0-9:]{0,8})?", fullmatch=True),
    )
    give_anything(
        st.tuples(st.sampled_from(sorted(reads)), texts),
        lambda drawn: reads[drawn[0]](drawn[1]),
        refusals=InvalidRequestError,
        examples=examples,
        sound=[("startedAfter", "2030-01-31T12:00:00Z"), ("nextToken", base64.urlsafe_b64encode(b"1.5 a").decode())],
        broken=[("startedAfter", "0001-01-01"), ("startedAfter", "now"), ("nextToken", "x!"), ("nextToken", "\ud800")],
    )


@given(st.binary(max_size=100), st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_bytes_come_as_either_alphabet_padded_or_not(data: bytes, url: bool, padded: bool) -> None:
    """As protobuf's JSON has it."""
    text = (base64.urlsafe_b64encode(data) if url else base64.b64encode(data)).decode()
    assert Fields({"x": text if padded else text.rstrip("=")}).data("x") == data


@pytest.mark.parametrize("data", [b"[]", b"{", b'{"a":1,"a":2}', b'{"a":NaN}', b'{"a":1e999}', b"[" * 100_000, b"\xff"])
def test_what_is_no_object_is_refused(data: bytes) -> None:
    """Also a name given twice, numbers that are none, and depths that no message has."""
    with pytest.raises(InvalidRequestError):
        read_object(data, max_bytes=2**20)


def test_large_bodies_are_refused() -> None:
    """Before they are read."""
    with pytest.raises(InvalidRequestError, match="too large"):
        read_object(b" " * 11, max_bytes=10)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("x", lambda fields: fields.whole("v")),
        (-1, lambda fields: fields.whole("v")),
        (2**32, lambda fields: fields.whole("v")),
        (True, lambda fields: fields.whole("v")),
        (1, lambda fields: fields.text("v")),
        ("\ud800", lambda fields: fields.text("v")),
        ("true", lambda fields: fields.flag("v")),
        ("a!", lambda fields: fields.data("v")),
        ("a", lambda fields: fields.data("v")),
        ([1], lambda fields: fields.texts("v")),
        ({"a": 1}, lambda fields: fields.mapping("v")),
        ("x", lambda fields: fields.message("v")),
        ("x", lambda fields: fields.one_of("a", "b")),
    ],
)
def test_values_of_another_kind_are_refused(value: Any, read: Any) -> None:
    """By name, never turned into something else."""
    with pytest.raises(InvalidRequestError):
        read(Fields({"v": value}))


def test_names_come_in_either_form_and_null_is_absent() -> None:
    """lowerCamel or as in the schema; numbers also in quotes; unknown fields are left alone."""
    fields = Fields({"watcher_id": "w", "pid": "7", "cwd": None, "later": {}})
    assert (fields.text("watcherId"), fields.whole("pid"), fields.text("cwd"), fields.has("cwd")) == ("w", 7, "", False)
