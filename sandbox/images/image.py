"""`Image`: what people declare. An immutable value; each verb gives another one."""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images import files
from warmcell.sandbox.images.context import read_context
from warmcell.sandbox.images.steps import (
    AptInstall,
    Base,
    CondaBase,
    DockerfileBase,
    NamedBase,
    PipInstall,
    PythonBase,
    RegistryBase,
    Run,
    SetEnv,
    Step,
    base_from_json,
    step_from_json,
)

FORMAT = 1
STEPS_MAX = 100

CONDA_FORGE = "conda-forge"

KERNEL = PipInstall(requirements=("ipykernel>=6.29",))
"""The first step of a plain Python that can run kernels."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a sandbox's files come from: a beginning, and steps in their order.

        Image.python("3.12").pip_install("torch", "pandas").apt_install("ffmpeg").env(HF_HUB_OFFLINE="1")

    Nothing is built or looked up here, but files that are named are read. Two images of the same digest are the same.
    """

    base: Base
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        if len(self.steps) > STEPS_MAX:
            raise InvalidRequestError(
                f"An image of {len(self.steps)} steps is too long", hint="Install packages together, in one step."
            )

    @classmethod
    def python(cls, version: str | None = None, *, kernel: bool = True) -> Self:
        """A plain Python.

        Args:
            version: As in "3.12"; that of the Python that runs this if None.
            kernel: With ipykernel, which notebooks and stateful code need.

        Raises:
            InvalidRequestError: It is no version, or one before 3.9.
        """
        version = version if version is not None else f"{sys.version_info.major}.{sys.version_info.minor}"
        return cls(PythonBase(version=version, kernel=kernel))

    @classmethod
    def conda(
        cls, *packages: str | Sequence[str], channels: Sequence[str] = (CONDA_FORGE,), kernel: bool = True
    ) -> Self:
        """An environment of conda's packages, which has a Python and pip.

        Args:
            packages: As in "numpy>=2", "python=3.12" or "bioconda::samtools".
            channels: Names or addresses; of two that have a package the first counts.
            kernel: With ipykernel, which notebooks and stateful code need.

        Raises:
            InvalidRequestError: Something is no package or no channel of conda's.
        """
        return cls(CondaBase(packages=_flat(packages), channels=tuple(channels), kernel=kernel))

    @classmethod
    def from_registry(cls, reference: str) -> Self:
        """An image that an engine of containers has or can fetch: "python:3.12-slim". Its digest is not looked up.

        Raises:
            InvalidRequestError: It is no reference.
        """
        return cls(RegistryBase(reference=reference))

    @classmethod
    def from_dockerfile(cls, path: str | Path = "Dockerfile", *, context_dir: str | Path | None = None) -> Self:
        """What a Dockerfile makes. Blocks.

        Args:
            path: The Dockerfile.
            context_dir: The folder that it copies from, less what its .dockerignore names. None: it copies nothing.

        Raises:
            InvalidRequestError: A file cannot be read, or all of them are more than 8 MiB.
        """
        context = () if context_dir is None else read_context(Path(context_dir))
        return cls(DockerfileBase(dockerfile=files.read_text(Path(path)), context=context))

    @classmethod
    def from_name(cls, name: str) -> Self:
        """An image that was built here and called so.

        Raises:
            InvalidRequestError: It is no name of one.
        """
        return cls(NamedBase(name=name))

    @classmethod
    def from_environment(cls, path: str | Path = "environment.yml", *, kernel: bool = True) -> Self:
        """What an environment.yml of conda's asks for. Blocks.

        Args:
            path: The file. Where it names but a Python and packages of pip's, nothing of conda's is needed; without a
                Python either it is the version that runs this.
            kernel: With ipykernel.

        Raises:
            InvalidRequestError: It cannot be read, or says what cannot be part of an image.
        """
        from warmcell.sandbox.images import conda

        read = conda.read(Path(path))
        if read.conda:
            image = cls.conda(read.conda, channels=read.channels or (CONDA_FORGE,), kernel=kernel)
        else:
            image = cls.python(read.python, kernel=kernel)
        if read.variables:
            image = image.env(read.variables)
        return image if read.packages is None else image._and(read.packages)

    def pip_install(
        self,
        *packages: str | Sequence[str],
        index_url: str = "",
        extra_index_url: str | Sequence[str] = (),
        pre: bool = False,
    ) -> Self:
        """Python packages, installed together.

        Args:
            packages: As in "pandas>=2" or "name @ https://…".
            index_url: Another index than the operator's, one that anybody may see.
            extra_index_url: Further ones.
            pre: Also versions before their release.

        Raises:
            InvalidRequestError: Something is no requirement or no address.
        """
        extra = (extra_index_url,) if isinstance(extra_index_url, str) else tuple(extra_index_url)
        return self._and(PipInstall(requirements=_flat(packages), index_url=index_url, extra_index_urls=extra, pre=pre))

    def pip_install_from_requirements(self, path: str | Path) -> Self:
        """What a requirements.txt lists, with those that it includes. Blocks.

        Raises:
            InvalidRequestError: It cannot be read, or says what cannot be done here.
        """
        return self._and(files.read_requirements(Path(path)))

    def pip_install_from_pyproject(self, path: str | Path, *, optional_dependencies: Iterable[str] = ()) -> Self:
        """The dependencies of a project, not the project itself. Blocks.

        Args:
            path: Its pyproject.toml.
            optional_dependencies: Names of groups of optional ones that are installed too.

        Raises:
            InvalidRequestError: It cannot be read, or has no such group.
        """
        return self._and(files.read_pyproject(Path(path), tuple(optional_dependencies)))

    def apt_install(self, *packages: str | Sequence[str]) -> Self:
        """Debian packages. Only engines of containers can do that.

        Raises:
            InvalidRequestError: Something is no name of a package.
        """
        return self._and(AptInstall(packages=_flat(packages)))

    def run(self, *commands: str) -> Self:
        """Command lines for /bin/sh, each a step.

        Raises:
            InvalidRequestError: There is none, or one is empty.
        """
        if not commands:
            raise InvalidRequestError("There is no command", hint='Give a line: .run("python -m spacy download en").')
        return self._and(*(Run(command=command) for command in commands))

    def env(self, variables: Mapping[str, str] | None = None, /, **more: str) -> Self:
        """Environment variables, for the steps that follow and for sandboxes.

        Raises:
            InvalidRequestError: A name is none, or a value is not one line of text.
        """
        given = {**(variables or {}), **more}
        for name, value in given.items():
            if not isinstance(value, str):
                raise InvalidRequestError(f"The value of {name} is no text", hint=f'Write {name}="{value}".')
        return self._and(SetEnv(variables=tuple(sorted(given.items()))))

    @property
    def digest(self) -> str:
        """What it is made of, as "sha256:…"; files that it names with their contents."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        return {"format": FORMAT, "base": self.base.to_json(), "steps": [step.to_json() for step in self.steps]}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read the wire form.

        Raises:
            InvalidRequestError: It is none.
        """
        known = {"format", "base", "steps"}
        if not isinstance(data, Mapping) or set(data) != known or not isinstance(data["steps"], (list, tuple)):
            raise InvalidRequestError("This is no declaration of an image", hint=f"It has {', '.join(sorted(known))}.")
        if data["format"] != FORMAT:
            raise InvalidRequestError(
                f"The declaration has format {data['format']!r}, this version of Warmcell reads {FORMAT}",
                hint="Declare it with the version of Warmcell that builds it.",
            )
        return cls(base_from_json(data["base"]), tuple(map(step_from_json, data["steps"])))

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """Its steps, with those that its base stands for."""
        with_kernel = isinstance(self.base, PythonBase) and self.base.kernel
        return (KERNEL, *self.steps) if with_kernel else self.steps

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment variables that its steps leave."""
        return {name: value for step in self.steps if isinstance(step, SetEnv) for name, value in step.variables}

    def __str__(self) -> str:
        return " → ".join(map(told, (self.base, *self.steps)))

    def _and(self, *steps: Step) -> Self:
        return type(self)(self.base, (*self.steps, *steps))


def _flat(packages: Iterable[str | Sequence[str]]) -> tuple[str, ...]:
    """Names that were given one by one, or as lists."""
    return tuple(name for given in packages for name in ([given] if isinstance(given, str) else given))


def told(part: Base | Step) -> str:
    """A part in a few words."""
    match part:
        case PythonBase():
            return f"python {part.version}"
        case CondaBase():
            return _few("conda", part.packages)
        case RegistryBase():
            return part.reference
        case NamedBase():
            return part.name
        case DockerfileBase():
            return "Dockerfile"
        case PipInstall():
            return _few("pip_install", part.requirements)
        case AptInstall():
            return _few("apt_install", part.packages)
        case Run():
            return _few("run", part.command.splitlines())
        case SetEnv():
            return _few("env", [name for name, _ in part.variables])


def _few(verb: str, words: Sequence[str], most: int = 60) -> str:
    text = " ".join((verb, *words))
    return text if len(text) <= most else f"{text[: most - 1]}…"
