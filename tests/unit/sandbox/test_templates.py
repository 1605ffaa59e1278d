"""Templates that could not be built, and when that is tried again."""

import dataclasses
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from warmcell.sandbox.errors import OperationTimeoutError, UnsupportedOperationError
from warmcell.sandbox.models import SandboxSpec, SnapshotId
from warmcell.sandbox.templates import RETRY_MOST_S, RETRY_S, Templates, identity

SPEC = SandboxSpec(python=sys.executable, preload=("json",))


class Memory:
    """Of an engine that could save them, and has none yet."""

    store = SimpleNamespace(infos=lambda **kind: [])

    async def check(self, spec: SandboxSpec) -> Any:
        """It can."""
        return SimpleNamespace(whole=False)

    def fingerprint(self, spec: SandboxSpec) -> str:
        """Always the same."""
        return "x"


class Builds:
    """Fail as often as they are told to."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.count = 0
        self.now = 0.0
        memory: Any = Memory()
        self.templates = Templates(memory, self.build, clock=lambda: self.now)

    async def build(self, spec: SandboxSpec, identity: Mapping[str, str]) -> SnapshotId:
        """The next one."""
        self.count += 1
        if self.failures:
            raise self.failures.pop(0)
        return SnapshotId("made")


@pytest.mark.parametrize(
    "error", [OperationTimeoutError("the engine did not answer"), RuntimeError("it did not get ready")]
)
async def test_what_was_in_the_way_once_is_tried_again_after_a_minute(error: Exception) -> None:
    """Whatever it was: until then kernels start without it, and nobody waits for one more attempt."""
    builds = Builds(error)
    assert await builds.templates.ensure(SPEC) is None
    builds.now = RETRY_S - 1
    assert await builds.templates.ensure(SPEC) is None
    assert builds.count == 1
    builds.now = RETRY_S
    assert await builds.templates.ensure(SPEC) == "made"


async def test_each_further_failure_is_left_alone_for_longer() -> None:
    """Up to an hour, which is also what comes after that."""
    builds = Builds(*[OperationTimeoutError("no answer") for _ in range(20)])
    pauses = []
    while builds.failures:
        before, count = builds.now, builds.count
        while builds.count == count:
            await builds.templates.ensure(SPEC)
            builds.now += RETRY_S
        pauses.append(builds.now - before)
    assert pauses[1:4] == [RETRY_S, 2 * RETRY_S, 4 * RETRY_S]
    assert pauses[-1] == RETRY_MOST_S


async def test_what_cannot_be_saved_is_left_alone_for_an_hour() -> None:
    """Mostly it is so for as long as the environment is the same."""
    builds = Builds(UnsupportedOperationError("it holds a device"))
    for builds.now in (0.0, RETRY_MOST_S - 1):
        assert await builds.templates.ensure(SPEC) is None
    assert builds.count == 1
    builds.now = RETRY_MOST_S
    assert await builds.templates.ensure(SPEC) == "made"


def test_kernels_of_another_home_do_not_come_from_one_template() -> None:
    """What a template has imported knows where its home is; by the same name it is the same."""
    one, other = (dataclasses.replace(SPEC, user=user) for user in ("user", "other"))
    names = {identity(spec, "x")["digest"] for spec in (SPEC, one, other, dataclasses.replace(one))}
    assert len(names) == 3
