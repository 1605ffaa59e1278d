"""What is told of a build by an engine of containers, without one."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from warmcell.sandbox.backends.docker import building
from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.images.base import PackageIndex
from warmcell.sandbox.images.containers import LINES_MAX, ContainerImageBuilder
from warmcell.sandbox.images.image import Image


@pytest.mark.parametrize("form", ["Step {}/{} : {}", "STEP {}/{}: {}"], ids=["docker", "podman"])
async def test_a_dockerfile_and_what_lies_above_it_are_one_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Its steps are counted on from the first to the last, as either engine says them."""
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    image = Image.from_dockerfile(tmp_path / "Dockerfile", context_dir=tmp_path).env(B="2")
    builds = [["FROM scratch", "COPY . /"], ["FROM sha256:1 AS stage0", 'ENV B="2"', "LABEL x=y"]]

    def run(build: building.Build, files: bytes, *, say: Callable[[str], None], **options: Any) -> str:
        steps = builds.pop(0)
        for number, step in enumerate(steps, 1):
            say(form.format(number, len(steps), step))
        return "sha256:1"

    async def find(builder: ContainerImageBuilder, digest: str) -> object:
        return object()

    monkeypatch.setattr(building.Build, "run", run)
    monkeypatch.setattr(ContainerImageBuilder, "find", find)
    lines: list[str] = []
    await ContainerImageBuilder(engine=Engine(), index=PackageIndex()).build(image, tell=lines.append)
    assert [line.split("]")[0] for line in lines] == ["[1/5", "[2/5", "[3/5", "[4/5", "[5/5"]
    assert lines[3] == '[4/5] ENV B="2"'


async def test_an_engine_that_says_much_waits_for_who_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lines are told in their order, and only so many are on their way at once, however busy the loop is."""
    said, most, ahead = 0, 20 * LINES_MAX, threading.Event()

    def run(build: building.Build, files: bytes, *, say: Callable[[str], None], **options: Any) -> str:
        nonlocal said
        for number in range(most):
            said = number
            if said > 2 * LINES_MAX:
                ahead.set()
            say(str(number))
        return "sha256:1"

    async def find(builder: ContainerImageBuilder, digest: str) -> object:
        return object()

    monkeypatch.setattr(building.Build, "run", run)
    monkeypatch.setattr(ContainerImageBuilder, "find", find)
    lines: list[str] = []

    def tell(line: str) -> None:
        if not lines:
            deadline = time.monotonic() + 0.1
            while time.monotonic() < deadline and not ahead.is_set():
                pass  # The loop does something else.
            assert said <= LINES_MAX + 1
        lines.append(line)

    builder = ContainerImageBuilder(engine=Engine(), index=PackageIndex())
    await builder.build(Image.python("3.12", kernel=False), tell=tell)
    assert lines == [str(number) for number in range(most)]
