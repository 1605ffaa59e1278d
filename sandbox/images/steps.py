"""What an image begins with, and the steps that are taken from there: frozen data that is checked as it is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from warmcell.sandbox.errors import InvalidRequestError
from warmcell.sandbox.images import texts
from warmcell.sandbox.images.context import ContextFile, check_context
from warmcell.sandbox.wire import Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonBase(Wire):
    """A plain Python of that version."""

    version: str
    kernel: bool = True
    """With what notebooks and stateful code need: ipykernel."""
    kind: Literal["python"] = "python"

    def __post_init__(self) -> None:
        texts.python_version(self.version)


@dataclass(frozen=True, slots=True, kw_only=True)
class CondaBase(Wire):
    """An environment of conda's packages, its Python among them."""

    packages: tuple[str, ...]
    channels: tuple[str, ...]
    """Names or addresses, the first one that has a package counts."""
    kernel: bool = True
    """With what notebooks and stateful code need: ipykernel."""
    kind: Literal["conda"] = "conda"

    def __post_init__(self) -> None:
        if not self.packages or not self.channels:
            raise InvalidRequestError("No packages or no channels", hint='Image.conda("python=3.12", "numpy").')
        object.__setattr__(self, "packages", tuple(map(texts.conda_package, self.packages)))
        if sum(map(len, self.packages)) > texts.LIST_MAX:
            raise InvalidRequestError("So many packages are too many", hint="Name those that others do not need.")
        for channel in self.channels:
            texts.conda_channel(channel)

    @property
    def all_packages(self) -> tuple[str, ...]:
        """With those that every image needs, unless it says itself which."""
        needed = ("python", "pip", *(["ipykernel>=6.29"] if self.kernel else []))
        named = {texts.conda_name(package) for package in self.packages}
        return (*self.packages, *(each for each in needed if texts.conda_name(each) not in named))


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryBase(Wire):
    """An image that an engine of containers has, or can fetch."""

    reference: str
    kind: Literal["registry"] = "registry"

    def __post_init__(self) -> None:
        texts.reference(self.reference)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedBase(Wire):
    """An image that was built here under that name; what it is made of is looked up when this one is built."""

    name: str
    kind: Literal["name"] = "name"

    def __post_init__(self) -> None:
        texts.image_name(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerfileBase(Wire):
    """What a Dockerfile makes of the files beside it."""

    dockerfile: str
    context: tuple[ContextFile, ...] = ()
    kind: Literal["dockerfile"] = "dockerfile"

    def __post_init__(self) -> None:
        if not self.dockerfile.strip() or "\0" in self.dockerfile or len(self.dockerfile) > texts.LIST_MAX:
            raise InvalidRequestError("The Dockerfile is empty, or too large", hint="Give one with a FROM line.")
        check_context(self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipInstall(Wire):
    """Python packages, installed together."""

    requirements: tuple[str, ...]
    index_url: str = ""
    """Instead of the operator's; one that anybody may see."""
    extra_index_urls: tuple[str, ...] = ()
    pre: bool = False
    """Versions before their release too."""
    kind: Literal["pip_install"] = "pip_install"

    def __post_init__(self) -> None:
        if not self.requirements:
            raise InvalidRequestError("There is nothing to install", hint='Name packages: .pip_install("pandas").')
        object.__setattr__(self, "requirements", tuple(map(texts.requirement, self.requirements)))
        if sum(map(len, self.requirements)) > texts.LIST_MAX:
            raise InvalidRequestError("So many packages are too many for one step", hint="Install them in several.")
        for address in (*filter(None, [self.index_url]), *self.extra_index_urls):
            texts.url(address, what="The index")


@dataclass(frozen=True, slots=True, kw_only=True)
class AptInstall(Wire):
    """Debian packages."""

    packages: tuple[str, ...]
    kind: Literal["apt_install"] = "apt_install"

    def __post_init__(self) -> None:
        if not self.packages:
            raise InvalidRequestError("There is nothing to install", hint='Name packages: .apt_install("ffmpeg").')
        for package in self.packages:
            texts.apt_package(package)
        if sum(map(len, self.packages)) > texts.TEXT_MAX:
            raise InvalidRequestError("So many packages are too many for one step", hint="Install them in several.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Wire):
    """A command line for /bin/sh."""

    command: str
    kind: Literal["run"] = "run"

    def __post_init__(self) -> None:
        texts.command(self.command)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetEnv(Wire):
    """Environment variables, for the steps that follow and for sandboxes."""

    variables: tuple[tuple[str, str], ...]
    kind: Literal["env"] = "env"

    def __post_init__(self) -> None:
        for pair in self.variables:
            if len(pair) != 2:
                raise InvalidRequestError("A variable is a name and a value", hint='Write it as ["NAME", "value"].')
            texts.variable(*pair)


Base = PythonBase | CondaBase | RegistryBase | NamedBase | DockerfileBase
Step = PipInstall | AptInstall | Run | SetEnv

BASES: Mapping[str, type[Base]] = {
    "python": PythonBase,
    "conda": CondaBase,
    "registry": RegistryBase,
    "name": NamedBase,
    "dockerfile": DockerfileBase,
}
STEPS: Mapping[str, type[Step]] = {"pip_install": PipInstall, "apt_install": AptInstall, "run": Run, "env": SetEnv}


def base_from_json(data: Any) -> Base:
    """Read the wire form of what an image begins with.

    Raises:
        InvalidRequestError: It is none.
    """
    base: Base = _kind(data, BASES, "An image's base").from_json(data)
    return base


def step_from_json(data: Any) -> Step:
    """Read the wire form of a step.

    Raises:
        InvalidRequestError: It is none.
    """
    step: Step = _kind(data, STEPS, "A step").from_json(data)
    return step


def _kind(data: Any, kinds: Mapping[str, Any], what: str) -> Any:
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise InvalidRequestError(f"{what} has no kind {kind!r}", hint=f"Give one of {', '.join(kinds)}.")
    return kinds[kind]
