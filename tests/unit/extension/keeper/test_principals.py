"""Tokens as they are kept, and what principals have of the API."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from warmcell.extension.keeper.gate import ANY, ASKABLE, VERBS, narrow
from warmcell.extension.keeper.principals import SCOPES, Principal, Principals, Quota, bearer
from warmcell.sandbox.errors import (
    BackendUnavailableError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    UnauthenticatedError,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "principals.json"


def test_a_token_is_known_again_and_is_nowhere_on_disk(path: Path) -> None:
    """The next keeper knows whose it is; its file is its user's alone and has but a hash."""
    info, token = Principals(path).create("ann", scopes=["run", "read"], quota=Quota(sandboxes=3))
    again = Principals(path)
    again.open()
    assert again.find(token) == Principal("ann", frozenset({"read", "run"}), info.id)
    assert again.quota("ann") == Quota(sandboxes=3)
    assert info.scopes == ("read", "run")
    secret = token.removeprefix(f"wct_{info.id}_")
    assert len(secret) > 20
    assert token not in path.read_text()
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_no_token_lets_nobody_in(path: Path) -> None:
    """Another secret, another id, a part of it, and nothing at all."""
    principals = Principals(path)
    info, token = principals.create("ann")
    other, _ = principals.create("bob")
    for wrong in (token[:-1], token + "x", token.replace(info.id, other.id), f"wct_{info.id}_", "wct_", "", "wct_x"):
        with pytest.raises(UnauthenticatedError):
            principals.find(wrong)
    assert principals.find(token).name == "ann"


def test_tokens_expire_and_are_revoked_one_by_one(path: Path) -> None:
    """Of no use at the moment said, and after a restart of the keeper."""
    now = [1000.0]
    principals = Principals(path, now=lambda: now[0])
    _, short = principals.create("ann", expires_in_s=60)
    info, lasting = principals.create("ann")
    now[0] = 1059.9
    assert principals.find(short).name == "ann"
    now[0] = 1060.0
    with pytest.raises(UnauthenticatedError):
        principals.find(short)
    assert principals.revoke(info.id) == info
    again = Principals(path, now=lambda: now[0])
    again.open()
    for principal in (principals, again):
        with pytest.raises(UnauthenticatedError):
            principal.find(lasting)
    with pytest.raises(NotFoundError):
        principals.revoke(info.id)


def test_a_principal_that_is_removed_has_no_token_left(path: Path) -> None:
    """Others keep theirs."""
    principals = Principals(path)
    first, _ = principals.create("ann")
    second, _ = principals.create("ann")
    _, bobs = principals.create("bob")
    assert set(principals.remove("ann")) == {first.id, second.id}
    assert principals.remove("ann") == []
    assert principals.names() == ["bob"]
    assert principals.find(bobs).name == "bob"


def test_gpu_time_is_kept_and_a_quota_stays_until_it_is_changed(path: Path) -> None:
    """Also when another token is made for the same principal."""
    principals = Principals(path)
    principals.create("ann", quota=Quota(gpu_seconds=100.0))
    principals.charge({"ann": 7.5, "nobody": 1.0})
    principals.create("ann")
    again = Principals(path)
    again.open()
    assert (again.quota("ann").gpu_seconds, again.gpu_seconds("ann")) == (100.0, 7.5)
    assert again.names() == ["ann"]


def test_what_was_charged_is_on_disk_once_it_is_saved(path: Path) -> None:
    """Nothing else has to change for it; where it cannot be written it still counts, and is tried again."""
    principals = Principals(path)
    principals.create("ann")
    principals.charge({"ann": 7.5})
    path.with_name(f"{path.name}.new").mkdir()
    principals.save()
    assert principals.gpu_seconds("ann") == 7.5
    path.with_name(f"{path.name}.new").rmdir()
    principals.save()
    again = Principals(path)
    again.open()
    assert again.gpu_seconds("ann") == 7.5


def test_changes_from_several_threads_are_all_kept(path: Path) -> None:
    """Tokens that are made and revoked while GPU time is charged and saved."""
    principals = Principals(path)
    _, stays = principals.create("ann")

    def change(number: int) -> str:
        info, token = principals.create(f"p{number}")
        principals.revoke(principals.create(f"p{number}")[0].id)
        principals.save()
        assert info.principal == f"p{number}"
        return token

    with ThreadPoolExecutor(8) as pool:
        working = [pool.submit(change, number) for number in range(16)]
        for _ in range(100):
            principals.charge({"ann": 1.0})
        tokens = [one.result() for one in working]
    principals.save()
    again = Principals(path)
    again.open()
    assert [again.find(token).name for token in tokens] == [f"p{number}" for number in range(16)]
    assert len(again.tokens()) == 17
    assert (again.find(stays).name, again.gpu_seconds("ann")) == ("ann", 100.0)


