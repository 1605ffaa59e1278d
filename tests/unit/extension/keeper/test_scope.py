"""What code inside a sandbox may ask for."""

import dataclasses
from typing import Any

import pytest

from tests.anything import LENGTHS, changed, give_anything
from warmcell.extension.keeper.scope import GuestScope, of_gpu
from warmcell.sandbox.errors import InvalidRequestError, SandboxNotFoundError
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.models import GIB, Limits, NetworkPolicy, SandboxId, SandboxInfo, SandboxSpec, Workspace

OWN = SandboxSpec(
    python="/env/bin/python",
    workspace=Workspace(path="/w", mode="ro"),
    env={"TOKEN": "t"},
    limits=Limits(memory_bytes=2 * GIB, pids=100),
)
SCOPE = GuestScope(SandboxId("own"), OWN)


def info(name: str, parent: str | None) -> SandboxInfo:
    made_from = None if parent is None else SandboxId(parent)
    return SandboxInfo(
        id=SandboxId(name), state=State.RUNNING, backend="process", isolated=False, owner="remote", parent=made_from
    )


def test_it_sees_only_what_it_created() -> None:
    """Its own sandbox, others and others' children do not exist for it."""
    all_of_them = [info("own", None), info("child", "own"), info("other", None), info("grandchild", "child")]
    assert [seen.id for seen in SCOPE.visible(all_of_them)] == ["child"]
    with pytest.raises(SandboxNotFoundError):
        SCOPE.check_visible(info("other", None))


def test_what_it_makes_is_like_itself_with_the_gpu_it_asks_for() -> None:
    """Environment, workspace and interpreter are inherited."""
    made = SCOPE.narrow({"gpu": "A100"})
    assert (made.gpu, made.python, made.workspace, made.env) == ("A100", OWN.python, OWN.workspace, OWN.env)


def test_its_network_is_what_they_get_unless_less_is_asked() -> None:
    """A notebook that has a network gives it to what it makes, and may withhold it."""
    scope = GuestScope(SandboxId("own"), dataclasses.replace(OWN, network="host"))
    assert scope.narrow({}).network == "host"
    assert scope.narrow({"network": "none"}).network == "none"


def test_what_it_reaches_now_they_reach_too_unless_nothing_is_asked() -> None:
    """What is reached through the keeper's proxy; code in a sandbox cannot say what that is."""
    scope, policy = GuestScope(SandboxId("own"), OWN), NetworkPolicy(allow=("pypi.org",))
    assert scope.narrow({}, egress=policy).egress == policy
    assert scope.narrow({"network": "none"}, egress=policy).egress is None
    with pytest.raises(InvalidRequestError, match="cannot choose"):
        scope.narrow({"network": {"allow": ["*"]}}, egress=policy)


@pytest.mark.parametrize(
    "asked",
    [
        {"network": "host"},
        {"mounts": [{"source": "/etc"}]},
        {"workspace": {"path": "/", "mode": "rw"}},
        {"backend": "process"},
        {"python": "/bin/sh"},
        {"env": {"A": "1"}},
        {"home": "persistent"},
    ],
)
def test_it_cannot_ask_for_more_than_it_has(asked: dict[str, object]) -> None:
    """Wider network, other mounts, another backend: refused, with what can be chosen."""
    with pytest.raises(InvalidRequestError) as caught:
        SCOPE.narrow(asked)
    assert caught.value.hint


def test_its_limits_are_the_ceiling() -> None:
    """Each limit is the smaller of its own and the asked one; more memory than it has is refused, with both."""
    made = SCOPE.narrow({"limits": {"memory_bytes": GIB, "pids": 5000}})
    assert made.limits == Limits(memory_bytes=GIB, pids=100)
    assert SCOPE.narrow({}).limits == OWN.limits
    with pytest.raises(InvalidRequestError, match=r"8\.0 GiB of memory are asked for.* a cap of 2\.0 GiB"):
        SCOPE.narrow({"limits": {"memory_bytes": 8 * GIB}})


def test_it_learns_that_a_gpu_is_held_but_not_by_whom() -> None:
    """Users, processes and sandboxes of the host are none of a guest's business."""
    held = {"uuid": "GPU-1", "lease": {"sandbox_id": "x", "user": "ann", "pid": 7, "since": 1.0}}
    assert of_gpu(held) == {"uuid": "GPU-1", "lease": {"since": 1.0}}
    assert of_gpu({"uuid": "GPU-2", "lease": None}) == {"uuid": "GPU-2", "lease": None}


def test_what_it_makes_may_have_room_for_values() -> None:
    """As much shared memory as the operator lets be sent, also where it has less itself; no more than that."""
    asked = {"limits": {"shm_bytes": 8 * GIB}}
    made = SCOPE.narrow(asked, values_bytes=3 * GIB)
    assert (made.limits.shm_bytes, made.limits.memory_bytes) == (3 * GIB, 2 * GIB)
    assert SCOPE.narrow(asked).limits.shm_bytes == OWN.limits.shm_bytes


def test_an_image_brings_its_own_interpreter() -> None:
    """The path of the notebook's is none in another image."""
    made = SCOPE.narrow({"image": "train"}, has_image=lambda name: name == "train")
    assert (made.image, made.python) == ("train", "")
    assert SCOPE.narrow({}).python == OWN.python


def test_an_image_that_it_was_not_given_is_refused() -> None:
    """Whatever the engine has: only its own, and what was built here or the operator names."""
    scope = GuestScope(SandboxId("own"), dataclasses.replace(OWN, python="", image="mine"))
    assert scope.narrow({"image": "mine"}).image == "mine"
    with pytest.raises(InvalidRequestError, match="somebody-elses/private:1") as caught:
        scope.narrow({"image": "somebody-elses/private:1"}, has_image=lambda name: name == "train")
    assert "principal_images" in caught.value.hint


@LENGTHS
def test_whatever_is_asked_for_is_like_itself_or_refused(examples: int) -> None:
    """Nothing of the host that it was not given, and no more of anything."""
    sound = {"gpu": "A100", "preload": ["json"], "limits": {"memory_bytes": GIB, "cpus": 1.5}, "network": "none"}

    def take(asked: dict[str, Any]) -> None:
        made = SCOPE.narrow(asked)
        kept = ("workspace", "mounts", "env", "home", "backend")
        assert [getattr(made, name) for name in kept] == [getattr(OWN, name) for name in kept]
        assert (made.network, made.egress) == ("none", None)
        assert made.limits.memory_bytes is not None
        assert made.limits.memory_bytes <= 2 * GIB
        assert made.limits.pids is not None
        assert made.limits.pids <= 100
        assert SandboxSpec.from_json(made.to_json()) == made

    names = ("template", "image", "mounts", "workspace", "env", "egress", "shared")
    give_anything(
        changed(sound, {"limits": {"pids": 5, "shm_bytes": 0, "layer_bytes": 1}}, names=names),
        take,
        refusals=InvalidRequestError,
        examples=examples,
        sound=[sound],
        broken=[{"network": "host"}, {"limits": {"memory_bytes": 3 * GIB}}],
    )
