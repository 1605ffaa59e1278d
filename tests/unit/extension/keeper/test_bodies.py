"""What a request wants a sandbox, a policy, a principal or a file to be: understood or refused, whatever it says."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from tests.anything import JSON, LENGTHS, changed, give_anything
from warmcell.extension.keeper.agents.agents import _spec
from warmcell.extension.keeper.agents.files_api import checked_metadata, checked_path
from warmcell.extension.keeper.agents.once import checked_key
from warmcell.extension.keeper.principals import Principals, Quota
from warmcell.sandbox.errors import InvalidRequestError, UnauthenticatedError
from warmcell.sandbox.models import NetworkPolicy, SandboxSpec
from warmcell.sandbox.network.egress import Egress, EgressBounds

POLICY: dict[str, Any] = {
    **{"allow": ["pypi.org", "*.example.com:8443"], "deny": ["192.0.2.0/24"], "packages": True, "max_bytes": 5},
    **{"headers": {"api.example.com": {"Authorization": "x"}}, "name_servers": ["9.9.9.9"]},
    "through": {"address": "proxy.example.com:1080", "username": "u", "password": "p"},
}
SPEC: dict[str, Any] = {
    **{"python": "/usr/bin/python3", "env": {"A": "b"}, "preload": ["json"], "gpu": ["A100", "any"], "network": "none"},
    "limits": {"memory_bytes": 2**30, "cpus": 1.5, "pids": 100, "layer_bytes": 2**30},
}
QUOTA = {"sandboxes": 3, "cpus": 2.0, "memory_bytes": 2**30, "gpu_seconds": 60.0}


def policies() -> st.SearchStrategy[dict[str, Any]]:
    """With something odd in one place, in its proxy as well."""
    with_tls = {**POLICY["through"], "tls": True, "server_name": "proxy.example.com", "certificates": "none"}
    through = st.fixed_dictionaries({"through": changed(POLICY["through"], with_tls)})
    return st.one_of(changed(POLICY), through.map(lambda odd: {**POLICY, **odd}))


@LENGTHS
def test_any_policy_holds_or_is_refused(examples: int) -> None:
    """For those who may ask for all there is: what is taken has rules that can be asked."""
    egress = Egress(EgressBounds(principals=("*", "*:1080", "ip:53", "*:8443")))

    def take(body: dict[str, Any]) -> None:
        policy = egress.check(NetworkPolicy.from_json(body), principal="ann")
        rules = egress.rules(policy)
        assert rules.why_not("nowhere.test", 81) is not None or "*" in "".join(policy.allow)
        egress.connector.of(policy)
        assert NetworkPolicy.from_json(policy.to_json()).allow == policy.allow

    sound = {name: POLICY[name] for name in ("allow", "deny", "headers", "max_bytes")}
    give_anything(
        policies(),
        take,
        refusals=InvalidRequestError,
        examples=examples,
        sound=[sound],
        broken=[{"allow": ["http://x"]}],
    )


@LENGTHS
def test_any_spec_is_one_or_is_refused(examples: int) -> None:
    """Nothing of the host is in one that is taken."""

    def take(body: dict[str, Any]) -> None:
        spec = _spec(body)
        assert (spec.mounts, spec.workspace, spec.home) == (
            SandboxSpec(python="").mounts,
            None,
            SandboxSpec(python="").home,
        )
        assert spec.network != "host"
        assert SandboxSpec.from_json(spec.to_json()) == spec or spec.egress is not None

    names = ("workspace", "mounts", "home", "egress", "image", "backend", "template", "shared", "owner")
    give_anything(
        st.one_of(changed(SPEC, names=names), policies().map(lambda one: {"network": one})),
        take,
        refusals=InvalidRequestError,
        examples=examples,
        sound=[SPEC],
        broken=[{"network": "host"}, {"mounts": []}],
    )


@LENGTHS
def test_any_token_is_made_or_refused(examples: int, tmp_path: Path) -> None:
    """With any quota, name, scopes and time; one that was made is known again."""
    principals = Principals(tmp_path / "principals.json")

    def take(drawn: tuple[dict[str, Any], Any, Any, Any]) -> None:
        quota, name, scopes, seconds = drawn
        info, token = principals.create(
            name, scopes=scopes, expires_in_s=seconds, quota=Quota.from_json(quota) if quota else None
        )
        try:
            assert principals.find(token).name == name
        finally:
            assert principals.remove(name) == [info.id]

    texts = st.one_of(st.sampled_from(("ann", "bob-1", "", "../x", "a" * 300, "\0", "ä")), st.text(max_size=9))
    inputs = st.tuples(
        changed(QUOTA),
        texts,
        st.lists(st.sampled_from(("read", "run", "snapshot", "root", "")), max_size=3),
        st.one_of(st.none(), st.floats()),
    )
    give_anything(
        inputs,
        take,
        refusals=(InvalidRequestError, UnauthenticatedError),  # The latter of one that is good for no time.
        examples=examples,
        sound=[(QUOTA, "ann", ["read"], 60.0)],
        broken=[({"sandboxes": -1}, "ann", ["read"], None), (QUOTA, "", ["read"], None)],
    )


@LENGTHS
def test_any_path_key_and_note_is_taken_or_refused(examples: int) -> None:
    """What is taken is what was given."""
    reads = {"path": checked_path, "metadata": checked_metadata, "key": checked_key}

    def take(drawn: tuple[str, Any]) -> None:
        name, value = drawn
        if name != "path" and not isinstance(value, str):
            return
        made = reads[name](value)
        assert made == value or isinstance(made, dict)

    texts = st.one_of(st.text(max_size=30), JSON, JSON.map(repr), st.just("[" * 100_000))
    give_anything(
        st.tuples(st.sampled_from(sorted(reads)), texts),
        take,
        refusals=InvalidRequestError,
        examples=examples,
        sound=[("path", "../a"), ("metadata", '{"a": "b"}'), ("key", "a-1")],
        broken=[("path", "\0"), ("metadata", "[]"), ("key", "a b"), ("metadata", '{"a": 1}')],
    )


@pytest.mark.parametrize("text", ['{"a": NaN}', "null", '{"A": "b"}', '{"a": "\\n"}'])
def test_notes_that_cannot_be_kept_are_refused(text: str) -> None:
    """They are attributes of files, and headers."""
    with pytest.raises(InvalidRequestError):
        checked_metadata(text)