@pytest.mark.parametrize("content", ["{", '{"format": 2}', '{"format": 1, "tokens": [{}]}', '{"format": 1, "x": 1}'])
def test_a_file_that_cannot_be_read_lets_nobody_in_and_stays(path: Path, content: str) -> None:
    """It is not written over: whoever mends it has all tokens again."""
    path.write_text(content)
    principals = Principals(path)
    principals.open()
    with pytest.raises(BackendUnavailableError) as caught:
        principals.create("ann")
    assert "warmcell clean" in caught.value.hint
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("", {}),
        ("../x", {}),
        ("self", {}),
        ("a" * 65, {}),
        ("ann", {"scopes": []}),
        ("ann", {"scopes": ["root"]}),
        ("ann", {"expires_in_s": 0}),
        ("ann", {"expires_in_s": float("inf")}),
        ("ann", {"quota": Quota(cpus=-1.0)}),
        ("ann", {"quota": Quota(gpu_seconds=float("nan"))}),
    ],
)
def test_what_cannot_be_a_token_is_refused_with_the_cure(path: Path, name: str, changes: dict[str, object]) -> None:
    """And nothing is written."""
    with pytest.raises(InvalidRequestError) as caught:
        Principals(path).create(name, **changes)  # type: ignore[arg-type]
    assert caught.value.hint
    assert not path.exists()


def test_a_request_shows_its_token_as_clients_of_http_do() -> None:
    """Jupyter's own tokens are none of ours."""
    assert bearer({"Authorization": "Bearer wct_a_b"}) == "wct_a_b"
    assert bearer({"Authorization": "token wct_a_b"}) == "wct_a_b"
    assert [bearer(one) for one in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic wct_a"})] == [None] * 3


@pytest.mark.parametrize(
    "asked",
    [
        {"mounts": [{"source": "/etc"}]},
        {"workspace": {"path": "/", "mode": "rw"}},
        {"python": "/bin/sh"},
        {"home": "persistent"},
        {"backend": "process"},
        {"network": "host"},
        {"warmup": "import os"},
    ],
)
def test_nothing_of_the_host_can_be_asked_for(asked: dict[str, object]) -> None:
    """Whatever the token is good for."""
    with pytest.raises(InvalidRequestError):
        narrow(Principal("ann", frozenset(SCOPES)), asked)


def test_what_isolates_nothing_is_not_for_principals() -> None:
    """Nor where the operator has it for whoever names no backend."""
    ann = Principal("ann", frozenset(SCOPES))
    for asked, usual in (({"backend": "process"}, "auto"), ({}, "process"), ({"backend": "auto"}, "process")):
        with pytest.raises(InvalidRequestError, match="isolates nothing"):
            narrow(ann, asked, usual=usual)
    assert narrow(ann, {"backend": "bubblewrap"}, usual="process") == {"backend": "bubblewrap"}


def test_images_are_those_that_the_operator_lets_be_named() -> None:
    """Whatever else the engine of containers has."""
    ann = Principal("ann", frozenset(SCOPES))
    for name in ("secrets", "registry.example.com/other/tool", "sha256:" + 64 * "a"):
        with pytest.raises(InvalidRequestError, match="not for principals"):
            narrow(ann, {"image": name}, has_image=lambda one: one == "ours")
    assert narrow(ann, {"image": "ours"}, has_image=lambda one: one == "ours") == {"image": "ours"}
    assert narrow(ann, {}) == {}
    assert narrow(ann, {"user": "user"}) == {"user": "user"}  # As E2B's clients have it, whoever they are.


def test_gpus_take_their_scope() -> None:
    """It says which."""
    assert narrow(Principal("ann", frozenset({"gpu"})), {"gpu": "any"}) == {"gpu": "any"}
    with pytest.raises(ForbiddenError) as caught:
        narrow(Principal("ann", frozenset(set(SCOPES) - {"gpu"})), {"gpu": "any"})
    assert "--scope gpu" in caught.value.hint


def test_each_verb_takes_a_scope_that_there_is() -> None:
    """And the fields that may be chosen are some of a spec's."""
    from warmcell.sandbox.models import SandboxSpec

    assert {scope for _, _, scope in VERBS} == {*SCOPES, ANY} - {"gpu"}
    assert set(ASKABLE) < set(SandboxSpec.__dataclass_fields__)
