"""Images for engines of containers: Dockerfiles, built by the engine, labelled with what they are made of."""

import asyncio
import os
import re
import threading
from collections.abc import Collection, Mapping
from typing import assert_never

from warmcell.sandbox.backends.docker import building
from warmcell.sandbox.backends.docker.building import Member
from warmcell.sandbox.backends.docker.engine import Engine
from warmcell.sandbox.backends.threads import BUILDS, ENGINE
from warmcell.sandbox.errors import BackendUnavailableError, InvalidRequestError
from warmcell.sandbox.images.base import Built, Output, PackageIndex, Tell
from warmcell.sandbox.images.dockerfile import CERTIFICATE, CONDA_PYTHON, Rendered, render
from warmcell.sandbox.images.image import Image
from warmcell.sandbox.images.steps import CondaBase, DockerfileBase, NamedBase, PythonBase, RegistryBase
from warmcell.sandbox.models import Network

DIGEST = "warmcell.image"
PYTHON = "warmcell.python"
PYTHON_IMAGE = "python:{version}-slim"

LINES_MAX = 100
"""Of a build's output that are on their way to the loop."""

_STEP = re.compile(r"(?:Step|STEP) (\d+)/(\d+) ?: (.*)")
"""As Docker says it, and Podman."""


class ContainerImageBuilder:
    """Implements `ImageBuilder`."""

    name = "docker"
    references = True

    def __init__(
        self, *, engine: Engine, index: PackageIndex, network: Network = "host", python_image: str = PYTHON_IMAGE
    ) -> None:
        """Configure it.

        Args:
            engine: Builds and keeps them.
            index: Where packages come from.
            network: What builds may reach.
            python_image: With which a plain Python begins; `{version}` in it is that.
        """
        self._engine = engine
        self._index = index
        self._network: Network = network
        self._python_image = python_image

    async def open(self, known: Collection[str] | None) -> None:
        """Nothing: an engine clears up after a build by itself, and images without a record may be another keeper's."""

    def check(self, image: Image) -> None:
        """An engine can do all that can be declared."""

    async def find(self, digest: str) -> Built | None:
        """The image of that name, if it says itself that it is of this declaration."""
        found = await ENGINE.run(building.find, self._engine, _name(digest))
        if found is None or found.labels.get(DIGEST) != digest:
            return None
        return Built(
            digest=digest, reference=found.id, python=found.labels.get(PYTHON, ""), size_bytes=found.size_bytes
        )

    async def build(self, image: Image, *, tell: Tell, again: bool = False) -> Built:
        """Have the engine build it; see the port."""
        output, steps = Output(tell), _Steps()
        if isinstance(image.base, DockerfileBase):
            # The engine makes a further step of the labels.
            steps.to_come = 1 + len(render(image, base="", index=self._index).text.splitlines())
            base = await self._build(_context(image.base), _PLAIN, output, steps, again=again, newer=again)
            steps.go_on()
        else:
            base = self._base(image)
        made = render(image, base=base, index=self._index)
        await self._build(
            await asyncio.to_thread(_files, made),
            made,
            output,
            steps,
            name=_name(image.digest),
            labels={DIGEST: image.digest, PYTHON: made.python, "warmcell.owner": str(os.getuid())},
            again=again,
            newer=again and not isinstance(image.base, DockerfileBase),  # What was just built no registry knows.
        )
        built = await self.find(image.digest)
        if built is None:
            raise output.error("the image", "it was removed as it was made")
        return built

    async def remove(self, digest: str) -> None:
        """Take its name; the engine removes what nothing else needs."""
        await ENGINE.run(building.remove, self._engine, _name(digest))

    def _base(self, image: Image) -> str:
        match image.base:
            case PythonBase():
                return self._python_image.replace("{version}", image.base.version)
            case CondaBase():
                return self._python_image.replace("{version}", CONDA_PYTHON)
            case RegistryBase():
                return image.base.reference
            case NamedBase() | DockerfileBase():
                raise InvalidRequestError("The image begins with another", hint="Build that one first.")
            case _:
                assert_never(image.base)

    async def _build(
        self,
        files: Mapping[str, Member],
        made: Rendered,
        output: Output,
        steps: "_Steps",
        *,
        again: bool,
        newer: bool,
        name: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> str:
        loop = asyncio.get_running_loop()
        room = threading.Semaphore(LINES_MAX)
        step = "the image"

        def tell(line: str) -> None:
            room.release()
            output.line(line)

        def say(line: str) -> None:
            nonlocal step
            found = _STEP.fullmatch(line)
            step = found[3] if found else step
            told = f"{steps.at(int(found[1]), int(found[2]))} {found[3]}" if found else line
            room.acquire()  # Whoever prints faster than it is told waits.
            loop.call_soon_threadsafe(tell, told)

        build = building.Build(self._engine)
        work = asyncio.ensure_future(
            BUILDS.run(
                build.run,
                building.context(files),
                name=name,
                labels=labels or {},
                arguments=made.arguments,
                network=self._network,
                say=say,
                anew=again,
                newer=newer,
            )
        )
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            build.stop()
            await asyncio.gather(work, return_exceptions=True)
            raise
        except building.BuildFailedError as error:
            raise output.error(step, error.message, exit_code=error.exit_code) from error


class _Steps:
    """Those of builds that follow each other, counted as those of one."""

    def __init__(self) -> None:
        self.to_come = 0
        """In builds that follow."""
        self._before = self._of = 0

    def at(self, step: int, of: int) -> str:
        """Where it is, at that step of this build."""
        self._of = of
        return f"[{self._before + step}/{self._before + of + self.to_come}]"

    def go_on(self) -> None:
        """The next build is the last."""
        self._before, self.to_come = self._of, 0


_PLAIN = Rendered(text="", files={}, arguments={}, certificate=None, python="")


def _name(digest: str) -> str:
    """Of one user: another's image of the same declaration may come from another index."""
    return f"warmcell-{os.getuid()}/image:{digest.removeprefix('sha256:')[:16]}"


def _context(base: DockerfileBase) -> Mapping[str, Member]:
    files = {
        file.path: Member(content=file.content, executable=file.executable, link=file.link) for file in base.context
    }
    return {**files, "Dockerfile": Member(content=base.dockerfile.encode())}


def _files(made: Rendered) -> Mapping[str, Member]:
    contents = {**made.files, "Dockerfile": made.text.encode()}
    if made.certificate is not None:
        try:
            contents[CERTIFICATE] = made.certificate.read_bytes()
        except OSError as error:
            raise BackendUnavailableError(
                f"The certificate {made.certificate} cannot be read: {error.strerror}",
                hint="Mend c.Warmcell.index_certificate, or PIP_CERT.",
            ) from error
    return {name: Member(content=content) for name, content in contents.items()}
